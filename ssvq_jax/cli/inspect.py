"""``ssvq inspect``: what a packed file holds."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.packing import PackedFile


@dataclasses.dataclass(frozen=True)
class InspectCommand:
    """Show what a packed file holds, leaf by leaf, and check every byte of it.

    With the float weights as a reference, the error of every leaf too.
    """

    file: tyro.conf.Positional[Path]
    """Packed .safetensors file."""
    reference: Annotated[Path | None, tyro.conf.arg(metavar="WEIGHTS")] = None
    """Float weights to compare with: the folder of a run, a .safetensors or msgpack file, or an
    orbax checkpoint."""
    out: Path | None = None
    """Write everything as JSON to this file."""

    def run(self) -> None:
        """Prints the table."""
        import json

        from ssvq_jax.atomic import replace_text
        from ssvq_jax.cli.packed import file_size
        from ssvq_jax.packing import load
        from ssvq_jax.report import print_inspection

        for given in (self.file, self.reference):
            if self.out is not None and given is not None and self.out.resolve() == given.resolve():
                raise ValueError(f"out={self.out} holds weights: give another file")
        with load(self.file) as file:
            file.verify()
            errors = _errors(file, self.reference) if self.reference is not None else {}
            bits = file.bits()
            found = {
                "file": str(self.file),
                **file_size(self.file, bits.model.weights),
                "header_bytes": file.header_bytes,
                "state_bytes": file.file_bytes - file.header_bytes - bits.stored_bytes,
                "plain_bytes": file.plain_bytes(),
                "model": file.model,
                "metrics": file.metrics,
                "plan": file.plan.to_json(),
                "leaves": [
                    {
                        **dataclasses.asdict(row),
                        "bits_per_weight": row.bits_per_weight,
                        "coded": file.coded(row.name),
                        "error": _finite(errors.get(row.name)),
                    }
                    for row in bits.rows
                ],
            }
            print_inspection(found, bits, errors)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.out, json.dumps(found, indent=1) + "\n")
            print(f"written to {self.out}")


def _finite(error: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return error if error is not None and math.isfinite(error) else None


def _errors(file: "PackedFile", reference: Path) -> dict[str, float]:
    """Squared error of every row over the squares of its weights."""
    import numpy as np

    from ssvq_jax.analysis import weight_error
    from ssvq_jax.cli.packed import PACKED
    from ssvq_jax.models import is_tensors, load_tensors, load_weights
    from ssvq_jax.packing import is_packed, load
    from ssvq_jax.tree import leaves_by_path

    if reference.is_dir() and (reference / PACKED).exists():
        reference = reference / PACKED  # the folder of a run
    if is_packed(reference):
        with load(reference) as other:
            weights = dict(other.leaves())
    else:
        # Under their names as they are, or as a model's parameters.
        weights = load_tensors(reference) if is_tensors(reference) else {}
        if not {leaf.path for leaf in file.plan.leaves} <= set(weights):
            weights = leaves_by_path(load_weights(reference)["params"])
    decoded = dict(file.leaves())

    def both(path: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
        if path not in weights or np.shape(weights[path]) != shape:
            raise ValueError(
                f"reference {reference} has no leaf '{path}' of shape {list(shape)}: give the "
                "float weights of this model"
            )
        pair = weights[path], decoded[path]
        first, second = (np.asarray(x).astype(np.float64).reshape(-1) for x in pair)
        return first, second

    rows = {entry.name: entry.leaves for entry in file.plan.entries}
    rows |= {
        leaf.path: (leaf,) for leaf in file.plan.leaves if leaf.path not in file.plan.compressed
    }
    errors = {}
    for name, leaves in rows.items():
        pairs = [both(leaf.path, leaf.shape) for leaf in leaves]
        weight, ours = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        error = weight_error(weight, ours).relative
        if error is None:  # the reference is zero: so is a right leaf
            error = 0.0 if not np.any(ours) else float("inf")
        errors[name] = error
    return errors
