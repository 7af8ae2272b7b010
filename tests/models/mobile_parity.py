"""A Flax model of this family beside a PyTorch reference: the same weights, images and modes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from references import tensors_of, torch, worst_error


def shapes_of(model):
    """Shapes of a Flax model's variables."""
    images = jnp.zeros((1, 64, 64, model.config.channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)


def imported(convert, reference: Any, model):
    """The reference's weights as the model's variables."""
    return convert(tensors_of(reference), shapes_of(model), model.config, source="the reference")


def forward(model, variables, images: np.ndarray, train: bool = False):
    """The model's output, and its intermediates."""

    @jax.jit
    def run(variables, images):
        mutable = ["batch_stats", "intermediates"]
        return model.apply(variables, images, train=train, mutable=mutable)

    output, changed = run(variables, images)
    return output, changed["intermediates"]


def drawn(model):
    """Random variables, without compiling the model's own initialization."""
    draw = np.random.default_rng(0)

    def leaf(shape):
        fan_in = np.prod(shape.shape[:-1])
        return draw.uniform(0.2, 1.0, shape.shape).astype("float32") / np.float32(fan_in**0.5)

    return jax.tree.map(leaf, shapes_of(model))


def count(shapes) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def images_of(height: int, width: int, batch: int = 2) -> np.ndarray:
    """Random normalised images, NHWC."""
    return np.random.default_rng(1).normal(size=(batch, height, width, 3)).astype("float32")


def run_torch(model: Any, images: np.ndarray, train: bool = False, **options):
    """The reference's output; its running statistics stay."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        output = model.train(train)(nchw(images), **options)
    model.load_state_dict(before)
    return output


def nchw(images: np.ndarray) -> Any:
    """Images as PyTorch wants them."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def error(ours, theirs: Any) -> float:
    """Largest difference over the largest value; feature maps are of NHWC and NCHW."""
    expected = theirs.detach().numpy()
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    return worst_error(ours, expected)
