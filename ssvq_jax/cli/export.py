"""``ssvq export``: a packed file as plain weights, or as a program that runs by itself."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.packing import PackedFile

Kind = Literal["safetensors", "npz", "stablehlo"]


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Write a packed file as plain weights, or as a program with the packed weights inside.

    The program runs wherever JAX does, without ssvq_jax:
    `jax.export.deserialize(bytearray(open(FILE, "rb").read())).call(images)`.
    """

    file: tyro.conf.Positional[Path]
    """Packed .safetensors file."""
    to: Kind
    """Plain weights under the names of the model's leaves (safetensors, npz), or a program."""
    out: Path
    """File to write."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_MODULE:FUNCTION")] = None
    """For a program: the model, if the file does not say."""
    image_size: int | None = None
    """For a program: height and width of the images, if neither file nor model say."""
    channels: int | None = None
    """For a program: channels of the images, if the model does not say; 3 by default."""
    batch_size: int | None = None
    """For a program: images a call; by default any number."""
    classes: int | None = None
    """For a program: number of classes, if the file does not say."""
    platforms: tuple[str, ...] | None = None
    """For a program: what it is to run on; by default cpu, cuda and tpu."""

    def run(self) -> None:
        """Exports."""
        from ssvq_jax.atomic import replace_file
        from ssvq_jax.packing import load

        if self.out.resolve() == self.file.resolve():
            raise ValueError(f"out={self.out} is the packed file: give another")
        for name in ("model", "image_size", "channels", "batch_size", "classes", "platforms"):
            if self.to != "stablehlo" and getattr(self, name) is not None:
                raise ValueError(f"{name}: plain weights need none; leave it out")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with load(self.file) as file:
            if self.to == "stablehlo":
                program = self._program(file)
                replace_file(self.out, lambda new: new.write_bytes(program))
            else:
                _write_weights(file, self.out, self.to)
        print(f"{self.out.stat().st_size:,} bytes written to {self.out}")

    def _program(self, file: "PackedFile") -> bytes:
        import jax
        import jax.numpy as jnp
        from jax import export

        from ssvq_jax.inference import export_program
        from ssvq_jax.inference.export import check_platforms
        from ssvq_jax.models import load_model
        from ssvq_jax.training.step import linen_forward

        platforms = self.platforms or ("cpu", "cuda", "tpu")
        check_platforms(platforms)
        told = file.model
        name = self.model or told.get("model")
        if name is None:
            raise ValueError(f"{self.file} does not say of which model it is: give --model")
        classes = self.classes or told.get("outputs") or told.get("classes")
        model = load_model(name, classes=classes, scan=bool(told.get("scan")))
        height, width, channels = told.get("image_shape") or (
            *(model.image_size, model.image_size),
            model.channels or 3,
        )
        if self.image_size is not None:
            height = width = self.image_size
        channels = self.channels or channels
        if height is None or width is None or height < 1 or channels < 1:
            raise ValueError(
                f"images {height} x {width} x {channels}: give the --image-size and --channels of "
                f"model '{name}'"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1")
        shapes = model.shapes((height, width, channels))
        file.check_fits(shapes["params"])
        state = jax.tree.map(jnp.asarray, file.state() or {})
        forward = linen_forward(model.module)
        batch: Any = self.batch_size
        if batch is None:
            (batch,) = export.symbolic_shape("batch")
        images = jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32)
        try:
            return export_program(
                lambda params, images: forward(params, state, images, None)[0],
                file.read(),
                images,
                platforms=platforms,
            )
        except Exception as error:
            if self.batch_size is not None:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"model '{name}' cannot be exported for any number of images ({reason}): give "
                "--batch-size"
            ) from error


def _write_weights(file: "PackedFile", out: Path, kind: Kind) -> None:
    """Writes decoded weights under the names of their leaves."""
    import zipfile

    import numpy as np
    from safetensors.numpy import save_file

    from ssvq_jax.atomic import replace_file
    from ssvq_jax.tree import leaves_by_path

    named = {path: np.asarray(leaf) for path, leaf in file.leaves()}
    state = {name: np.asarray(leaf) for name, leaf in leaves_by_path(file.state()).items()}
    if state and file.model:  # as the model's variables
        named = {f"params/{name}": leaf for name, leaf in named.items()}
    if named.keys() & state.keys():
        raise ValueError(f"parameters and state both have {sorted(named.keys() & state.keys())}")
    named |= state
    if kind == "safetensors":
        replace_file(out, lambda new: save_file(named, new))
        return
    for name, leaf in named.items():
        if leaf.dtype.kind not in "fiub":
            raise ValueError(f"leaf '{name}' is of dtype {leaf.dtype}, which npz cannot hold")

    def write(new: Path) -> None:
        with zipfile.ZipFile(new, "w") as archive:  # np.savez takes no leaf called "file"
            for name, leaf in named.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, leaf, allow_pickle=False)

    replace_file(out, write)
