"""``ssvq quickstart``: a whole compression on real digits, against the baselines."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.run_folder import RunFolder
    from ssvq_jax.plan import Plan
    from ssvq_jax.training.finetune import Finetuned
    from ssvq_jax.training.optimizer import OptimizerConfig
    from ssvq_jax.training.run import Task
    from ssvq_jax.tree import PyTree

MODEL = "deit_digits"
METHODS = (
    "vq-21x-shared",
    "ssvq-fixed-21x-shared",
    "ssvq-21x-shared",
    "vq-26x-shared",
    "ssvq-fixed-26x-shared",
    "ssvq-26x-shared",
    "uniform-2bit",
    "uniform-8bit",
)


@dataclasses.dataclass(frozen=True)
class QuickstartCommand:
    """Train a small vision transformer on real digits, compress it 21 and 26 times, compare.

    Uses 5,000 MNIST digits that come with the installation; nothing is downloaded. A float model is
    trained first; then every method compresses it and is fine-tuned with the same data and steps.
    The table shows test accuracy of the finalized models, and the bits they store. About five
    minutes on two CPU cores. Stop it whenever you like: the same command goes on where it was.
    """

    out: Path = Path("runs/quickstart")
    """Folder for config.json, results.json, metrics.jsonl, packed files, plans, pictures and
    checkpoints."""
    resume: bool = True
    """Go on with the run in the folder; --no-resume deletes it and starts over."""
    save_seconds: float = 60.0
    """Least time between two checkpoints."""
    seed: int = 0
    """Decides initial weights, clustering, and the order and augmentation of the data."""
    methods: tuple[str, ...] = METHODS
    """Recipes to compare: presets or JSON files. Small models share one codebook ("-shared")."""
    float_steps: int = 16000
    """Updates of the float model."""
    steps: int = 2000
    """Updates of every compressed model."""
    batch_size: int = 64
    """Images an update."""
    devices: int | None = None
    """How many of the local devices to use; by default all. They share each batch."""
    data_dir: Path | None = None
    """Where the prepared digits are kept; by default TensorFlow Datasets' own folder."""

    def check(self) -> None:
        """Raises ValueError for numbers out of range."""
        for name in ("steps", "float_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: give 0 to 2**31 - 1")
        if not self.save_seconds >= 0:
            raise ValueError(f"save_seconds={self.save_seconds}: give 0 or more")

    def run(self) -> None:
        """Runs the comparison, shows it, and writes everything."""
        from ssvq_jax.report import plot_accuracy, plot_signs, plot_tradeoff, print_results

        results, histories = compare(self)
        plot_accuracy(histories, self.out / "accuracy.png")
        plot_signs(histories, self.out / "signs.png")
        plot_tradeoff(results, self.out / "tradeoff.png")
        print_results(results)
        print(f"results and pictures are in {self.out}")


