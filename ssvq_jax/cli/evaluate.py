"""``ssvq eval``: the quality of a run's model on a split."""

import dataclasses
from pathlib import Path
from typing import Literal

from ssvq_jax.cli.options import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCommand(ModelOptions):
    """Evaluate a model: that of a run of train, compress or finetune, or your own weights.

    Model, data and image size are those of the run, unless you say otherwise.
    """

    split: str = "test"
    """Split to evaluate on."""
    which: Literal["last", "best"] = "last"
    """The run's last state, or the one with the least validation loss."""
    batch_norm_batches: int = 0
    """Training batches over which batch statistics are re-estimated first."""
    devices: int | None = None
    """How many of the local devices to use; by default all."""
    out: Path | None = None
    """Folder for the results; by default that of the run."""

    def run(self) -> None:
        """Evaluates; writes ``eval-SPLIT-WHICH.json``."""
        import json

        import jax

        from ssvq_jax.cli.session import sizes
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.cli.weights import run_config
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome, provenance
        from ssvq_jax.training.batch_norm import reestimate_batch_norm
        from ssvq_jax.training.layout import local_layout
        from ssvq_jax.training.metrics import replace_text
        from ssvq_jax.training.step import make_evaluate

        setup = set_up(dataclasses.replace(self, eval_split=self.split), which=self.which)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        layout = local_layout(self.devices)
        task = make_task(model, images, command.batch_size, devices=layout.devices)
        params, state = weights.params, weights.model_state
        plan = weights.plan or make_plan(params, [(".*", None)])
        if weights.variables is not None:
            params = plan.finalize(weights.variables).decode()
        if self.batch_norm_batches:
            batches = task.train_batches(command.seed)
            key = jax.random.key(command.seed)
            state = reestimate_batch_norm(
                task.forward, params, state, batches, self.batch_norm_batches, key
            )
        found = make_evaluate(task.forward, layout)(params, state, task.eval_batches())
        results = {
            "split": self.split,
            "weights": weights.origin,
            "model": command.model,
            "data": command.data,
            "batch_norm_batches": self.batch_norm_batches,
            **provenance(),
            **sizes(plan),
            "after": found._asdict(),
        }
        print_outcome(f"{self.which} state, split {self.split}", results)
        folder = self.out or (self.weights if run_config(self.weights) else None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            safe = "".join(c if c.isalnum() else "_" for c in self.split)
            file = folder / f"eval-{safe}-{self.which}.json"
            replace_text(file, json.dumps(results, indent=1) + "\n")
            print(f"results are in {file}")
