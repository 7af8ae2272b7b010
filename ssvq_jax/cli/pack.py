"""``ssvq pack``: a compressed run or packed file in another codec or dtype."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ssvq_jax.cli.options import BatchOptions, ModelOptions
from ssvq_jax.training.checkpoint import Which


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackCommand(BatchOptions, ModelOptions):
    """Write a compressed run, or a packed file once more, as one file: smaller, if you like.

    --weights is the folder of a run of compress, finetune or train, or a packed file. The model is
    judged on the evaluation split again, since another dtype rounds what stays dense; a file that
    does not say of which model it is, is packed as it is.
    """

    out: Path
    """File to write."""
    which: Which | None = None
    """Of a run: its last state (the default), or the one with the least validation loss."""
    dense_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What weights that are not compressed are stored in; by default their own dtype."""
    codec: Literal["plain", "entropy"] = "plain"
    """entropy codes each field by its frequencies, where that is smaller."""

    def run(self) -> None:
        """Packs."""
        from ssvq_jax.cli.packed import PACKED
        from ssvq_jax.cli.weights import run_config

        run = run_config(self.weights)
        told = run is None or run.get("model") is not None  # a model, or that there is none
        language = (run or {}).get("task") == "language"
        if language:
            self.check_unused({"weights", "out", "dense_dtype", "codec"}, "is for images")
        alone = language or not told
        if self.weights is not None and self.model is None and alone:
            self._tensors(self.weights / PACKED if self.weights.is_dir() else self.weights)
        else:
            self._model(run or {})

    def _tensors(self, file: Path) -> None:
        """Packs a file of which nothing says what model it is."""
        from ssvq_jax.cli.packed import file_size
        from ssvq_jax.packing import load, save

        used = {"weights", "out", "dense_dtype", "codec"}
        self.check_unused(used, f"is for a model, and {file} does not say which: give --model")
        with load(file) as stored:
            flat = {leaf.path: leaf for leaf in stored.plan.leaves}
        with load(file, like=flat) as stored:  # whatever the tree was
            packed, state = stored.read(), stored.state()
            told, metrics = stored.model, stored.metrics
        if self.dense_dtype is not None:
            packed = packed.plan.finalize(packed.variables(), dense_dtype=self.dense_dtype)
            metrics = {}  # they were of other weights
        self.out.parent.mkdir(parents=True, exist_ok=True)
        save(self.out, packed, codec=self.codec, state=state, model=told, metrics=metrics)
        size = file_size(self.out, packed.plan.bits().model.weights)
        print(
            f"{size['file_bytes']:,} bytes, {size['file_ratio']:.2f}x smaller than float32, "
            f"written to {self.out}"
        )

    def _model(self, run: dict[str, Any]) -> None:
        """Packs a model, and judges it."""
        from ssvq_jax.cli.packed import write_packed
        from ssvq_jax.cli.session import judged_state, sizes
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome
        from ssvq_jax.training.evaluation import make_evaluate
        from ssvq_jax.training.layout import local_layout

        if self.which is not None and (self.weights is None or not self.weights.is_dir()):
            raise ValueError(f"which={self.which} is for the folder of a run: leave it out")
        augment = run.get("augment", "none")
        setup = set_up(self, augment=augment, which=self.which or "last")
        weights, layout = setup.weights, local_layout(self.devices)
        task = make_task(setup.model, setup.images, setup.batch_size, devices=layout.devices)
        plan = weights.plan or make_plan(weights.params, [(".*", None)])
        variables = weights.variables or {"params": weights.params, "vq": {}, "vq_state": {}}
        packed = plan.finalize(variables, dense_dtype=self.dense_dtype)
        params = packed.decode()
        state = judged_state(setup, task, params, layout)
        found = make_evaluate(task.forward, layout)(params, state, task.eval_batches())
        told = {"split": setup.images.held_out, **found._asdict()}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        config = setup.config("pack") | setup.told
        size = write_packed(self.out, packed, state, config, told, self.codec)
        print_outcome("packed", {**sizes(plan), **size, "after": found._asdict()})
        print(f"written to {self.out}")