def compare(command: QuickstartCommand) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains, compresses by every method, and writes ``results.json`` after each.

    Returns:
        The results, and the training records by method.
    """
    from ssvq_jax.cli.options import to_json
    from ssvq_jax.cli.run_folder import RunFolder
    from ssvq_jax.models import create, param_shapes
    from ssvq_jax.plan import Plan, make_plan
    from ssvq_jax.recipe import load_recipe
    from ssvq_jax.report import provenance
    from ssvq_jax.training.layout import local_layout

    command.check()
    local_layout(command.devices).check_batch(command.batch_size)
    plans: dict[str, tuple[str, Plan]] = {}
    for name in command.methods:  # what cannot work fails before any work
        label = Path(name).stem.removesuffix("-shared")
        if label in plans or label == "float":
            raise ValueError(f"methods: two runs would be called '{label}'; leave one out")
        plans[label] = name, make_plan(param_shapes(create(MODEL)), load_recipe(name))
        if not plans[label][1].entries:
            raise ValueError(f"methods: '{name}' compresses nothing")
    config = to_json(command, "quickstart", model=MODEL, recipes=_recipes(plans))
    origin = provenance()
    task = load_task(command, "test")
    folder = RunFolder(command.out, config, resume=command.resume)
    trained = train_float(command, task, folder)
    _pack(folder, "float", trained)
    results: dict[str, Any] = {
        "config": folder.config,
        **origin,
        "float": {
            **trained.after._asdict(),
            "steps": command.float_steps,
            "seconds": sum(trained.seconds.values()),
        },
        "methods": {},
    }
    histories = {}
    for label, (name, plan) in plans.items():
        optimizer = tuned_optimizer(plan)
        done = compress(command, task, plan, trained.packed.params, optimizer, label, folder)
        histories[label] = done.records
        results["methods"][label] = {
            "recipe": name,
            "optimizer": dataclasses.asdict(optimizer),
            **_row(plan, done, command.steps),
            **_pack(folder, label, done),
        }
        rows = [results["float"], *results["methods"].values()]
        results["seconds"] = sum(row["seconds"] for row in rows)
        folder.write(f"{label}.plan.json", plan.to_json())
        folder.write("results.json", results)
    return results, histories


def load_task(command: QuickstartCommand, split: str) -> "Task":
    """The digits and the model, judged on a split."""
    from ssvq_jax import data
    from ssvq_jax.cli.setup import round_up
    from ssvq_jax.models import create
    from ssvq_jax.training.layout import local_layout
    from ssvq_jax.training.run import Task
    from ssvq_jax.training.step import linen_forward

    train = data.load_split(data.EMBEDDED_NAME, "train", command.data_dir)
    held_out = data.load_split(data.EMBEDDED_NAME, split, command.data_dir)
    augment = data.augmentation_preset("digits").augment
    batch = round_up(500, local_layout(command.devices).devices)
    return Task(
        forward=linen_forward(create(MODEL)),
        train_batches=lambda seed: data.train_batches(
            train, command.batch_size, seed=seed, augment=augment
        ),
        eval_batches=lambda: data.eval_batches(held_out, batch),
    )


def train_float(
    command: QuickstartCommand, task: "Task", folder: "RunFolder | None" = None
) -> "Finetuned":
    """Trains the float model: the plan that compresses nothing."""
    import jax
    import jax.numpy as jnp

    from ssvq_jax.models import create, param_shapes
    from ssvq_jax.plan import make_plan
    from ssvq_jax.training.optimizer import OptimizerConfig

    model = create(MODEL)
    config = model.config
    image = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    init_key, key, _ = jax.random.split(jax.random.key(command.seed), 3)
    params = jax.jit(model.init)(init_key, image)["params"]
    return _run(
        command,
        task,
        make_plan(param_shapes(model), [(".*", None)]),
        params,
        key=key,
        seed=command.seed,
        steps=command.float_steps,
        optimizer=OptimizerConfig(dense=2e-3, weight_decay=0.05, freeze=None),
        name="float",
        folder=folder,
    )


def compress(
    command: QuickstartCommand,
    task: "Task",
    plan: "Plan",
    params: "PyTree",
    optimizer: "OptimizerConfig",
    name: str,
    folder: "RunFolder | None" = None,
) -> "Finetuned":
    """Compresses the float model by a plan and fine-tunes it; equal seeds see equal batches."""
    import jax

    return _run(
        command,
        task,
        plan,
        params,
        key=jax.random.split(jax.random.key(command.seed), 3)[2],
        seed=command.seed + 1_000_000,  # not the batches of the float run
        steps=command.steps,
        optimizer=optimizer,
        name=name,
        folder=folder,
    )


def _run(
    command: QuickstartCommand,
    task: "Task",
    plan: "Plan",
    params: "PyTree",
    *,
    name: str,
    folder: "RunFolder | None",
    **settings: Any,
) -> "Finetuned":
    """Fine-tunes, saved in a folder if there is one."""
    from ssvq_jax.training.finetune import finetune
    from ssvq_jax.training.layout import local_layout
    from ssvq_jax.training.run import RunOptions

    settings["options"] = RunOptions(layout=local_layout(command.devices))
    if folder is None:
        return finetune(task, plan, params, name=name, **settings)
    with folder.checkpoints(name, command.save_seconds) as checkpoints:
        return finetune(
            task,
            plan,
            params,
            name=name,
            metrics=folder.metrics,
            checkpoints=checkpoints,
            **settings,
        )


def tuned_optimizer(plan: "Plan") -> "OptimizerConfig":
    """Settings for a plan's main method.

    Chosen on the validation split by the same random search for every method, at the harder ratio:
    experiments/quickstart_tuning.py.
    """
    from ssvq_jax.quantizers import SignSplit, Uniform
    from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig

    main = max(plan.entries, key=lambda entry: entry.spec.size).quantizer
    match main:
        case SignSplit(learn_signs=True):
            freeze = FreezeConfig(every=50, start=0.1, end=0.02, momentum=0.02)
            return OptimizerConfig(dense=3.5e-3, codebook=6.2e-3, sign=1.2e-3, freeze=freeze)
        case SignSplit():
            return OptimizerConfig(dense=1.4e-2, codebook=1.5e-3, freeze=None)
        case Uniform():
            return OptimizerConfig(dense=9.1e-3, latent=1.1e-3, freeze=None)
        case _:
            return OptimizerConfig(dense=1.8e-2, codebook=9.3e-4, freeze=None)


def _recipes(plans: "dict[str, tuple[str, Plan]]") -> dict[str, Any]:
    """What the recipes say, since a file may change before a run goes on."""
    return {label: plan.to_json()["recipe"] for label, (_, plan) in plans.items()}


def _pack(folder: "RunFolder", label: str, done: "Finetuned") -> dict[str, Any]:
    """Writes a finished run as a packed file; gives the size of that."""
    from ssvq_jax import data
    from ssvq_jax.cli.packed import write_packed

    (folder.path / "packed").mkdir(exist_ok=True)
    config = {"model": MODEL, "data": data.EMBEDDED_NAME, "seed": folder.config["seed"]}
    told = {"split": "test", **done.after._asdict()}
    file = folder.path / "packed" / f"{label}.safetensors"
    return write_packed(file, done.packed, None, config, told)


def _row(plan: "Plan", done: "Finetuned", steps: int) -> dict[str, Any]:
    bits, last = plan.bits(), done.records[-1] if done.records else {}
    return {
        "bits_per_weight": bits.main.bits_per_weight,
        "compression_ratio": bits.main.compression_ratio,
        "stored_bytes": bits.stored_bytes,
        "accuracy_before": done.before.accuracy,
        "accuracy_after": done.after.accuracy,
        "standard_error": done.after.standard_error,
        "loss_before": done.before.loss,
        "loss_after": done.after.loss,
        "signs": {key: last[key] for key in ("flipped", "frozen") if key in last},
        "steps": steps,
        "seconds": sum(done.seconds.values()),
        "seconds_by_part": done.seconds,
    }
