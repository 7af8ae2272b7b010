"""What commands work on: the model, its weights, its images."""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ssvq_jax.cli.options import (
    BatchOptions,
    FolderOptions,
    ModelOptions,
    TrainingOptions,
    check_apart,
    to_json,
)
from ssvq_jax.cli.weights import Weights, initial_weights, open_weights, run_config
from ssvq_jax.memory import free_bytes
from ssvq_jax.training.checkpoint import Which

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.data import ImageData
    from ssvq_jax.models import LoadedModel
    from ssvq_jax.training.run import Task

EVAL_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set as a command uses it.

    Attributes:
        source: the set.
        train: split to train on.
        held_out: split to judge by.
    """

    source: "ImageData"
    train: str
    held_out: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.source.class_names(self.train)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the set's files."""
        return self.source.fingerprint()

    @property
    def classes_crc32(self) -> str | None:
        """Checksum of the names, for packed files, which a list of 1,000 names would swell."""
        names = "\n".join(self.class_names)
        return f"{zlib.crc32(names.encode()):08x}" if names else None

    def check_run(self, run: Mapping[str, Any], weights: Any) -> None:
        """Compares the set with the one that a run was trained on.

        Warns if files differ, since results are then of other images.

        Args:
            run: configuration of the run, or what a packed file says of it.
            weights: the run or file, for messages.

        Raises:
            ValueError: if the classes are others, or in another order.
        """
        names, trained = list(self.class_names), run.get("class_names")
        same_sum = run.get("classes_crc32") in (None, self.classes_crc32)
        if trained not in (None, names) or not same_sum:
            others = "others" if trained is None else _listed(trained)
            raise ValueError(
                f"the classes of {self.source.name} are {_listed(names)}, and {weights} was "
                f"trained on {others}: give the data set of the run, or name the folders as they "
                "were"
            )
        same_set = run.get("data") == self.source.name
        trained_on = run.get("data_fingerprint") if same_set else None
        if trained_on not in (None, self.fingerprint):
            warnings.warn(
                f"the files of {self.source.name} are not those that {weights} was trained on: "
                "some were added, removed or changed",
                stacklevel=2,
            )


OptionsT = TypeVar("OptionsT", bound=ModelOptions)


@dataclasses.dataclass(frozen=True)
class Setup(Generic[OptionsT]):
    """What a command works on.

    Attributes:
        options: the command's, with what the run in ``weights`` says filled in.
        images: the data.
        model: the model.
        weights: where to begin.
        image_shape: of the images that the model gets, ``(h, w, c)``.
        outputs: number of the model's logits.
    """

    options: OptionsT
    images: Images
    model: "LoadedModel"
    weights: Weights
    image_shape: tuple[int, int, int]
    outputs: int

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.options.seed or 0

    @property
    def batch_size(self) -> int:
        """Images of a training batch."""
        return getattr(self.options, "batch_size", None) or 1

    @property
    def batch_norm_batches(self) -> int:
        """Batches over which batch statistics are re-estimated."""
        return getattr(self.options, "batch_norm_batches", None) or 0

    @property
    def splits(self) -> dict[str, Any]:
        """What is trained on and judged by, for results."""
        return {"train_split": self.images.train, "eval_split": self.images.held_out}

    @property
    def blocks(self) -> bool:
        """Whether the model has blocks whose activations can be computed again."""
        return has_blocks(self.model)

    def task(self, devices: int = 1, *, remat: bool = False, features: str | None = None) -> "Task":
        """The model with its data; see `make_task`."""
        return make_task(
            self.model,
            self.images,
            self.batch_size,
            devices=devices,
            remat=remat,
            features=features,
        )

    @property
    def told(self) -> dict[str, Any]:
        """What a packed file needs to be exported by itself."""
        return {
            "image_shape": list(self.image_shape),
            "outputs": self.outputs,
            "classes_crc32": self.images.classes_crc32,
            "data_fingerprint": self.images.fingerprint,
        }

    def config(self, command: str, **changes: Any) -> dict[str, Any]:
        """What the run was asked for, and what that came to, for its folder."""
        return to_json(
            self.options,
            command,
            weights=self.weights.origin,
            train_split=self.images.train,
            eval_split=self.images.held_out,
            class_names=list(self.images.class_names),
            data_fingerprint=self.images.fingerprint,
            **changes,
        )


