"""Checkpoints of a run: written in the background, atomic, exact (orbax).

A checkpoint holds every leaf of the training state under its leaf path, and beside the arrays, as
JSON: a format version, the plan, the position in the training data, notes of the run, the
validation loss, a checksum of every leaf, and one of all this. Whatever is read is compared with
its checksum. Orbax renames a finished folder into place, so one that is being written never looks
like a checkpoint.
"""

import contextlib
import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ssvq_jax.plan import Plan
from ssvq_jax.sealed import seal, unseal
from ssvq_jax.training.checksums import damaged_leaves, leaf_checksums
from ssvq_jax.training.identity import check_leaf, check_plan, differences, plain
from ssvq_jax.training.named_leaves import abstract, fill, leaf_name, named_leaves
from ssvq_jax.training.quiet import one_error
from ssvq_jax.tree import PyTree

FORMAT = 2  # 1, of version 0.1, had no checksums
SAVE_SECONDS = 60.0
_STATE = "state"
_METRIC = "loss"

Which = Literal["last", "best"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back.

    Attributes:
        state: the training state, to the bit as it was saved.
        data: position in the training data, as the batch iterator gave it.
        notes: the run's own remarks.
    """

    state: Any
    data: dict[str, Any]
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder; keeps the last, and the best by validation loss.

    Writing goes on in the background; an error of it is raised by the next call. Use it as a
    context manager, so that the last write is waited for.

    Args:
        folder: where checkpoints are; made if it does not exist.
        seconds: least time between two that are not forced.
        read_only: for reading; leaves alone what a run may be writing there at the moment.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from ssvq_jax import make_plan
        >>> state = {"step": jnp.int32(3), "params": {"bias": jnp.ones(2)}}
        >>> plan = make_plan(state["params"], [(".*", None)])
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
        ...     checkpoints.save(3, state, plan, data={"batches": 3}, notes={"name": "demo"})
        ...     checkpoints.wait()
        ...     restored = checkpoints.restore(state, plan)
        >>> restored.state["params"]["bias"].tolist(), restored.data
        ([1.0, 1.0], {'batches': 3})
    """

    def __init__(
        self, folder: Path, *, seconds: float = SAVE_SECONDS, read_only: bool = False
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"save_seconds={seconds}: give 0 or more seconds between checkpoints")
        # Here, since importing orbax is slow.
        import orbax.checkpoint.experimental.v1 as ocp

        saving, keeping = ocp.training.save_decision_policies, ocp.training.preservation_policies
        self.folder = folder
        self._writing: Any = None
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # which leaves must be there is checked here
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer = ocp.training.Checkpointer(
                str(folder.absolute()),
                context=context,
                save_decision_policy=saving.ContinuousCheckpointingPolicy(
                    # Typed int in orbax, which makes a timedelta of it.
                    minimum_interval_secs=seconds  # pyright: ignore[reportArgumentType]
                ),
                preservation_policy=keeping.AnyPreservationPolicy(
                    [
                        keeping.LatestN(1),
                        keeping.BestN(
                            get_metric_fn=lambda metrics: metrics[_METRIC],
                            reverse=True,  # the least loss is the best
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=not read_only,  # what an interrupt left
            )
        except (OSError, ValueError) as error:
            raise OSError(
                f"no checkpoints can be kept in {folder} ({_reason(error)}): give another folder"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except OSError:
            if error is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # says again what waiting for the write said
                self._checkpointer.close()

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the least validation loss; None if none was validated.

        Raises:
            ValueError: if a checkpoint is damaged.
        """
        steps = [found.step for found in self._checkpointer.checkpoints]
        losses = {step: self._metadata(step)["loss"] for step in steps}
        validated = [(loss, step) for step, loss in losses.items() if loss is not None]
        return min(validated)[1] if validated else None

    def due(self, step: int) -> bool:
        """Whether the interval is over and no write is going on."""
        return self._checkpointer.should_save(step)

    def save(
        self,
        step: int,
        state: PyTree,
        plan: Plan,
        *,
        data: Mapping[str, Any],
        notes: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint; returns when the state may change again.

        Args:
            step: number of training steps made; later than that of any other.
            state: any tree of arrays.
            plan: kept with it, so that it is not mistaken for another's.
            data: position of the batch iterator, as JSON values.
            notes: what else is to be found on resuming, as JSON values.
            loss: on validation data; the least so far is kept as the best.

        Raises:
            OSError: if this or the previous checkpoint could not be written.
        """
        leaves = named_leaves(state)
        metadata = {
            "format": FORMAT,
            "plan": plain(plan),
            "data": data,
            "notes": notes,
            "loss": loss,
            "checksums": leaf_checksums(leaves),
        }
        try:
            self._writing = self._checkpointer.save_checkpointables_async(
                step,
                {_STATE: leaves},
                force=True,
                metrics=None if loss is None else {_METRIC: loss},
                custom_metadata=seal(metadata),
            )
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            OSError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(
        self, template: PyTree, plan: Plan, which: Which = "last", *, partial: bool = False
    ) -> Restored:
        """Reads a checkpoint.

        Args:
            template: the state as it will be: arrays or ``jax.ShapeDtypeStruct`` leaves; where
                these name a sharding, leaves are placed so, whatever devices wrote them.
            plan: of the run that goes on.
            which: the last or the best.
            partial: read the leaves of the template only, though more were saved.

        Returns:
            The state and what was saved with it.

        Raises:
            ValueError: if there is none, it is of another plan, format, shape or dtype, or it is
                damaged: the message names the leaf.
        """
        step = self._step(which)
        metadata, stored = self._described(step)
        check_plan(self._name(step), metadata["plan"], plain(plan))
        state = self._load(step, template, metadata["checksums"], stored, partial)
        return Restored(state, metadata["data"], metadata["notes"])

    def check_asked(self, asked: Mapping[str, Any]) -> None:
        """Compares what a run is asked for with the ``asked`` of the last checkpoint's notes.

        Raises:
            ValueError: if there is none, or another was asked for; it says what differs. If one of
                the checkpoints is damaged: what is kept as the best depends on all of them.
        """
        step = self._step("last")
        for other in self._checkpointer.checkpoints:
            self._metadata(other.step)
        found = differences(self._metadata(step)["notes"].get("asked", {}), asked)
        if found:
            raise ValueError(
                f"{self._name(step)} is of another run ({'; '.join(found)}): give another folder, "
                "or ask for the same to go on with it"
            )

    def plan(self, which: Which = "last") -> Plan:
        """The plan that a checkpoint was saved with.

        Raises:
            ValueError: if there is none, or it is of another format.
        """
        return Plan.from_json(self._metadata(self._step(which))["plan"])

    def holds(self, part: str, which: Which = "last") -> bool:
        """Whether the state that was saved has leaves under a name, e.g. ``average``.

        Raises:
            ValueError: if there is no checkpoint, or it cannot be read.
        """
        stored = self._metadata(self._step(which))["checksums"]
        return any(leaf_name(name).split("/")[0] == part for name in stored)

    def _step(self, which: Which) -> int:
        step = self.last if which == "last" else self.best
        if step is None:
            hint = (
                "was no validation loss saved? Take 'last'" if which == "best" else "is it a run?"
            )
            raise ValueError(f"{self.folder} holds no {which} checkpoint: {hint}")
        return step

    def _metadata(self, step: int) -> dict[str, Any]:
        """What is written beside the arrays, checked."""
        return self._described(step)[0]

    def _described(self, step: int) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """What is written beside the arrays, checked, and what arrays there are by name."""
        with self._reading(step):
            found = self._checkpointer.checkpointables_metadata(step)
            metadata: Any = found.custom_metadata
            metrics, stored = found.metrics, found.metadata.get(_STATE)
            ours = isinstance(metadata, Mapping) and "format" in metadata
            if ours and stored is None:  # orbax takes none for an answer
                raise ValueError("the list of its arrays cannot be read")
        if not ours:
            raise ValueError(
                f"{self._name(step)} is no checkpoint of ssvq_jax, or is damaged: give another "
                "folder"
            )
        if metadata["format"] != FORMAT:
            raise ValueError(
                f"{self._name(step)} has format {metadata['format']}, this version reads {FORMAT}: "
                "install the version of ssvq_jax that wrote it"
            )
        try:
            metadata = unseal(metadata, "what is written beside its arrays")
        except ValueError as error:
            raise self._damaged(step, str(error)) from None
        loss = metrics.get(_METRIC) if isinstance(metrics, Mapping) else None
        if json.dumps(loss) != json.dumps(metadata["loss"]):  # NaN is NaN here
            raise self._damaged(step, f"its loss is {loss} and {metadata['loss']}")
        return metadata, stored or {}

    def _load(
        self,
        step: int,
        template: PyTree,
        checksums: Mapping[str, str],
        stored: Mapping[str, Any],
        partial: bool,
    ) -> PyTree:
        wanted = {name: abstract(leaf) for name, leaf in named_leaves(template).items()}
        if set(stored) != set(checksums):
            names = sorted(map(leaf_name, set(stored) ^ set(checksums)))
            raise self._damaged(step, f"its list of arrays is wrong about {names[:3]}")
        for name, leaf in wanted.items():
            check_leaf(self._name(step), leaf_name(name), leaf, stored.get(name))
        extra = sorted(set(stored) - set(wanted))
        if extra and not partial:
            raise ValueError(
                f"{self._name(step)} holds {len(extra)} leaves that this run does not have, e.g. "
                f"'{leaf_name(extra[0])}': it was saved with another model or optimizer"
            )
        with self._reading(step):
            found = self._checkpointer.load_checkpointables(step, {_STATE: wanted})[_STATE]
        if damaged := damaged_leaves(found, checksums):
            names = ", ".join(f"'{leaf_name(name)}'" for name in damaged[:3])
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise self._damaged(step, f"the checksum does not fit leaf {names}{more}")
        return fill(template, found)

    def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Names the checkpoint in whatever orbax raises."""
        return one_error(lambda error: self._damaged(step, _reason(error)))

    def _steps(self) -> list[int]:
        """Steps on disk; orbax also counts one that it could not write."""
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]

    def _name(self, step: int) -> str:
        return f"checkpoint {self.folder / str(step)}"

    def _damaged(self, step: int, reason: str) -> ValueError:
        others = [other for other in self._steps() if other != step]
        hint = f"go on from {max(others)}" if others else "let the run start over"
        return ValueError(
            f"{self._name(step)} is damaged or incomplete ({reason}): delete that folder to {hint}"
        )

    def _not_written(self, error: Exception) -> OSError:
        steps = self._steps()
        last = f"the last good one is {max(steps)}" if steps else "there is none yet"
        return OSError(
            f"a checkpoint could not be written to {self.folder} ({_reason(error)}); {last}: make "
            "room on the disk and run the same command again"
        )


def _reason(error: BaseException) -> str:
    """First line of an error's text, not too long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
