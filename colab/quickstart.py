# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compress your own Flax model
#
# Train or bring a model, store the kernels in about 1.6 bits a weight instead of 32, fine-tune what
# is stored, and get the accuracy back. Works on CPU, GPU and TPU (Runtime → Change runtime type).
# When Colab cuts you off, run the cells again: training goes on where it was, to the bit.

# %% tags=["parameters"]
SOURCE = ""  # @param {type:"string"}
# ↑ where to install ssvq_jax from: "git+https://…" or a wheel; empty if it is installed.
FOLDER = ""  # @param {type:"string"}
# ↑ where to keep checkpoints; empty for your Google Drive on Colab, or "runs/notebook" elsewhere.
FLOAT_STEPS = 1500  # @param {type:"integer"}
STEPS = 1000  # @param {type:"integer"}

# %% [markdown]
# ## 1. Install
# A `jax` that the runtime brought, with its TPU or GPU parts, stays as it is if it is new enough.

# %%
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

FLOOR = (0, 9, 0)  # the oldest jax that ssvq_jax runs with


def pip_arguments(source: str, have: dict[str, str]) -> list[str]:
    """Keeps a jax that is new enough; replaces an older one together with its accelerator parts."""
    number = tuple(int(part) for part in have.get("jax", "0").split(".")[:3] if part.isdigit())
    if number >= FLOOR:
        kept = [f"{name}=={have[name]}" for name in ("jax", "jaxlib") if name in have]
        constraints = pathlib.Path(tempfile.mkdtemp()) / "constraints.txt"
        constraints.write_text("\n".join(kept), encoding="utf-8")
        return [source, "-c", str(constraints)]
    parts = {"libtpu": "tpu", "jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}
    extras = [extra for name, extra in parts.items() if name in have]
    return [source, f"jax[{','.join(extras)}]" if extras else "jax"]


on_colab = "google.colab" in sys.modules
if on_colab and not FOLDER:
    from google.colab import drive  # pyright: ignore[reportMissingImports]

    drive.mount("/content/drive")
if importlib.util.find_spec("ssvq_jax") is None:
    if not SOURCE:
        raise ValueError("set SOURCE above to the git URL (git+https://…) or wheel of ssvq_jax")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    install = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*install, *pip_arguments(SOURCE, installed)], check=True)
    importlib.invalidate_caches()
    for name in ("jax", "numpy"):
        if name in sys.modules and sys.modules[name].__version__ != importlib.metadata.version(
            name
        ):
            raise RuntimeError(f"{name} was replaced: restart the runtime, then run all cells")

# %%
import jax

print(f"jax {jax.__version__} on {jax.local_device_count()} x {jax.devices()[0].device_kind}")
folder = pathlib.Path(FOLDER or ("/content/drive/MyDrive/ssvq" if on_colab else "runs/notebook"))

# %% [markdown]
# ## 2. Data and model
# Here: 5,000 MNIST digits that come with the installation. `ImageData("cifar10", augment="cifar")`
# takes any classification set of TensorFlow Datasets, `ImageData("./folder", image_size=64)`
# your own images, a sub-folder for each class. The model is any `flax.linen` module.

# %%
import flax.linen as nn
import jax.numpy as jnp

import ssvq_jax as ssvq
from ssvq_jax.data import ImageData

digits = ImageData("mnist_digits_5k", augment="digits")


