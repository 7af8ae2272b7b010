"""PyTorch models to compare with: random weights that hide nothing, and one way to measure."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

WITHOUT_TORCH = "the reference is PyTorch's: install torch and transformers"
torch: Any = pytest.importorskip("torch", reason=WITHOUT_TORCH)


def _declare_operators() -> Any:
    # PyPI's torchvision beside a build of PyTorch for CPUs: its compiled operators do not load. It
    # asks for two of them while timm or transformers import it; no classifier calls them.
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_operators = _declare_operators()  # PyTorch forgets an operator with the library that declared it.


def reference(package: str) -> Any:
    """Imports timm or torchvision, or skips the test."""
    return pytest.importorskip(package, reason=f"{package} is not installed")


def randomised(model: Any, seed: int = 0) -> Any:
    """Replaces a model's weights, statistics and scales of layers by random ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.numel() > max(tensor.shape, default=1):  # more than one axis: a kernel, or tokens
            fan_in = tensor[0].numel() if tensor.shape[0] > 1 else 4
            value = noise / fan_in**0.5
        elif name.endswith(("bias", "running_mean", "token")):
            value = 0.2 * noise
        else:
            value = (1 + 0.2 * noise).abs()
        tensor.copy_(value)
    return model.eval()


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Lists a PyTorch model's weights as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def images_for(batch: int, height: int, width: int) -> jax.Array:
    """Draws images, NHWC."""
    return jax.random.normal(jax.random.key(0), (batch, height, width, 3))


def outputs_of(model: Any, images: jax.Array, *modules: Any) -> tuple[Any, list[np.ndarray]]:
    """Runs a PyTorch model; returns its output and its modules' first outputs, channels last."""
    found: list[np.ndarray] = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        first = first.detach()
        found.append((first.permute(0, 2, 3, 1) if first.ndim == 4 else first).numpy())

    handles = [module.register_forward_hook(record) for module in modules]
    with torch.no_grad():
        output = model(torch.tensor(np.transpose(images, (0, 3, 1, 2))))
    for handle in handles:
        handle.remove()
    return getattr(output, "logits", output), found


def shapes_of(model: Any, images: jax.Array) -> dict[str, Any]:
    """Shapes of a linen model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0), images)


def run(model: Any, variables: Any, images: jax.Array, **call: Any) -> tuple[Any, Any]:
    """Runs a linen model, compiled; returns its logits and what it sowed or updated."""
    mutable = ["intermediates", "batch_stats"]
    return jax.jit(lambda x: model.apply(variables, x, mutable=mutable, **call))(images)


def gradients(model: Any, variables: Any, images: jax.Array, **call: Any) -> Any:
    """Differentiates the probability of a class by the parameters."""

    def loss(params: Any) -> jax.Array:
        logits, _ = run(model, {**variables, "params": params}, images, **call)
        return jnp.sum(jax.nn.softmax(logits)[:, 0])

    return jax.jit(jax.grad(loss))(variables["params"])


def bfloat16_error(make: Any, images: jax.Array) -> float:
    """Compares a linen model with bfloat16 activations with itself in float32."""
    with jax.numpy_dtype_promotion("standard"):
        model = make(dtype=jnp.bfloat16)
        variables = jax.jit(model.init)(jax.random.key(0), images)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        logits, _ = run(model, variables, images)
        exact, _ = run(make(), variables, images)
    assert logits.dtype == jnp.float32
    return worst_error(logits, exact)


def worst_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
