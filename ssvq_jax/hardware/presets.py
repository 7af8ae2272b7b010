"""Accelerators by name, and from files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssvq_jax.atomic import replace_text
from ssvq_jax.hardware.accelerator import Accelerator
from ssvq_jax.json_files import read_json, read_text

_MIB = 1024 * 1024
_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")

presets: Mapping[str, Accelerator] = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "edge-ews-64",
            64,
            64,
            "ews",
            pe_rows=2,
            pe_columns=2,
            overlapped_load=True,
            clock_hz=1e9,
            dram_bytes_per_s=4e9,
            lookups_per_cycle=4,
            vector_ops_per_cycle=256,
            weights="streamed",
            source=(
                "Ours: an edge chip of the kind that arXiv 2503.08668 simulates, whose array, "
                "bandwidth and overlap are not published. 4 bytes a cycle from LPDDR4."
            ),
        ),
        Accelerator(
            "ethos-u55-256",
            16,
            16,
            "os",
            clock_hz=5e8,
            dram_bytes_per_s=5e8,
            input_sram_bytes=2 * _MIB,
            output_sram_bytes=2 * _MIB,
            weight_sram_bytes=256 * 1024,
            lookups_per_cycle=16,
            weights="streamed",
            source=(
                "256 MACs a cycle at 500 MHz, weights in flash at 0.5 GB/s: the configuration "
                "'high end embedded' of Arm's compiler Vela. The unit is no systolic array, "
                "and compresses weights in a way of its own: this is one like it, with a decoder."
            ),
        ),
        Accelerator(
            "ethos-u65-512",
            16,
            32,
            "os",
            clock_hz=1e9,
            dram_bytes_per_s=3.75e9,
            input_sram_bytes=1 * _MIB,
            output_sram_bytes=1 * _MIB,
            weight_sram_bytes=256 * 1024,
            lookups_per_cycle=16,
            weights="streamed",
            source=(
                "512 MACs a cycle at 1 GHz, weights in DRAM at 3.75 GB/s: the configuration 'high "
                "end' of Arm's compiler Vela. No systolic array either; see ethos-u55-256."
            ),
        ),
        Accelerator(
            "tpu-v5e",
            128,
            128,
            "ws",
            arrays=8,
            overlapped_load=True,
            clock_hz=1.5e9,
            dram_bytes_per_s=819e9,
            input_sram_bytes=48 * _MIB,
            weight_sram_bytes=32 * _MIB,
            output_sram_bytes=48 * _MIB,
            lookups_per_cycle=1024,
            vector_ops_per_cycle=4096,
            weights="streamed",
            dram_pj_per_bit=3.9,
            source=(
                "Google's published 393 int8 TOPS and 819 GB/s of HBM2: four 128 x 128 arrays at "
                "twice the rate for int8, here as eight. Weights lie in HBM between calls. A "
                "gather unit of 1024 look-ups a cycle is assumed."
            ),
        ),
        Accelerator(
            "scalesim",
            16,
            16,
            "ws",
            activations="spilled",
            weights="streamed",
            partial_sums="spilled",
            as_scalesim=True,
            source="The published examples of SCALE-Sim 3.0.0, arXiv 1811.02883: counts alone.",
        ),
    )
}


def load_accelerator(name_or_file: str | Path) -> Accelerator:
    """Finds an accelerator by preset name, or reads it from a file.

    Args:
        name_or_file: a key of `presets`, or a ``.json``, ``.yaml`` or ``.yml`` file with the fields
            of `Accelerator`.

    Returns:
        The accelerator.

    Raises:
        ValueError: if it is neither, or the file is damaged or describes none.

    Example:
        >>> load_accelerator("tpu-v5e").arrays
        8
    """
    if str(name_or_file) in presets:
        return presets[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(
            f"accelerator '{name_or_file}' is neither a file nor a preset: choose one of "
            f"{sorted(presets)} or give a JSON or YAML file"
        )
    try:
        return Accelerator.from_json(_read(path))
    except ValueError as error:
        raise ValueError(f"accelerator file '{path}': {error}") from None


def save_accelerator(accelerator: Accelerator, path: Path) -> None:
    """Writes an accelerator to a file, for `load_accelerator`.

    Args:
        accelerator: a single one.
        path: a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        ValueError: for another ending, or a sweep of accelerators.
    """
    import yaml

    data = accelerator.to_json()
    if _is_yaml(path):
        replace_text(
            path, yaml.dump(data, Dumper=_with_exponents(yaml.SafeDumper), sort_keys=False)
        )
    else:
        replace_text(path, json.dumps(data, indent=1) + "\n")


def _read(path: Path) -> Any:
    import yaml

    if not _is_yaml(path):
        return read_json(path)
    try:
        return yaml.load(read_text(path), Loader=_with_exponents(yaml.SafeLoader))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not YAML ({reason})") from None


def _with_exponents(kind: Any) -> Any:
    """A reader or writer to whom 1e9 is a number: to YAML 1.1 it is text."""
    own = type("Own", (kind,), {})
    own.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return own


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"'{path}': an accelerator's file ends in .json, .yaml or .yml")
    return path.suffix != ".json"
