"""``ssvq eval``: the quality of a run's model on a split."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ssvq_jax.cli.options import BatchOptions, ModelOptions
from ssvq_jax.training.checkpoint import Which


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCommand(BatchOptions, ModelOptions):
    """Evaluate a model: that of a run of train, compress or finetune, or your own weights.

    Model, data and image size are those of the run, unless you say otherwise.
    """

    eval_split: Annotated[str | None, tyro.conf.arg(name="split")] = "test"
    """Split to evaluate on."""
    which: Which = "last"
    """The run's last state, or the one with the least validation loss."""
    out: Path | None = None
    """Folder for the results; by default that of the run."""

    def run(self) -> None:
        """Evaluates; writes ``eval-SPLIT-WHICH.json``."""
        import json

        import jax

        from ssvq_jax.atomic import replace_text
        from ssvq_jax.cli.session import sizes
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.cli.weights import run_config
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome, provenance
        from ssvq_jax.training.batch_norm import reestimate_batch_norm
        from ssvq_jax.training.layout import local_layout
        from ssvq_jax.training.step import make_evaluate

        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out={self.out} is a file: give a folder")
        run = run_config(self.weights) or {}
        # Batch statistics are those of the run's training images, as it saw them.
        setup = set_up(self, augment=run.get("augment", "none"), which=self.which)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        layout = local_layout(self.devices)
        task = make_task(model, images, setup.batch_size, devices=layout.devices)
        params, state = weights.params, weights.model_state
        plan = weights.plan or make_plan(params, [(".*", None)])
        if weights.variables is not None:
            params = plan.finalize(weights.variables).decode()
        if setup.batch_norm_batches:
            batches = task.train_batches(setup.seed)
            key = jax.random.split(jax.random.key(setup.seed))[1]
            state = reestimate_batch_norm(
                task.forward, params, state, batches, setup.batch_norm_batches, key, layout
            )
        found = make_evaluate(task.forward, layout)(params, state, task.eval_batches())
        results = {
            "split": images.held_out,
            "weights": weights.origin,
            "model": command.model,
            "data": command.data,
            "batch_norm_batches": setup.batch_norm_batches,
            **provenance(),
            **sizes(plan),
            "after": found._asdict(),
        }
        print_outcome(f"{self.which} state, split {images.held_out}", results)
        folder = self.out or (self.weights if run else None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            safe = "".join(c if c.isalnum() else "_" for c in images.held_out)
            file = folder / f"eval-{safe}-{self.which}.json"
            replace_text(file, json.dumps(results, indent=1) + "\n")
            print(f"results are in {file}")
