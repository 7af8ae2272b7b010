"""Second moments of the inputs of a plan's weights, over any number of batches.

Sums are kept in float32 and divided at the end: with N batches of a size, every addition rounds by
at most 2^-24 of the sum so far, in all by about sqrt(N) 2^-24 (6e-6 after 10,000 batches). A
running mean rounds as much; but sums of parts add up, and a saved one goes on with the same bits.
Numbers of inputs are kept on the host as 64-bit integers.
"""

import dataclasses
import functools
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssvq_jax.calibration.observe import observe
from ssvq_jax.calibration.sums_file import SumsSoFar, check_sums, load_sums, save_sums
from ssvq_jax.plan import Plan
from ssvq_jax.progress import bar_over
from ssvq_jax.quantizers.calibration import InputMoments, unseen_slices
from ssvq_jax.tree import PyTree, leaf_specs, leaves_by_path

SAVE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of inputs, and what they rest on.

    Attributes:
        inputs: by leaf path.
        rows: number of inputs by leaf path, those that are all zero not counted; of stacked leaves
            that of the slice with fewest.
        missed: leaves whose inputs cannot be read, and why.
    """

    inputs: dict[str, InputMoments]
    rows: dict[str, int]
    missed: dict[str, str]

    @property
    def few(self) -> dict[str, tuple[int, int]]:
        """Leaves with fewer inputs than channels: rows and c. Their matrix is singular."""
        sizes = {path: found.matrix.shape[-1] for path, found in self.inputs.items()}
        return {path: (n, sizes[path]) for path, n in self.rows.items() if n < sizes[path]}

    @property
    def unseen(self) -> dict[str, str]:
        """Leaves of which a slice received no inputs, e.g. an expert; which slices, for people."""
        found = {path: unseen_slices(one.matrix, 2) for path, one in self.inputs.items()}
        return {path: slices for path, slices in found.items() if slices}

    def __str__(self) -> str:
        """What to know of them, a line a leaf."""
        lines = [f"moments of the inputs of {len(self.inputs)} leaves"]
        for path, (rows, size) in self.few.items():
            lines.append(f"{path}: {rows} inputs of {size} channels: give more data")
        for path, slices in self.unseen.items():
            lines.append(f"{path}: no inputs reached {slices}: uncalibrated")
        lines += [f"{path}: not read ({why})" for path, why in self.missed.items()]
        return "\n".join(lines)


def moments_bytes(
    apply: Callable[..., Any], params: PyTree, plan: Plan, batch: Any
) -> dict[str, int]:
    """Counts the bytes of every leaf's moments, and computes nothing.

    Args:
        apply: as in `input_moments`.
        params: arrays or ``jax.ShapeDtypeStruct``.
        plan: says which leaves are compressed.
        batch: one, or its shapes.

    Returns:
        Bytes by leaf path; leaves whose inputs cannot be read are not there.

    Example:
        >>> import ssvq_jax as ssvq
        >>> params = {"kernel": jax.ShapeDtypeStruct((64, 16), "float32")}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.Uniform(bits=4))])
        >>> x = jax.ShapeDtypeStruct((8, 64), "float32")
        >>> moments_bytes(lambda params, x: x @ params["kernel"], params, plan, x)
        {'kernel': 16384}
    """
    sums, _ = _shapes(apply, params, _stacked_axes(params, plan), batch)
    return {path: 4 * one.matrix.size for path, one in sums.items()}


def input_moments(
    apply: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any],
    *,
    optional: bool = False,
    folder: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = False,
) -> Moments:
    """Reads the second moments of the inputs of every weight that a plan compresses.

    Batches that are cut over devices (``jax.device_put`` with a ``NamedSharding``) stay so, and the
    sums are those of all devices. See `observe` for what is followed through the function, and
    `moments_in_groups` if the moments of all leaves are too much for the memory.

    Args:
        apply: computes outputs from the tree of parameters and a batch; outputs are not used.
        params: the tree of float arrays that the plan was made for.
        plan: says which leaves are compressed, and which of their axes are stacked.
        batches: what ``apply`` takes after the parameters: an array or pytree, or a tuple of
            several arguments. A list, or another object that can be gone through again.
        optional: leave out leaves whose inputs cannot be read, instead of refusing.
        folder: where to keep the sums so far; a run that finds some goes on from there.
        save_seconds: time between two saves.
        progress: show a progress bar.

    Returns:
        Moments by leaf path, with the numbers of inputs that they rest on.

    Raises:
        ValueError: if a leaf is not that of the plan, its inputs cannot be read, or are not finite;
            if there is no batch; or if the folder holds sums of another run.

    Example:
        >>> import ssvq_jax as ssvq
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (2, 16))}
        >>> plan = ssvq.make_plan(params, [(".*", ssvq.Uniform(bits=4))])
        >>> batches = [jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([[1.0, 1.0], [1.0, 1.0]])]
        >>> moments = input_moments(lambda params, x: x @ params["kernel"], params, plan, batches)
        >>> moments.inputs["kernel"].matrix.tolist(), moments.rows
        ([[1.0, 1.0], [1.0, 1.5]], {'kernel': 4})
    """
    (moments,) = moments_in_groups(
        apply,
        params,
        plan,
        batches,
        optional=optional,
        folder=folder,
        save_seconds=save_seconds,
        progress=progress,
    )
    return moments


def moments_in_groups(
    apply: Callable[..., Any],
    params: PyTree,
    plan: Plan,
    batches: Iterable[Any],
    *,
    most_bytes: int | None = None,
    optional: bool = False,
    folder: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = False,
) -> Iterator[Moments]:
    """Does what `input_moments` does for some leaves at a time, with a pass over the data for each.

    Args:
        apply: as in `input_moments`, as is all else but this one.
        params: the tree.
        plan: the plan.
        batches: the data; the same ones in every pass.
        most_bytes: bytes of a group's moments (the step needs twice as many, next to the model); a
            leaf with more is a group of its own.
        optional: leave out leaves whose inputs cannot be read.
        folder: where to keep the sums so far, a file a group.
        save_seconds: time between two saves.
        progress: show a progress bar.

    Yields:
        The moments of a group of leaves, in the plan's order.

    Raises:
        ValueError: as `input_moments`; and if passes see different numbers of batches.
    """
    begun = iter(batches)
    if begun is batches:
        raise ValueError(
            "batches can be gone through once only: give a list, or an object whose __iter__ "
            "begins anew"
        )
    stacked = _stacked_axes(params, plan)
    first = next(begun, None)
    if first is None:
        raise ValueError("there is no batch: give at least one")
    shapes, missed = _shapes(apply, params, stacked, first)
    lost = {path: missed.get(path, "nothing") for path in stacked if path not in shapes}
    if lost and not optional:
        raise ValueError(
            f"leaf '{next(iter(lost))}' is in no product whose inputs can be read (what it meets: "
            f"{lost[next(iter(lost))]}; {len(lost)} such leaves): keep it dense, multiply with it "
            "as it is, or give optional=True to go without its moments"
        )
    groups = _groups(shapes, most_bytes)
    identity = _identity(params, first) if folder else ""
    expected = None
    for i, group in enumerate(groups):
        file = folder / f"sums-{i}.safetensors" if folder else None
        sums = SumsSoFar(
            {path: jnp.zeros(one.matrix.shape, jnp.float32) for path, one in group.items()},
            {path: np.zeros(one.count.shape, np.int64) for path, one in group.items()},
            {path: one.axes for path, one in group.items()},
            batches=0,
            done=False,
            identity=identity,
        )
        if file and file.exists():
            sums = load_sums(file)
            check_sums(file, sums, {path: one.matrix for path, one in group.items()}, identity)
        if not sums.done:
            name = "moments" if len(groups) == 1 else f"moments {i + 1}/{len(groups)}"
            shown = bar_over(batches, name) if progress else iter(batches)
            save = functools.partial(save_sums, file) if file else None
            paths = {path: stacked[path] for path in group}
            sums = _read(apply, params, paths, shown, sums, save, save_seconds)
        if expected not in (None, sums.batches):
            raise ValueError(
                f"one pass had {expected} batches and another {sums.batches}: give the same "
                "batches to every pass"
            )
        expected = sums.batches
        yield Moments(
            {path: _mean(sums, path) for path in group},
            {path: int(sums.counts[path].min(initial=2**62)) for path in group},
            lost if i == 0 else {},
        )


def _stacked_axes(params: PyTree, plan: Plan) -> dict[str, int]:
    """The leaves to observe: how many axes are stacked, by leaf path."""
    specs = leaf_specs(params)
    leaves = [leaf for leaf in plan.leaves if leaf.path in plan.compressed]
    for leaf in leaves:
        if leaf.path not in specs or specs[leaf.path].shape != leaf.shape:
            raise ValueError(
                f"leaf '{leaf.path}' of shape {leaf.shape} in the plan is not in the tree: make "
                "the plan from this tree"
            )
    return {leaf.path: leaf.stacked for leaf in leaves}


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Shapes of `Sums`, and the axes."""

    matrix: jax.ShapeDtypeStruct
    count: jax.ShapeDtypeStruct
    axes: tuple[int, ...]


