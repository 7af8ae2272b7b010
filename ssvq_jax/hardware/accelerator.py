"""Accelerators as records: numbers that can be traced, and choices that cannot."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.core import Tracer

from ssvq_jax.hardware.checks import LARGEST, check_keys

Dataflow = Literal["ws", "is", "os", "ews"]
Overlap = Literal["ideal", "one_ahead", "serial"]
Activations = Literal["automatic", "on_chip", "spilled"]
Weights = Literal["automatic", "streamed", "resident"]
PartialSums = Literal["on_chip", "spilled"]

_CHOICES: dict[str, Any] = {
    "dataflow": Dataflow,
    "overlap": Overlap,
    "activations": Activations,
    "weights": Weights,
    "partial_sums": PartialSums,
}
_FLAGS = ("overlapped_load", "as_scalesim")
# Whole numbers of at least 1, unlike rates and energies.
_WHOLE = (
    "rows",
    "columns",
    "pe_rows",
    "pe_columns",
    "arrays",
    "operand_bits",
    "accumulator_bits",
    "input_sram_bytes",
    "weight_sram_bytes",
    "output_sram_bytes",
)
_POSITIVE = ("clock_hz", "dram_bytes_per_s", "lookups_per_cycle")
_NOT_NEGATIVE = ("vector_ops_per_cycle", "mac_pj", "vector_op_pj", "dram_pj_per_bit")
NUMBERS = (*_WHOLE, *_POSITIVE, *_NOT_NEGATIVE)
_NEEDED = ("name", "rows", "columns", "dataflow", "clock_hz", "dram_bytes_per_s")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(NUMBERS),
    meta_fields=["name", "source", *_CHOICES, *_FLAGS],
)
@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A systolic array, its buffers and its memory: a pytree, over whose numbers `jax.vmap` runs.

    Numbers are operands' (weights and activations have ``operand_bits`` in the array, whatever they
    are stored in), cycles those of ``clock_hz``.

    Attributes:
        name: for tables.
        rows: R, processing elements (PEs) along an array's first axis.
        columns: C, PEs along the second.
        dataflow: what stays in the PEs: weights (``ws``), inputs (``is``), outputs (``os``), or
            several weights a PE (``ews``, enhanced weight stationary).
        pe_rows: c, weights a PE holds along the rows; 1 but for ``ews``.
        pe_columns: d, weights a PE holds along the columns; 1 but for ``ews``.
        arrays: equal arrays, which share the folds of a product.
        overlapped_load: a PE takes its next weights while it multiplies by the present ones.
        clock_hz: cycles a second.
        operand_bits: precision of the multipliers, and so of activations on chip and off.
        accumulator_bits: of a partial sum.
        input_sram_bytes: buffer of inputs; half of it is filled while the other is used.
        weight_sram_bytes: buffer of weights, as they are stored: the decoder lies behind it.
        output_sram_bytes: buffer of outputs.
        dram_bytes_per_s: bandwidth of the memory behind the buffers.
        lookups_per_cycle: P, what the decoder can look up (rows of a codebook) or work off.
        vector_ops_per_cycle: operations outside of products a cycle; 0 if they shall take no time.
        overlap: what waits for what. ``ideal``: transfers of the whole network run ahead.
            ``one_ahead``: the weights of a layer come while the layer before it computes.
            ``serial``: a layer's transfers come first, then it computes.
        activations: ``on_chip`` between layers, whether they fit or not; ``spilled`` to DRAM;
            ``automatic``: spilled where they do not fit both buffers that they pass.
        weights: ``streamed`` from DRAM in every call; ``resident`` in the buffer, whether they fit
            or not; ``automatic``: resident if all weights of the network fit.
        partial_sums: ``on_chip``, or ``spilled`` to DRAM between folds.
        mac_pj: energy of a multiplication and its addition.
        vector_op_pj: energy of an operation outside of products.
        dram_pj_per_bit: energy of the memory behind the buffers.
        source: where the figures are from.
        as_scalesim: count as the simulator SCALE-Sim 3.0.0 does: cycles from 0, the drain of ``os``
            as writes, partial sums that are written and never read.
    """

    name: str
    rows: Any
    columns: Any
    dataflow: Dataflow = "ws"
    pe_rows: Any = 1
    pe_columns: Any = 1
    arrays: Any = 1
    overlapped_load: bool = False
    clock_hz: Any = 1e9
    operand_bits: Any = 8
    accumulator_bits: Any = 32
    input_sram_bytes: Any = 256 * 1024
    weight_sram_bytes: Any = 256 * 1024
    output_sram_bytes: Any = 256 * 1024
    dram_bytes_per_s: Any = 4e9
    lookups_per_cycle: Any = 8
    vector_ops_per_cycle: Any = 0
    overlap: Overlap = "ideal"
    activations: Activations = "automatic"
    weights: Weights = "automatic"
    partial_sums: PartialSums = "on_chip"
    mac_pj: Any = 0.3  # int8 multiplication 0.2 and 32-bit addition 0.1: Horowitz, ISSCC 2014
    vector_op_pj: Any = 0.4  # 16-bit floating-point addition, likewise
    dram_pj_per_bit: Any = 8.0  # LPDDR4; published are 4 to 14
    source: str = ""
    as_scalesim: bool = False

    def check(self) -> None:
        """Raises ValueError, naming the value, for one that is out of range; traced ones pass."""
        owner = f"accelerator '{self.name}'"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{owner}: {name}={getattr(self, name)!r}: choose one of {get_args(choices)}"
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{owner}: {name}={getattr(self, name)!r}: give True or False")
        for name in NUMBERS:
            _check_number(owner, name, getattr(self, name))
        if self.dataflow != "ews":
            for name in ("pe_rows", "pe_columns"):
                value = getattr(self, name)
                if not isinstance(value, Tracer) and np.any(np.asarray(value) != 1):
                    raise ValueError(
                        f"{owner}: {name}={value} is for dataflow='ews', this one is "
                        f"'{self.dataflow}'"
                    )
        if self.dataflow == "os" and self.overlapped_load:
            raise ValueError(f"{owner}: overlapped_load is for dataflows that load the array")

    def to_json(self) -> dict[str, Any]:
        """Writes it as plain data; keys carry the units.

        Returns:
            Fields and their values.

        Raises:
            ValueError: if a number is an array (a sweep is no single accelerator).
        """
        self.check()
        data = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in NUMBERS:
                if np.ndim(value):
                    raise ValueError(
                        f"accelerator '{self.name}': {field.name} has {np.size(value)} values: "
                        "only a single accelerator can be written"
                    )
                value = np.asarray(value).item()
            data[field.name] = value
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Accelerator":
        """Reads it from plain data.

        Args:
            data: fields and their values.

        Returns:
            The accelerator.

        Raises:
            ValueError: for a missing or unknown key, one without its unit, or a value out of range.

        Example:
            >>> data = {"name": "mine", "rows": 8, "columns": 8, "dataflow": "os", "clock_hz": 5e8}
            >>> Accelerator.from_json(data)
            Traceback (most recent call last):
            ...
            ValueError: accelerator 'mine': the keys ['dram_bytes_per_s'] are missing
        """
        known = {field.name for field in dataclasses.fields(Accelerator)}
        name = data.get("name", "?") if isinstance(data, Mapping) else "?"
        check_keys(f"accelerator '{name}'", data, needs=_NEEDED, knows=known)
        for key in ("name", "source"):
            if not isinstance(data.get(key, ""), str):
                raise ValueError(f"accelerator: {key}={data[key]!r}: give text")
        for key in NUMBERS:
            value = data.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"accelerator '{name}': {key}={value!r}: give a number")
            if key in _WHOLE and isinstance(value, float) and value % 1 > 0:
                raise ValueError(f"accelerator '{name}': {key}={value}: give a whole number")
        accelerator = Accelerator(**data)
        accelerator.check()
        return accelerator


def _check_number(owner: str, name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        return
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.asarray(np.nan)
    if isinstance(value, str | bool) or not np.all(np.isfinite(numbers)):
        raise ValueError(f"{owner}: {name}={value!r}: give a number")
    # Whole for what is counted, but a sweep or a gradient may pass between.
    low = 1.0 if name in _WHOLE else np.nextafter(0.0, 1.0) if name in _POSITIVE else 0.0
    if np.any(numbers < low) or np.any(numbers > LARGEST):
        bound = {1.0: "at least 1", 0.0: "0 or more"}.get(low, "more than 0")
        raise ValueError(f"{owner}: {name}={value}: give {bound}, and at most 2^53")
