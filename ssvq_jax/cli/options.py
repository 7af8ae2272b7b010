"""Options that several commands have."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

Self = TypeVar("Self", bound="ModelOptions")
Filled = TypeVar("Filled", bound="TrainingOptions")


# What a run that begins with another takes over from it, and what is taken if there is none.
INHERITED = frozenset(
    {"model", "classes", "scan", "data", "data_dir", "image_size", "normalization", "train_split"}
    | {"eval_split", "seed", "batch_size", "batch_norm_batches"}
)
_DEFAULTS = {"seed": 0, "batch_size": 64, "batch_norm_batches": 0, "normalization": "auto"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, with which weights, and which images."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_MODULE:FUNCTION")] = None
    """Model from the registry (deit_tiny), or module:function of your own code, which returns a
    flax.linen module, or (module, variables)."""
    weights: Path | None = None
    """Trained weights: the folder of a run, a .safetensors file (packed or plain), an orbax
    checkpoint or a msgpack file; of a language model also a GGUF file or a Hugging Face folder; by
    default those that the model comes with. What is left out here is then as in the run."""
    classes: int | None = None
    """Number of classes; by default the data set's."""
    new_head: bool = False
    """Leave the classifier of published weights aside, and begin with an untrained one: for other
    classes."""
    scan: bool | None = None
    """Stack the blocks of a registry's model for a scan."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_FOLDER")] = None
    """TensorFlow Datasets name (cifar10, imagenet2012, mnist_digits_5k, ...), or a folder of images
    with a sub-folder for each class."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets' sets are; by default its own folder."""
    image_size: int | None = None
    """Height and width to crop images to; by default the model's, else the data set's own."""
    normalization: str | None = None
    """Mean and deviation of the pixels: auto, mnist, cifar10, imagenet, half, lite or unit."""
    train_split: str | None = None
    """Split to train on; by default train, or its first nine tenths."""
    eval_split: str | None = None
    """Split to judge by; by default validation, or the last tenth of train. Keep the test split
    for `ssvq eval`."""
    workers: int = 0
    """Processes that load images; 0 for a thread. The batches are the same."""
    seed: int | None = None
    """Decides initial weights, clustering, and the order and augmentation of the data; by default
    0."""

    def inherit(self: Self, run: Mapping[str, Any] | None) -> Self:
        """Takes what was left out from the configuration of another run, else from `_DEFAULTS`."""
        inherited = {**_DEFAULTS, **{k: v for k, v in (run or {}).items() if k in INHERITED}}
        names = {field.name for field in dataclasses.fields(self)}
        values = {
            name: value
            for name, value in inherited.items()
            if name in names and getattr(self, name) is None and value is not None
        }
        if "data_dir" in values:
            values["data_dir"] = Path(values["data_dir"])
        return dataclasses.replace(self, **values)

    def check(self) -> None:
        """Raises ValueError for what is missing or out of range."""
        if self.model is None:
            raise ValueError(
                "no model: give --model NAME, --model module:function, or --weights with the "
                "folder of a run that has one"
            )
        self.check_seed()

    def check_seed(self) -> None:
        """Raises ValueError for a seed out of range."""
        if not 0 <= (self.seed or 0) < 2**31:
            raise ValueError(f"seed={self.seed}: give 0 to 2**31 - 1")

    def check_unused(self, used: Collection[str], why: str) -> None:
        """Raises ValueError for options other than ``used`` that are given."""
        for field in dataclasses.fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                raise ValueError(f"--{field.name.replace('_', '-')} {why}, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Training batches, for training or for batch statistics."""

    batch_size: int | None = None
    """Images a batch; by default that of the run in weights, else 64."""
    batch_norm_batches: int | None = None
    """Training batches over which batch statistics are re-estimated before every evaluation; by
    default as in the run in weights, else 0."""
    devices: int | None = None
    """How many of the local devices to use; by default all. They share each batch."""

    def check_batches(self) -> None:
        """Raises ValueError for what is out of range."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1")
        if self.batch_norm_batches is not None and self.batch_norm_batches < 0:
            raise ValueError(f"batch_norm_batches={self.batch_norm_batches}: give at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What a language model reads."""

    text: tuple[Path, ...] = ()
    """For a language model, what it is judged by: text files, or Wikipedia dumps (.xml, .bz2)."""
    window: int = 512
    """For a language model: tokens that it sees at a time."""
    windows: int | None = None
    """For a language model: windows to judge by; by default as many as there are, at most 16."""
    tokenizer: Path | None = None
    """For a language model: tokenizer.json, model folder or GGUF file; by default what lies with
    the weights, or with the published ones."""

    def check_images(self) -> None:
        """Raises ValueError for options that a model for images does not read."""
        for field in dataclasses.fields(TextOptions):
            if getattr(self, field.name) != field.default:
                raise ValueError(
                    f"--{field.name} is for language models, and this is none: leave it out, or "
                    "give --model smollm2_135m"
                )

    def check_windows(self) -> None:
        """Raises ValueError for windows of no text, or numbers out of range."""
        if not (self.text or getattr(self, "calibration_text", ())) and (
            self.window,
            self.windows,
        ) != (512, None):
            raise ValueError("--window and --windows are for --text: give that, too")
        if self.window < 2:
            raise ValueError(f"window={self.window}: give at least 2")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows={self.windows}: give at least 1")


TEXT_OPTIONS = frozenset(field.name for field in dataclasses.fields(TextOptions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where a run is kept."""

    out: Path
    """Folder for config.json, metrics.jsonl, results.json, pictures and checkpoints."""
    resume: bool = True
    """Go on with the run in the folder; --no-resume deletes it and starts over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(BatchOptions, FolderOptions):
    """How a training run is carried out."""

    augment: str | None = None
    """Augmentation of training images: none, digits, cifar, cifar-rand, imagenet,
    deit or cifar-deit."""
    label_smoothing: float | None = None
    """Share of the labels' probability that is spread over all classes."""
    average_decay: float | None = None
    """Judge and keep a moving average of the weights, e.g. 0.999: over about 1,000 updates."""
    validate_every: int | None = None
    """Steps between two validations; by default a tenth of the run. The best is kept."""
    save_seconds: float = 60.0
    """Least time between two checkpoints."""
    shard_state: bool = False
    """Cut parameters and optimizer state over the devices, too."""
    remat: bool = False
    """Compute again in the backward pass what is decoded, and, in the registry's models, the
    activations of blocks: less memory, more time."""

    def fill(self: Filled, values: Mapping[str, Any]) -> Filled:
        """Takes what was left out from ``values``."""
        left_out = {name: x for name, x in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **left_out)

    def check_training(self, steps: int) -> None:
        """Raises ValueError for what is out of range."""
        if steps < 1:
            raise ValueError(f"steps={steps}: give at least 1 (`ssvq compress` does not train)")
        if self.validate_every is not None and self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every}: give at least 1")
        if not self.save_seconds >= 0:
            raise ValueError(f"save_seconds={self.save_seconds}: give 0 or more")


def check_out(out: Path, *, folder: bool) -> None:
    """Checks that results can be written, before there are any.

    Args:
        out: what ``--out`` says.
        folder: whether it is to be a folder, else a file.

    Raises:
        ValueError: if something else is there, or it cannot be written to.
    """
    if folder and out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: give a folder")
    if not folder and out.is_dir():
        raise ValueError(f"out={out} is a folder: give a file")
    above = out if out.is_dir() else out.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"out={out} cannot be made, since {above} is a file: give another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"out={out} cannot be written, since {above} is read-only: give another")


def check_apart(out: Path, weights: Path | None) -> None:
    """Raises ValueError if what a run writes could replace the weights that it begins with."""
    if weights is not None:
        found = weights.resolve()
        if out.resolve() in (found, *found.parents):
            raise ValueError(f"out={out} is where the weights are: give another folder")


def to_json(command: Any, name: str, **changes: Any) -> dict[str, Any]:
    """A command's options as JSON values, for its run folder.

    Args:
        command: the record of options.
        name: the command's name.
        changes: what the options were resolved to.
    """
    text = TEXT_OPTIONS | {"eval_text"}  # say nothing of a model for images
    options = {key: x for key, x in dataclasses.asdict(command).items() if key not in text}
    config = {"command": name, **options, **changes}
    return {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