def _shapes(
    apply: Callable[..., Any], params: PyTree, stacked: Mapping[str, int], batch: Any
) -> tuple[dict[str, _Shape], dict[str, str]]:
    """Shapes of the sums of one batch, in the plan's order, and what is missed."""
    axes, missed = {}, {}

    def arrays(params: PyTree, inputs: tuple[Any, ...]) -> dict[str, tuple[Any, Any]]:
        seen = observe(apply, params, stacked, *inputs)
        axes.update({path: one.axes for path, one in seen.sums.items()})
        missed.update(seen.missed)
        return {path: (one.matrix, one.count) for path, one in seen.sums.items()}

    found = jax.eval_shape(arrays, params, _arguments(batch))
    return {
        path: _Shape(found[path][0], found[path][1], axes[path])
        for path in stacked
        if path in found
    }, missed


def _groups(shapes: Mapping[str, _Shape], most_bytes: int | None) -> list[dict[str, _Shape]]:
    """Cuts leaves, in their order, into groups with so many bytes."""
    groups: list[dict[str, _Shape]] = [{}]
    room = most_bytes
    for path, one in shapes.items():
        size = 4 * one.matrix.size
        if room is not None and most_bytes is not None:
            if size > room and groups[-1]:
                groups.append({})
                room = most_bytes
            room -= size
        groups[-1][path] = one
    return groups


