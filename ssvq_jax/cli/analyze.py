"""``ssvq analyze``: what a recipe does to every weight, before any fine-tuning."""

import dataclasses
from typing import Annotated

import tyro

from ssvq_jax.cli.options import FolderOptions, ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeCommand(FolderOptions, ModelOptions):
    """Show, weight by weight, the error of a recipe, its signs and codes, and the loss it costs.

    The loss is that of the trained model with this one weight compressed and the others as they
    were. Tells which weights want more bits, before you pay for fine-tuning.
    """

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (ssvq-21x, vq-21x, uniform-8bit, ...) or JSON file."""
    examples: int = 1024
    """Images of the evaluation split to measure the loss on, from its beginning."""

    def check(self) -> None:
        """Raises ValueError for what is missing or out of range."""
        super().check()
        if self.examples < 1:
            raise ValueError(f"examples={self.examples}: give at least 1")

    def run(self) -> None:
        """Analyzes, and writes everything."""
        import itertools

        import jax
        from rich.progress import track

        from ssvq_jax.analysis import Sensitivity, leaf_reports, loss_sensitivities
        from ssvq_jax.cli.run_folder import RunFolder
        from ssvq_jax.cli.setup import EVAL_BATCH, set_up
        from ssvq_jax.cli.weights import open_plan
        from ssvq_jax.report import plot_analysis, print_analysis, provenance
        from ssvq_jax.training.finetune import encoding_key
        from ssvq_jax.training.step import linen_forward

        setup = set_up(self, compressed=False)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        plan = open_plan(command.recipe, weights)
        recipe = plan.to_json()["recipe"]
        config = setup.config("analyze", recipe=recipe)
        size = min(EVAL_BATCH, command.examples)
        count = -(-command.examples // size)
        images.source.evaluate(images.held_out, size)  # refuses before there is a folder
        folder = RunFolder(command.out, config, resume=command.resume)
        print(f"encoding {len(plan.compressed)} weights")
        # As `ssvq compress` encodes them.
        variables = plan.init(encoding_key(jax.random.key(setup.seed)), weights.params)
        leaves = leaf_reports(plan, weights.params, variables)
        done = [Sensitivity(**line) for line in folder.metrics.clean()]
        rows = loss_sensitivities(
            linen_forward(model.module),
            plan,
            weights.params,
            variables,
            lambda: itertools.islice(images.source.evaluate(images.held_out, size), count),
            model_state=weights.model_state,
            done=done,
        )
        total = len(leaves) + 2 - len(done)
        for row in track(rows, description="evaluating", total=total):
            folder.metrics.append(dataclasses.asdict(row))
            done.append(row)
        results = {
            "config": folder.config,
            **provenance(),
            "eval_split": images.held_out,
            "leaves": [dataclasses.asdict(leaf) for leaf in leaves],
            "sensitivities": [dataclasses.asdict(row) for row in done],
        }
        folder.write("plan.json", plan.to_json())
        folder.write("results.json", results)
        plot_analysis(leaves, done, folder.path / "analysis.png")
        print_analysis(f"{model.name} with {command.recipe}", leaves, done)
        print(f"results and the picture are in {command.out}")
