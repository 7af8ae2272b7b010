"""Models by registry name or from a user's own module, and what they are before any weights."""

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ssvq_jax.models.registry import (
    REGISTRY,
    InputRecipe,
    create,
    import_weights,
    unknown,
)
from ssvq_jax.models.tensor_files import load_tensors

_BATCH = 2  # images of a trial call: one could hide that a model mixes them


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A linen module that classifies images.

    Attributes:
        name: what it was asked for by.
        module: called with images ``[b, h, w, c]``, and with ``train=`` if its call takes that.
        variables: trained variables that came with it, ``{"params": ..., ...}``, or None.
    """

    name: str
    module: nn.Module
    variables: Mapping[str, Any] | None = None

    @property
    def inputs(self) -> InputRecipe | None:
        """How images are prepared for it, if it is one of the registry's that says so."""
        return REGISTRY[self.name].inputs if self.name in REGISTRY else None

    @property
    def image_size(self) -> int | None:
        """Height and width of the images it is made for, if it says so."""
        return getattr(getattr(self.module, "config", None), "image_size", None)

    @property
    def channels(self) -> int | None:
        """Channels of the images it is made for, if it says so."""
        return getattr(getattr(self.module, "config", None), "channels", None)

    def image_shape(
        self, image_size: int | None = None, channels: int | None = None
    ) -> tuple[int, int, int]:
        """Height, width and channels of its images.

        Args:
            image_size: height and width, if not those that it is made for.
            channels: channels, if it does not say; 3 by default.

        Raises:
            ValueError: if nobody says, or a size is out of range.
        """
        size = self.image_size if image_size is None else image_size
        channels = self.channels or (3 if channels is None else channels)
        if size is None or size < 1 or channels < 1:
            raise ValueError(
                f"images of size {size} with {channels} channels: give the --image-size and "
                f"--channels that model '{self.name}' takes"
            )
        return size, size, channels

    def init(self, key: Key[Array, ""], image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Initial variables: ``params``, and other collections if the model has them.

        Args:
            key: typed PRNG key.
            image_shape: ``(h, w, c)``.

        Raises:
            ValueError: if the model cannot be called with such images.
        """
        with self._calling(image_shape):
            # XLA leaves out the images and what is computed from them.
            init = jax.jit(
                lambda k: self.module.init(k, jnp.zeros((1, *image_shape)), **self._mode())
            )
            return dict(init(key))

    def outputs(self, image_shape: tuple[int, int, int]) -> int:
        """Number of its logits, without computing any.

        Raises:
            ValueError: as `init`, or if it does not return logits ``[b, classes]``.
        """
        with self._calling(image_shape):
            logits, _ = jax.eval_shape(
                lambda k, x: self.module.init_with_output(k, x, **self._mode()),
                jax.random.key(0),
                _trial(image_shape),
            )
        return self._classes(logits, "")

    def check_training(self, image_shape: tuple[int, int, int]) -> None:
        """Calls the model as a training step does, without computing anything.

        Raises:
            ValueError: if it cannot be called so, or returns other logits than in evaluation.
        """
        variables = self.shapes(image_shape)
        others = [name for name in variables if name != "params"]
        with self._calling(image_shape, " in training"):
            logits, _ = jax.eval_shape(
                lambda v, k, x: self.module.apply(
                    v, x, rngs={"dropout": k}, mutable=others, **self._mode(train=True)
                ),
                variables,
                jax.random.key(0),
                _trial(image_shape),
            )
        classes, usual = self._classes(logits, " in training"), self.outputs(image_shape)
        if classes != usual:
            raise ValueError(
                f"model '{self.name}' returns {classes} logits in training and {usual} in "
                "evaluation: return the same"
            )

    def _classes(self, logits: Any, when: str) -> int:
        """Number of logits of an image, once they are known to be some."""
        shape: Any = getattr(logits, "shape", None)
        dtype: Any = getattr(logits, "dtype", None)
        if (
            shape is None
            or len(shape) != 2
            or shape[0] != _BATCH
            or not jnp.issubdtype(dtype, jnp.floating)
        ):
            found = type(logits).__name__ if shape is None else f"{dtype}{list(shape)}"
            raise ValueError(
                f"model '{self.name}' returns {found} for {_BATCH} images{when}: return logits "
                "[b, classes]"
            )
        return shape[1]

    def import_weights(
        self, path: Path, image_shape: tuple[int, int, int], *, new_head: bool = False
    ) -> dict[str, Any]:
        """Reads weights of another implementation of a model of the registry.

        Args:
            path: a ``.pth`` or ``.safetensors`` file with that implementation's names.
            image_shape: ``(h, w, c)``.
            new_head: begin with an untrained classifier: for other classes.

        Returns:
            The variables.

        Raises:
            ValueError: if the file cannot be read, or does not fit.
        """
        if self.name not in REGISTRY:
            raise ValueError(
                f"{path} has weights of another framework, and model '{self.name}' is not of the "
                "registry: bring them into its own tree, and give a .safetensors file of that"
            )
        tensors = load_tensors(path)
        own = self.init(jax.random.key(0), image_shape) if new_head else self.shapes(image_shape)
        return import_weights(self.name, tensors, own, source=str(path), new_head=new_head)

    def _mode(self, *, train: bool = False) -> dict[str, Any]:
        """The argument ``train``, if the module's call takes it."""
        signature = inspect.signature(type(self.module).__call__)
        return {"train": train} if "train" in signature.parameters else {}

    @contextlib.contextmanager
    def _calling(self, image_shape: tuple[int, int, int], when: str = "") -> Iterator[None]:
        """Names the model in what its call raises."""
        try:
            yield
        except (Exception, SystemExit) as error:
            shape = ", ".join(map(str, image_shape))
            raise ValueError(
                f"model '{self.name}' cannot be called with images [b, {shape}]{when} "
                f"({_reason(error)}): give the image size it is made for, or check its call"
            ) from error

    def shapes(self, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Shapes of the variables, without computing any.

        Raises:
            ValueError: as `init`.
        """
        return jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))


def load_model(name: str, *, classes: int | None = None, scan: bool = False) -> LoadedModel:
    """Finds a model.

    Args:
        name: a key of the registry (``deit_tiny``), or ``module:function``: the function, called
            without arguments (or with ``classes`` if it takes that), returns a linen module, or a
            pair of module and trained variables. The module is looked for in the working folder
            and among what is installed.
        classes: number of classes, if not the model's own.
        scan: scan over stacked blocks; for models of the registry.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such model, or the function returns something else.

    Example:
        >>> load_model("deit_tiny").image_size
        224
    """
    if ":" not in name:
        if name not in REGISTRY:
            raise ValueError(f"{unknown(name)}, or give your own as module:function")
        task = REGISTRY[name].task
        if task != "classification":
            raise ValueError(
                f"model '{name}' is for {task}, and this needs one that classifies images"
                + (
                    ": `ssvq compress`, `finetune`, `eval`, `generate`, `plan` take language models"
                    if task == "language"
                    else ": use it through `ssvq_jax.models.create` in Python"
                )
            )
        return LoadedModel(name, create(name, num_classes=classes, scan=scan))
    if scan:
        raise ValueError(f"scan is for models of the registry; let '{name}' build its own scan")
    function = _find(name)
    try:
        takes_classes = "classes" in inspect.signature(function).parameters
        made = function(classes=classes) if takes_classes and classes is not None else function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"model '{name}': the function failed ({_reason(error)})") from error
    if isinstance(made, nn.Module):
        return LoadedModel(name, made)
    match made:
        case (nn.Module() as module, Mapping() as variables) if "params" in variables:
            return LoadedModel(name, module, variables)
    raise ValueError(
        f"model '{name}' gave a {type(made).__name__}: return a flax.linen Module, or "
        "(module, variables) with variables['params']"
    )


def _trial(image_shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    """Images of a trial call, which take no memory."""
    return jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.float32)


def _find(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # a console command does not look there by itself
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that exits when it is imported
        raise ValueError(
            f"model '{name}': the module '{module_name}' cannot be imported from {folder} or the "
            f"installed packages ({_reason(error)})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"model '{name}': {module_name} has no function '{function_name}'; it has {names}"
        )
    return function


def _reason(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"
