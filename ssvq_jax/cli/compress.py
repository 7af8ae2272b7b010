"""``ssvq compress``: post-training compression, without any training."""

import dataclasses
from typing import Annotated, Any

import tyro

from ssvq_jax.cli.options import (
    BatchOptions,
    FolderOptions,
    ModelOptions,
    check_apart,
    to_json,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressCommand(BatchOptions, FolderOptions, ModelOptions):
    """Compress a trained model, and see what that costs before any fine-tuning.

    `ssvq finetune --weights OUT` goes on from what is written. Without --model, a .safetensors file
    of any model is compressed as it is: rules match the names of its tensors, and no data are
    needed. OUT/model.safetensors is the packed model.
    """

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or JSON file."""

    def run(self) -> None:
        """Compresses, and writes everything."""
        from ssvq_jax.cli.weights import run_config
        from ssvq_jax.models import SAFETENSORS
        from ssvq_jax.packing import is_packed

        run = run_config(self.weights)
        if self.weights is not None and is_packed(self.weights) and not (run or {}).get("model"):
            raise ValueError(f"{self.weights} is packed already: use `ssvq pack` to change how")
        plain = self.weights is not None and self.weights.suffix == SAFETENSORS
        if plain and self.model is None and run is None:
            self._tensors()
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
        from ssvq_jax.training.finetune import finetune
        from ssvq_jax.training.layout import local_layout
        from ssvq_jax.training.optimizer import OptimizerConfig
        from ssvq_jax.training.run import RunOptions
        from ssvq_jax.training.step import make_evaluate

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
        self._report(folder, plan, leaves, results)
        print_outcome("compressed", results)
        print(f"results, pictures, checkpoints and the packed model are in {command.out}")

    def _tensors(self) -> None:
        """Compresses the tensors of a file."""
        import jax
        import jax.numpy as jnp

        from ssvq_jax.analysis import leaf_reports
        from ssvq_jax.cli.packed import PACKED, write_packed
        from ssvq_jax.cli.run_folder import RunFolder
        from ssvq_jax.cli.session import sizes
        from ssvq_jax.cli.weights import Weights, open_plan
        from ssvq_jax.models import load_tensors
        from ssvq_jax.training.finetune import encoding_key
        from ssvq_jax.training.identity import checksum

        if self.weights is None:
            raise ValueError("no weights: give --weights with a .safetensors file")
        used = {"weights", "recipe", "out", "resume", "seed"}
        self.check_unused(used, "is for a model: give --model too")
        self.check_seed()
        check_apart(self.out, self.weights)
        tensors = load_tensors(self.weights)
        params = {name: x for name, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        state = {name: x for name, x in tensors.items() if name not in params}
        origin = {"from": str(self.weights), "crc32": checksum(tensors)}
        plan = open_plan(self.recipe, Weights(params, state, None, None, origin))
        seed = self.seed or 0
        recipe = plan.to_json()["recipe"]
        config = to_json(self, "compress", weights=origin, recipe=recipe, seed=seed)
        folder = RunFolder(self.out, config, resume=self.resume)
        variables = plan.init(encoding_key(jax.random.key(seed)), params, progress=True)
        packed = plan.finalize(variables)
        size = write_packed(folder.path / PACKED, packed, state, {}, {})
        self._report(folder, plan, leaf_reports(plan, params, variables), {**sizes(plan), **size})
        print(f"{size['file_bytes']:,} bytes, {size['file_ratio']:.2f}x smaller than float32")
        print(f"results and the packed model are in {self.out}")

    def _report(self, folder: Any, plan: Any, leaves: Any, results: dict[str, Any]) -> None:
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