def set_up(
    options: OptionsT,
    *,
    augment: str | None = None,
    which: Which = "last",
    initial: bool = False,
    compressed: bool = True,
) -> Setup[OptionsT]:
    """Opens a command's model, weights and images.

    Args:
        options: the command's.
        augment: augmentation of training images; none by default.
        which: checkpoint of the run in ``weights``.
        initial: begin with random weights where there are no others.
        compressed: take the weights of a compressed run, too.

    Raises:
        ValueError: for what is missing or does not fit.
    """
    run, other_data = run_config(options.weights), options.data is not None
    options = options.inherit(run)
    options.check()
    if isinstance(options, BatchOptions):
        options.check_batches()
    if isinstance(options, FolderOptions):
        check_apart(options.out, options.weights)
    images = open_images(options, open_model(options, None), augment or "none")
    if run is not None and not (other_data and isinstance(options, TrainingOptions)):
        images.check_run(run, options.weights)  # only training may change what classes mean
    classes = images.source.num_classes(images.train)
    model = open_model(options, classes)
    shape = images.source.image_shape(images.train)
    outputs = model.outputs(shape)
    if outputs < classes or options.classes not in (None, outputs):
        names = _listed(images.class_names)
        listed = f"{options.data} has {classes}" + (f": {names}" if names else " classes")
        if options.classes is not None and options.classes < classes:
            raise ValueError(f"--classes {options.classes}, but {listed}; leave --classes out")
        wanted = listed if options.classes is None else f"--classes is {options.classes}"
        raise ValueError(
            f"model '{model.name}' gives {outputs} logits, but {wanted}; let its function take "
            "classes, or return a model for so many"
        )
    check_memory(model, shape, max(getattr(options, "batch_size", None) or 1, EVAL_BATCH))
    if initial and options.weights is None and model.variables is None:
        weights = initial_weights(model, shape, options.seed or 0)
    else:
        weights = open_weights(options.weights, model, shape, which, new_head=options.new_head)
    if weights.plan is not None and not compressed:
        raise ValueError(
            f"{options.weights} is compressed already: give float weights, or go on with "
            "`ssvq finetune`"
        )
    return Setup(options, images, model, weights, shape, outputs)


def open_images(options: ModelOptions, model: "LoadedModel", augment: str = "none") -> Images:
    """Opens the data set of a command.

    Args:
        options: the command's.
        model: may say which images it takes.
        augment: name of the augmentation of training images.

    Raises:
        ValueError: if there is no such set or split, or a run would be judged by images that it
            trains on.
    """
    from ssvq_jax.data import ImageData

    if options.data is None:
        raise ValueError(
            "no data: give --data with a TensorFlow Datasets name (mnist_digits_5k comes with the "
            "installation) or a folder of images"
        )
    normalization, inputs = options.normalization or "auto", model.inputs
    if inputs is not None and normalization == "auto":
        normalization = inputs.normalization
    source = ImageData(
        name=options.data,
        data_dir=options.data_dir,
        image_size=model.image_size if options.image_size is None else options.image_size,
        augment=augment,
        normalization=normalization,
        workers=options.workers,
        channels=model.channels or 3,
        **{} if inputs is None else inputs.resizing,
    )
    train, held_out = options.train_split, options.eval_split
    if train is None or held_out is None:
        validation = "validation" in source.splits()
        train = train or ("train" if validation or held_out else "train[:90%]")
        held_out = held_out or ("validation" if validation else "train[90%:]")
    source.open(train)  # what is not there is missed before any work
    source.open(held_out)
    if isinstance(options, FolderOptions) and source.overlap(train, held_out):
        raise ValueError(
            f"train_split={train} and eval_split={held_out} have images in common: give others, "
            "e.g. train[:90%] and train[90%:]"
        )
    return Images(source, train, held_out)


def _listed(names: Sequence[str], most: int = 10) -> str:
    """Names of classes, the first of many."""
    more = f", … ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_memory(model: "LoadedModel", image_shape: tuple[int, int, int], batch: int) -> None:
    """Estimates what weights and a batch of images take, before any of it is there.

    Raises:
        ValueError: if that is more than the memory that is free.
    """
    import jax

    leaves = jax.tree.leaves(model.shapes(image_shape))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    needed, free = weights + 4 * batch * math.prod(image_shape), free_bytes()
    if free is not None and needed > free:
        height, width, _ = image_shape
        raise ValueError(
            f"{batch} images of {height} x {width} and the weights of model '{model.name}' take "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free: give a smaller "
            "--image-size or --batch-size"
        )


def open_model(options: ModelOptions, classes: int | None) -> "LoadedModel":
    """Finds the model of a command; ``classes`` are the data set's."""
    from ssvq_jax.models import load_model

    if options.model is None:
        raise ValueError("no model: give --model")
    classes = options.classes if options.classes is not None else classes
    return load_model(options.model, classes=classes, scan=bool(options.scan))


def make_task(
    model: "LoadedModel",
    images: Images,
    batch_size: int,
    *,
    devices: int = 1,
    remat: bool = False,
    features: str | None = None,
) -> "Task":
    """The model with its data; batches for evaluation are such that the devices divide them."""
    from ssvq_jax.models.vit import Block
    from ssvq_jax.training.run import Task
    from ssvq_jax.training.step import linen_forward

    blocks = Block if remat and has_blocks(model) else None
    source = images.source
    return Task(
        linen_forward(model.module, remat=blocks, features=features),
        lambda seed: source.train(images.train, batch_size, seed=seed),
        lambda: source.evaluate(images.held_out, round_up(EVAL_BATCH, devices)),
    )


def has_blocks(model: "LoadedModel") -> bool:
    """Whether a model has blocks whose activations can be computed again."""
    from ssvq_jax.models import ViT

    return isinstance(model.module, ViT)


def round_up(number: int, divisor: int) -> int:
    """The least multiple of ``divisor`` that is not below ``number``."""
    return -(-number // divisor) * divisor