class Net(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images."""
        for i, features in enumerate((32, 64, 128)):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


model = Net()
variables = model.init(jax.random.key(0), jnp.zeros((1, *digits.image_shape("train"))))
params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}

# %% [markdown]
# ## 3. Train it (skip this if you bring weights)
# Everything is saved in `folder`: run the cell again after an interruption and it goes on.

# %%
from ssvq_jax.training.checkpoint import Checkpoints
from ssvq_jax.training.finetune import finetune
from ssvq_jax.training.layout import local_layout
from ssvq_jax.training.metrics import MetricsFile
from ssvq_jax.training.optimizer import OptimizerConfig
from ssvq_jax.training.run import RunOptions, Task
from ssvq_jax.training.step import linen_forward

layout = local_layout()  # all devices; they share each batch
batch = layout.devices * max(1, 64 // layout.devices)
task = Task(
    linen_forward(model),
    lambda seed: digits.train("train", batch, seed=seed),
    lambda: digits.evaluate("validation", 25 * layout.devices),
)


def run(name, plan, params, stats, steps, optimizer):  # noqa: ANN001, ANN201, D103
    where = folder / name
    where.mkdir(parents=True, exist_ok=True)
    with Checkpoints(where / "checkpoints") as checkpoints:
        return finetune(
            task,
            plan,
            params,
            key=jax.random.key(0),
            seed=0,
            steps=steps,
            optimizer=optimizer,
            name=name,
            model_state=stats,
            metrics=MetricsFile(where / "metrics.jsonl"),
            checkpoints=checkpoints,
            options=RunOptions(layout=layout, batch_norm_batches=20),
        )


nothing = ssvq.make_plan(params, [(".*", None)])
trained = run(
    "float", nothing, params, stats, FLOAT_STEPS, OptimizerConfig(dense=3e-3, freeze=None)
)
print(f"float model: {100 * trained.after.accuracy:.2f} % on validation data")

# %% [markdown]
# ## 4. Compress it
# Say what to do with which weights, look at what that stores, fine-tune.

# %%
plan = ssvq.make_plan(
    params,
    [
        ("conv0/kernel|head/kernel", ssvq.Uniform(bits=8)),  # small and sensitive: 8 bits
        ("conv./kernel", ssvq.SignSplit(codewords=16, dim=8)),  # codes, a sign a weight
        (".*", None),  # norms and biases stay
    ],
)
print(plan)
rates = OptimizerConfig(dense=1e-3, codebook=3e-3, sign=1e-3)
start = trained.packed.params, trained.state.model_state
small = run("ssvq", plan, *start, STEPS, rates)
stages = {"float": trained.after, "compressed": small.before, "fine-tuned": small.after}
print(", ".join(f"{name} {100 * found.accuracy:.2f} %" for name, found in stages.items()))

# %% [markdown]
# ## 5. Look at it

# %%
import IPython.display

from ssvq_jax.report import plot_accuracy, plot_signs

plot_accuracy({"float": trained.records, "ssvq": small.records}, folder / "accuracy.png")
plot_signs({"ssvq": small.records}, folder / "signs.png")
for name in ("accuracy.png", "signs.png"):
    IPython.display.display(IPython.display.Image(folder / name))

# %% [markdown]
# ## 6. Cut off? Go on
# Press stop in the middle of a training cell, or lose the runtime: the same cell, run again, goes
# on from the last checkpoint, and ends with the arrays of a run that was never stopped, to the bit.
# A finished run is read back; with other settings it says what differs, and wants another folder.
# `packed.decode()` gives plain parameters for any use.

# %%
again = run("ssvq", plan, *start, STEPS, rates)
weights = again.packed.decode()
same = jax.tree.map(lambda a, b: bool((a == b).all()), weights, small.packed.decode())
assert jax.tree.all(same)
image = jnp.zeros((1, *digits.image_shape("train")))
logits, _ = task.forward(weights, again.state.model_state, image, None)
print(f"{plan.bits().stored_bytes:,} bytes stored; logits {logits.shape}")

# %% [markdown]
# ## 7. Take it with you
# One file holds exactly those bits. Loaded, it gives the very weights; or they stay packed, and
# each is decoded where the model uses it.

# %%
from ssvq_jax.inference import packed_params, serve

file = folder / "model.safetensors"
ssvq.save(file, again.packed, codec="entropy", metrics=again.after._asdict())
with ssvq.load(file) as stored:
    print(f"{stored.file_bytes:,} bytes on disk, {stored.header_bytes:,} of them header")
    held = packed_params(stored.read())

classify = jax.jit(serve(lambda p, x: task.forward(p, again.state.model_state, x, None)[0]))
difference = abs(classify(held, image) - logits).max()
print(f"largest difference of a logit: {difference:.1e}")
assert difference < 1e-4