def _identity(params: PyTree, batch: Any) -> str:
    """A checksum of the weights and of the first batch."""
    number = 0
    for path, leaf in leaves_by_path({"params": params, "batch": batch}).items():
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        numbers = np.ascontiguousarray(leaf).view(np.uint8).data  # bfloat16 has no buffer
        number = zlib.crc32(numbers, zlib.crc32(path.encode(), number))
    return f"{number:08x}"


def _read(
    apply: Callable[..., Any],
    params: PyTree,
    stacked: Mapping[str, int],
    batches: Iterator[Any],
    begun: SumsSoFar,
    save: Callable[[SumsSoFar], None] | None,
    save_seconds: float,
) -> SumsSoFar:
    """Adds all batches that come after those of the sums so far."""
    skipped = sum(1 for _ in itertools.islice(batches, begun.batches))
    if skipped < begun.batches:
        raise ValueError(
            f"the sums so far are of {begun.batches} batches, but there are {skipped}: give the "
            "same batches as before, or another folder"
        )

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: PyTree, totals: Any, inputs: tuple[Any, ...]) -> Any:
        sums = observe(apply, params, stacked, *inputs).sums
        totals = {path: totals[path] + sums[path].matrix for path in totals}
        squares = {p: jnp.diagonal(x.matrix, axis1=-2, axis2=-1) for p, x in sums.items()}
        finite = {path: jnp.all(jnp.isfinite(x)) for path, x in squares.items()}
        return totals, {path: one.count for path, one in sums.items()}, finite

    counts = dict(begun.counts)
    number = begun.batches
    totals = {path: jnp.asarray(x) for path, x in begun.matrices.items()}
    last: tuple[Any, Any] | None = None

    def settle() -> None:
        """Looks at the batch before this one, which the device has done: nothing waits for it."""
        if last is None:
            return
        for path, finite in last[1].items():
            if not finite:
                raise ValueError(
                    f"inputs of leaf '{path}' are NaN, infinite or too large to be squared in "
                    f"batch {number - 1}, counted from 0: repair the data or the weights"
                )
        for path, count in last[0].items():
            counts[path] = np.asarray(counts[path] + np.asarray(count))

    saved = time.monotonic()
    for batch in batches:
        totals, *now = step(params, totals, _arguments(batch))
        settle()
        last = (now[0], now[1])
        number += 1
        if save and time.monotonic() - saved >= save_seconds:
            settle()
            last = None
            save(dataclasses.replace(begun, matrices=totals, counts=counts, batches=number))
            saved = time.monotonic()
    settle()
    sums = dataclasses.replace(begun, matrices=totals, counts=counts, batches=number, done=True)
    if save:
        save(sums)
    return sums


def _mean(sums: SumsSoFar, path: str) -> InputMoments:
    """The sum over its count; slices that nothing met have no moments, which are zeros."""
    count = np.maximum(sums.counts[path], 1).astype(np.float32)[..., None, None]
    mean = jnp.asarray(sums.matrices[path]) / count
    # A product x^T x may round its two halves differently.
    return InputMoments((mean + jnp.swapaxes(mean, -1, -2)) / 2, sums.axes[path])
