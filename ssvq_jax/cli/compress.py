"""``ssvq compress``: post-training compression, without any training."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ssvq_jax.cli.options import (
    BatchOptions,
    FolderOptions,
    ModelOptions,
    TextOptions,
    check_apart,
    to_json,
)

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.cli.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressCommand(BatchOptions, FolderOptions, TextOptions, ModelOptions):
    """Compress a trained model, and see what that costs before any fine-tuning.

    `ssvq finetune --weights OUT` goes on from what is written. Without --data, or --text for a
    language model (smollm2_135m), the model is compressed and not judged. Without --model, a
    .safetensors file of any model is compressed as it is: rules match the names of its tensors.
    OUT/model.safetensors is the packed model.
    """

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or JSON file."""
    eval_text: tuple[Path, ...] = ()
    """The same as --text."""
    calibration_text: tuple[Path, ...] = ()
    """For a language model: text files by which errors of weights are weighed, as much of them as
    of --text; not those that judge."""
    feedback: bool = False
    """For a language model: encode input by input, and let those that follow make good the errors
    so far (GPTQ); with --calibration-text."""

    def run(self) -> None:
        """Compresses, and writes everything."""
        from ssvq_jax.cli.language import is_language
        from ssvq_jax.cli.weights import run_config
        from ssvq_jax.models import is_tensors
        from ssvq_jax.packing import is_packed

        if self.eval_text:
            if self.text:
                raise ValueError("--text and --eval-text are the same: leave one out")
            dataclasses.replace(self, text=self.eval_text, eval_text=()).run()
            return
        if is_language(self.model, self.weights):
            from ssvq_jax.cli.compress_language import compress_language

            compress_language(self)
            return
        self.check_images()
        if self.calibration_text or self.feedback:
            raise ValueError(
                "--calibration-text and --feedback are for language models, and this is none: "
                "leave them out (in Python: ssvq_jax.calibration)"
            )
        run = run_config(self.weights)
        if self.weights is not None and is_packed(self.weights) and not (run or {}).get("model"):
            raise ValueError(f"{self.weights} is packed already: use `ssvq pack` to change how")
        plain = self.weights is not None and is_tensors(self.weights)
        if plain and self.model is None and run is None:
            self._tensors()
        elif self.data is None and not (run or {}).get("data"):
            self._without_data()
        else:
            self._model()

    def _model(self) -> None:
        """Compresses a model, and judges it on data."""
        import jax

        from ssvq_jax.analysis import leaf_reports
        from ssvq_jax.cli.run_folder import RunFolder
        from ssvq_jax.cli.session import RUN, pack, summary
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.cli.weights import open_plan
        from ssvq_jax.report import print_outcome
        from ssvq_jax.training.evaluation import make_evaluate
        from ssvq_jax.training.finetune import finetune
        from ssvq_jax.training.layout import local_layout
        from ssvq_jax.training.optimizer import OptimizerConfig
        from ssvq_jax.training.run import RunOptions

        setup = set_up(self, compressed=False)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        plan = open_plan(command.recipe, weights)
        config = setup.config("compress", recipe=plan.to_json()["recipe"])
        layout = local_layout(command.devices)
        task = make_task(model, images, setup.batch_size, devices=layout.devices)
        task.eval_batches()  # what it refuses, it refuses before there is a folder
        folder = RunFolder(command.out, config, resume=command.resume)
        with folder.checkpoints(RUN, 0.0) as checkpoints:
            done = finetune(
                task,
                plan,
                weights.params,
                key=jax.random.key(setup.seed),
                seed=setup.seed,
                steps=0,
                optimizer=OptimizerConfig(),
                name="compress",
                model_state=weights.model_state,
                checkpoints=checkpoints,
                options=RunOptions(batch_norm_batches=setup.batch_norm_batches, layout=layout),
            )
        evaluate = make_evaluate(task.forward, layout)
        floating = evaluate(weights.params, weights.model_state, task.eval_batches())
        results = {
            "eval_split": images.held_out,
            "float": floating._asdict(),
            **summary(plan, done),
            **pack(setup, folder, done),
        }
        folder.metrics.resume("compress", -1)
        folder.metrics.append({"run": "compress", "step": 0, **done.after._asdict()})
        leaves = leaf_reports(plan, weights.params, done.state.variables)
        self.report(folder, plan, leaves, results)
        print_outcome("compressed", results)
        print(f"results, pictures, checkpoints and the packed model are in {command.out}")

    def _tensors(self) -> None:
        """Compresses the tensors of a file."""
        import jax.numpy as jnp

        from ssvq_jax.cli.weights import Weights
        from ssvq_jax.models import load_tensors
        from ssvq_jax.training.identity import checksum

        if self.weights is None:
            raise ValueError("no weights: give --weights with a .safetensors file or shards")
        used = {"weights", "recipe", "out", "resume", "seed"}
        self.check_unused(used, "is for a model: give --model too")
        tensors = load_tensors(self.weights)
        params = {name: x for name, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        state = {name: x for name, x in tensors.items() if name not in params}
        origin = {"from": str(self.weights), "crc32": checksum(tensors)}
        self._pack(Weights(params, state, None, None, origin), {})

    def _without_data(self) -> None:
        """Compresses a model that nobody judges here."""
        from ssvq_jax.cli.setup import open_model
        from ssvq_jax.cli.weights import open_weights

        used = {"model", "classes", "new_head", "scan", "weights", "image_size", "recipe", "out",
                "resume", "seed"}  # fmt: skip
        self.check_unused(used, "is for judging by data: give --data too")
        model = open_model(self, None)
        shape = model.image_shape(self.image_size)
        weights = open_weights(self.weights, model, shape, new_head=self.new_head)
        if weights.plan is not None:
            raise ValueError(f"{self.weights} is compressed already: give float weights")
        told = {"image_shape": list(shape), "outputs": model.outputs(shape)}
        self._pack(weights, {**dataclasses.asdict(self), **told})

    def _pack(self, weights: "Weights", told: dict[str, Any]) -> None:
        """Encodes weights, and writes and shows what came of it."""
        import jax

        from ssvq_jax.analysis import leaf_reports
        from ssvq_jax.cli.packed import PACKED, write_packed
        from ssvq_jax.cli.run_folder import RunFolder
        from ssvq_jax.cli.session import sizes
        from ssvq_jax.cli.weights import open_plan
        from ssvq_jax.training.finetune import encoding_key

        self.check_seed()
        check_apart(self.out, self.weights)
        plan = open_plan(self.recipe, weights)
        seed = self.seed or 0
        recipe = plan.to_json()["recipe"]
        config = to_json(self, "compress", weights=weights.origin, recipe=recipe, seed=seed)
        folder = RunFolder(self.out, config, resume=self.resume)
        variables = plan.init(encoding_key(jax.random.key(seed)), weights.params, progress=True)
        packed = plan.finalize(variables)
        size = write_packed(folder.path / PACKED, packed, weights.model_state, told, {})
        leaves = leaf_reports(plan, weights.params, variables)
        self.report(folder, plan, leaves, {**sizes(plan), **size})
        print(f"{size['file_bytes']:,} bytes, {size['file_ratio']:.2f}x smaller than float32")
        print(f"results and the packed model are in {self.out}")

    def report(self, folder: Any, plan: Any, leaves: Any, results: dict[str, Any]) -> None:
        """Writes and shows where the bits go and what they cost."""
        from ssvq_jax.report import plot_analysis, print_bits, provenance

        results = {
            "config": folder.config,
            **provenance(),
            **results,
            "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
        }
        folder.write("plan.json", plan.to_json())
        folder.write("results.json", results)
        plot_analysis(leaves, (), folder.path / "leaves.png")
        print_bits(f"{folder.config['model'] or self.weights} with {self.recipe}", plan.bits())
