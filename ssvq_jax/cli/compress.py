"""``ssvq compress``: post-training compression, without any training."""

import dataclasses
from typing import Annotated

import tyro

from ssvq_jax.cli.options import BatchOptions, FolderOptions, ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressCommand(BatchOptions, FolderOptions, ModelOptions):
    """Compress a trained model, and see what that costs before any fine-tuning.

    `ssvq finetune --weights OUT` goes on from what is written.
    """

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or JSON file."""

    def run(self) -> None:
        """Compresses, and writes everything."""
        import jax

        from ssvq_jax.analysis import leaf_reports
        from ssvq_jax.cli.run_folder import RunFolder
        from ssvq_jax.cli.session import RUN, summary
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.cli.weights import open_plan
        from ssvq_jax.report import plot_analysis, print_bits, print_outcome, provenance
        from ssvq_jax.training.finetune import finetune
        from ssvq_jax.training.layout import local_layout
        from ssvq_jax.training.optimizer import OptimizerConfig
        from ssvq_jax.training.run import RunOptions
        from ssvq_jax.training.step import make_evaluate

        setup = set_up(self, compressed=False)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        plan = open_plan(command.recipe, weights)
        recipe = plan.to_json()["recipe"]
        config = setup.config("compress", recipe=recipe)
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
        leaves = leaf_reports(plan, weights.params, done.state.variables)
        results = {
            "config": folder.config,
            **provenance(),
            "eval_split": images.held_out,
            "float": floating._asdict(),
            **summary(plan, done),
            "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
        }
        folder.metrics.resume("compress", -1)
        folder.metrics.append({"run": "compress", "step": 0, **done.after._asdict()})
        folder.write("plan.json", plan.to_json())
        folder.write("results.json", results)
        plot_analysis(leaves, (), folder.path / "leaves.png")
        print_bits(f"{model.name} with {command.recipe}", plan.bits())
        print_outcome("compressed", results)
        print(f"results, pictures and checkpoints are in {command.out}")
