"""Breaks the package in known ways, one at a time, and checks that the daily suite notices.

    python tests/mutants.py             # all: about half an hour on two cores
    python tests/mutants.py freezing    # only in files whose path has this word

Each mutant replaces one piece of text in a copy of the working tree. The tests of its room run
first, and the whole daily suite where these pass. A mutant that the suite does not notice survives:
a test is missing, and the exit status is 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """One fault: in ``file``, ``old`` (there exactly once) becomes ``new``."""

    file: str
    old: str
    new: str
    fault: str
    tests: str  # of its own room, below tests/


_SIGN = "quantizers/sign_split.py"
_CODEBOOK = "quantizers/codebook.py"
_UNIFORM = "quantizers/uniform.py"
_FREEZING = "training/freezing.py"
MUTANTS = [
    Mutant(
        _SIGN, "jnp.where(latent < 0, -1.0, 1.0)", "jnp.where(latent < 0, 1.0, -1.0)",
        "signs are turned round in decoding", "quantizers",
    ),
    Mutant(
        _SIGN, "jnp.where(latent < 0, -1.0, 1.0)", "jnp.where(latent <= 0, -1.0, 1.0)",
        "a latent of zero is negative", "quantizers",
    ),
    Mutant(
        _SIGN, 'return learned["sign_latent"] < 0 if', 'return learned["sign_latent"] > 0 if',
        "stored sign bits are turned round", "quantizers",
    ),
    Mutant(
        _SIGN, "jnp.where(negative, -1.0, 1.0)", "jnp.where(negative, 1.0, -1.0)",
        "unpacked latents have the other sign", "quantizers",
    ),
    Mutant(
        _SIGN, "magnitude * straight_through(sign, latent)", "magnitude * sign",
        "sign latents get no gradient", "quantizers",
    ),
    Mutant(
        _SIGN, "(self.alpha * weight.astype", "(weight.astype",
        "alpha is ignored", "quantizers",
    ),
    Mutant(
        _SIGN, 'Stream("signs", spec.shape, "bool", values=2)',
        'Stream("signs", spec.shape, "bool", values=3)',
        "a sign takes two bits", "quantizers",
    ),
    Mutant(
        _CODEBOOK, 'codebook[fixed["codes"]]', 'codebook[(fixed["codes"] + 1) % self.codewords]',
        "codes are off by one", "quantizers",
    ),
    Mutant(
        _CODEBOOK, "straight_through(levels * scale, codebook)", "levels * scale",
        "int8 codebooks get no gradient", "quantizers",
    ),
    Mutant(
        _CODEBOOK, "values=self.codewords, lookups=1", "values=self.codewords + 1, lookups=1",
        "a code takes a bit too many", "quantizers",
    ),
    Mutant(
        _CODEBOOK, "squared = squared / jnp.max(squared)", "squared = jnp.ones_like(squared)",
        "channel scales do not weight the clustering", "quantizers",
    ),
    Mutant(
        _UNIFORM, "straight_through(jnp.round(clipped), clipped)", "jnp.round(clipped)",
        "latent weights get no gradient", "quantizers",
    ),
    Mutant(
        _UNIFORM, "share = 1.0 / math.sqrt(", "share = 1.0 * math.sqrt(",
        "LSQ's gradient scale is inverted", "quantizers",
    ),
    Mutant(
        _UNIFORM, "2.0 ** (self.bits - 1) - 1", "2.0 ** (self.bits - 1)",
        "one level too many", "quantizers",
    ),
    Mutant(
        _FREEZING, "new = (frequency[path] > limit)", "new = (frequency[path] < limit)",
        "calm signs freeze in place of oscillating ones", "training/test_freezing.py",
    ),
    Mutant(
        _FREEZING, "flips = (before < 0) != (after < 0)", "flips = (before < 0) == (after < 0)",
        "a kept sign counts as a flip", "training/test_freezing.py",
    ),
    Mutant(
        _FREEZING, "jnp.zeros_like(latent), -2 * latent)", "jnp.zeros_like(latent), -1 * latent)",
        "a frozen sign settles at zero", "training/test_freezing.py",
    ),
    Mutant(
        _FREEZING, "(step > warmup)", "(step >= warmup)",
        "freezing begins an interval early", "training/test_freezing.py",
    ),
    Mutant(
        _FREEZING, "new_frozen[path] = frozen[path] | new", "new_frozen[path] = new",
        "frozen signs thaw", "training/test_freezing.py",
    ),
    Mutant(
        _FREEZING, "alpha=end / start", "alpha=end",
        "the threshold ends too low", "training/test_freezing.py",
    ),
    Mutant(
        "bitstream.py", "& dtype.type(2**width - 1)", "& dtype.type(2**width - 2)",
        "odd codes are read as even ones", "test_bitstream.py",
    ),
    Mutant(
        "bitstream.py", "return -(-count * width // 8)", "return count * width // 8 + 1",
        "a stream is a byte too long", "test_bitstream.py",
    ),
    Mutant(
        "packing/segments.py", "Segment(owner, stream, tensor, dtype, start, size)",
        "Segment(owner, stream, tensor, dtype, 0, size)",
        "every leaf lies at its tensor's start", "packing",
    ),
    Mutant(
        "packing/stored.py", "sums = zlib.crc32(contents[-1][1], sums)", "sums = sums",
        "checksums of leaves are not computed", "packing",
    ),
    Mutant(
        "bits.py", "8 * dtype.itemsize * leaf.size", "4 * dtype.itemsize * leaf.size",
        "dense leaves count for half", "test_plan.py",
    ),
    Mutant(
        "clustering/assignment.py", "nearer = other < least", "nearer = other <= least",
        "the last of equal centroids is taken", "clustering",
    ),
    Mutant(
        "clustering/assignment.py", "index = jnp.where(nearer, (first + place)",
        "index = jnp.where(nearer, (first + place + 1)",
        "codes are off by one", "clustering",
    ),
    Mutant(
        "clustering/sweep.py", "sums.pull / jnp.where(mass > 0, mass, 1.0)",
        "0.9 * sums.pull / jnp.where(mass > 0, mass, 1.0)",
        "centroids stop short of their means", "clustering",
    ),
    Mutant(
        "clustering/lloyd.py", "(state.sums.members == 0)", "(state.sums.members < 0)",
        "empty codewords are not re-seeded", "clustering",
    ),
    Mutant(
        "clustering/lloyd.py", "state.mass + sums.mass", "sums.mass",
        "mini-batches forget the mass so far", "clustering",
    ),
]  # fmt: skip


def run(tree: Path, *tests: str) -> str | None:
    """Runs the daily suite, or a part, in a copy; returns the first failure."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if not failures:
        raise RuntimeError(f"pytest stopped without a failed test:\n{done.stdout}{done.stderr}")
    return failures[0].split(" - ")[0]


def noticed(tree: Path, mutant: Mutant) -> str | None:
    """Puts a mutant into a copy of the tree and takes it out again; returns the failing test."""
    file = tree / "ssvq_jax" / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {text.count(mutant.old)} times: {mutant.old}")
    try:
        file.write_text(text.replace(mutant.old, mutant.new))
        return run(tree, f"tests/{mutant.tests}") or run(tree)
    finally:
        file.write_text(text)


def main(word: str = "") -> int:
    """Tries the mutants of files whose path holds a word; returns how many survive."""
    chosen = [mutant for mutant in MUTANTS if word in mutant.file]
    table = Table("file", "fault", "noticed by", "s")
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"  # what is not broken
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, tree, ignore=skip)
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            failure = noticed(tree, mutant)
            survivors += failure is None
            seconds = f"{time.monotonic() - start:.0f}"
            table.add_row(mutant.file, mutant.fault, failure or "NOTHING", seconds)
            print(f"{number}/{len(chosen)} {mutant.file}: {failure or 'survived'}", flush=True)
    Console(width=160).print(table)
    print(f"{len(chosen) - survivors} killed, {survivors} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:2]), 1))
