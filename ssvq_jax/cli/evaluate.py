"""``ssvq eval``: the quality of a run's model on a split."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ssvq_jax.cli.options import BatchOptions, ModelOptions, TextOptions
from ssvq_jax.training.checkpoint import Which


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCommand(BatchOptions, TextOptions, ModelOptions):
    """Evaluate a model: of a run of train, compress or finetune, a packed file, or your weights.

    Model, data and image size are those of the run or file, unless you say otherwise. With --images
    it classifies the images of a folder that is no data set, by the classes of the model. Language
    models are judged by --text.
    """

    packed: Path | None = None
    """A packed file: the same as --weights."""
    images: Path | None = None
    """Folder of images: in sub-folders called by class index, or one for each class in sorted
    order; or with --labels. Without labels, predictions are written."""
    labels: Path | None = None
    """Table file,label with class indices, for --images."""
    json: bool = False
    """Print the results as one line of JSON: of --images, top1, top5 and the number of images."""
    reference: Annotated[Path | None, tyro.conf.arg(metavar="WEIGHTS")] = None
    """Of a compressed language model: float weights whose likeliest tokens are compared with its
    own; by default those that it came from, where they are still to be found."""

    eval_split: Annotated[str | None, tyro.conf.arg(name="split")] = "test"
    """Split to evaluate on."""
    which: Which | None = None
    """Of a run: its last state (the default), or the one with the least validation loss."""
    out: Path | None = None
    """Folder for the results; by default that of the run."""

    def run(self) -> None:
        """Evaluates; writes ``eval-SPLIT-WHICH.json``."""
        from ssvq_jax.cli.language import is_language

        if self.packed is not None:
            if self.weights is not None:
                raise ValueError("--packed and --weights are the same: leave one out")
            dataclasses.replace(self, packed=None, weights=self.packed).run()
        elif is_language(self.model, self.weights):
            from ssvq_jax.cli.evaluate_language import evaluate_language

            evaluate_language(self)
        else:
            self.check_images()
            if self.reference is not None:
                raise ValueError("--reference is for language models: leave it out")
            self._judge()

    def _judge(self) -> None:
        """Judges a model by images."""
        if self.images is not None:
            self._images(self.images)
        elif self.labels is not None:
            raise ValueError("--labels is for --images: give that, too")
        else:
            self._split()

    def _images(self, folder: Path) -> None:
        """Classifies the images of a folder."""
        import json

        from ssvq_jax.atomic import replace_text
        from ssvq_jax.cli.evaluate_images import judge_images
        from ssvq_jax.cli.setup import open_model
        from ssvq_jax.cli.weights import open_weights, run_config

        if self.data is not None:
            raise ValueError("--images and --data: give one of them")
        told = run_config(self.weights) or {}
        command = self.inherit(told)
        model = open_model(command, told.get("outputs"))
        shape = told.get("image_shape")
        if shape is None or self.image_size is not None:
            shape = model.image_shape(command.image_size)
        height, width, channels = shape
        shape = height, width, channels
        weights = open_weights(
            command.weights, model, shape, self.which or "last", new_head=self.new_head
        )
        normalization = command.normalization or "auto"
        result, rows = judge_images(model, weights, folder, self.labels, shape, normalization)
        result |= {"model": command.model, "weights": weights.origin}
        out = self.out
        if out is None and "top1" not in result:
            out = Path("predictions")  # what nobody has judged is to be looked at
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**result, "predictions": rows}, indent=1)
            replace_text(out / "predictions.json", text + "\n")
        if self.json:
            print(json.dumps(result))
        elif "top1" in result:
            print(
                f"{result['images']:,} images: the class is the first for {result['top1']:.2%}, "
                f"among the first five for {result['top5']:.2%}"
            )
        if out is not None and not self.json:
            print(f"the first five classes of every image are in {out / 'predictions.json'}")

    def _split(self) -> None:
        """Evaluates on a split of a data set."""
        import json

        from ssvq_jax.atomic import replace_text
        from ssvq_jax.cli.packed import PACKED, file_size
        from ssvq_jax.cli.session import judged_state, sizes
        from ssvq_jax.cli.setup import make_task, set_up
        from ssvq_jax.cli.weights import run_config
        from ssvq_jax.packing import is_packed
        from ssvq_jax.plan import make_plan
        from ssvq_jax.report import print_outcome, provenance
        from ssvq_jax.training.evaluation import make_evaluate
        from ssvq_jax.training.layout import local_layout

        run = run_config(self.weights) or {}
        # Batch statistics are those of the run's training images, as it saw them.
        is_run = self.weights is not None and self.weights.is_dir() and bool(run)
        if self.which is not None and not is_run:
            raise ValueError(f"which={self.which} is for the folder of a run: leave it out")
        which = self.which or "last"
        setup = set_up(self, augment=run.get("augment", "none"), which=which)
        command, model, images, weights = setup.options, setup.model, setup.images, setup.weights
        layout = local_layout(self.devices)
        task = make_task(model, images, setup.batch_size, devices=layout.devices)
        params = weights.params
        plan = weights.plan or make_plan(params, [(".*", None)])
        if weights.variables is not None:
            params = plan.finalize(weights.variables).decode()
        state = judged_state(setup, task, params, layout)
        size = {}
        file = self.weights / PACKED if is_run and self.weights is not None else self.weights
        if which == "last" and file is not None and is_packed(file):
            size = file_size(file, plan.bits().model.weights)
        found = make_evaluate(task.forward, layout)(params, state, task.eval_batches())
        results = {
            "split": images.held_out,
            "weights": weights.origin,
            "model": command.model,
            "data": command.data,
            "batch_norm_batches": setup.batch_norm_batches,
            **provenance(),
            **sizes(plan),
            **size,
            "after": found._asdict(),
        }
        if self.json:
            print(json.dumps(results))
        else:
            name = f"{which} state" if is_run else "weights"
            print_outcome(f"{name}, split {images.held_out}", results)
        folder = self.out or (self.weights if is_run else None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            safe = "".join(c if c.isalnum() else "_" for c in images.held_out)
            file = folder / f"eval-{safe}-{which}.json"
            replace_text(file, json.dumps(results, indent=1) + "\n")
            if not self.json:
                print(f"results are in {file}")
