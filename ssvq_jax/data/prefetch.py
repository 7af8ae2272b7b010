"""Iterating over prepared batches: ahead of time, in threads or processes, and resumable.

grain's own iterators do the first two. Their saved state, however, depends on how many workers
there are; that of `PrefetchIterator` is the number of batches handed out.
"""

import contextlib
import multiprocessing
import operator
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

_BUFFERED_BATCHES = 4  # enough to hide the preparation behind a training step

BatchT = TypeVar("BatchT", covariant=True)


@runtime_checkable
class BatchIterator(Iterator[BatchT], Protocol[BatchT]):
    """An iterator of batches whose position can be saved."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as JSON-serialisable values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position of an iterator that was made with the same arguments."""
        ...

    def close(self) -> None:
        """Ends what prepares batches in the background; there are no batches after that."""
        ...


class PrefetchIterator(Iterator[BatchT]):
    """Hands out the elements of a grain `MapDataset`, in order, on any number of workers.

    Attributes:
        dataset: The dataset. Its element must depend on nothing but its index. It must not end:
            at the end of one, grain keeps the last element of each worker in shared memory.
        length: How many of its elements are handed out.
        made_with: What the elements depend on; is saved along with the position and compared.
        threads: Background threads in each process.
        workers: Processes; 0 prepares batches in this one.
    """

    def __init__(
        self,
        dataset: Any,
        length: int,
        made_with: Mapping[str, int],
        *,
        threads: int,
        workers: int,
    ) -> None:
        self.dataset, self.length, self.made_with = dataset, length, dict(made_with)
        self.threads, self.workers = threads, workers
        self._batches = 0  # handed out
        self._running: list[Any] = []  # grain's iterator, from the first `next` on
        self._first: deque[Any] = deque()  # what it gave while workers were starting
        # Also at the interpreter's exit, where grain's own clean-up comes too late.
        weakref.finalize(self, _end, self._running)
        self._closed = False

    def __next__(self) -> BatchT:
        """Returns the next batch; the first call starts threads and processes.

        Raises:
            ValueError: The iterator was closed.
            RuntimeError: A worker process was killed.
        """
        if self._closed:
            raise ValueError("the iterator of batches is closed: make a new one")
        if self._batches == self.length:
            self._stop()
            raise StopIteration
        try:
            if not self._running:
                self._start()
            batch = self._first.popleft() if self._first else self._receive()
        except Exception as error:
            self._stop()  # grain would end here as if there were no more; the next call tries again
            if "Worker process was terminated" in str(error):
                error.add_note(
                    "A worker process is killed where memory runs out, shared memory included "
                    "(/dev/shm, 64 MB in many containers): use fewer workers or a smaller "
                    "batch_size, or give the container more."
                )
            raise
        self._batches += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the number of batches handed out and `made_with`, JSON-serialisable."""
        return {"batches": self._batches, **self.made_with}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, whatever `threads` and `workers` were then.

        Raises:
            ValueError: The state is that of other batches.
        """
        if set(state) != {"batches", *self.made_with}:
            raise ValueError(
                f"the state has the keys {sorted(state)}, not {sorted(self.get_state())}: give "
                "what get_state() of the same kind of iterator returned"
            )
        for name, value in self.made_with.items():
            if state[name] != value:
                raise ValueError(
                    f"the state is of batches made with {name}={state[name]}, these are made with "
                    f"{name}={value}: resume with the arguments of the run that saved it"
                )
        batches = operator.index(state["batches"])
        if not 0 <= batches <= self.length:
            raise ValueError(f"the state has batches={batches}: there are 0 to {self.length}")
        self._stop()
        self._batches = batches

    def close(self) -> None:
        """Ends threads and processes; the same happens when the iterator is deleted."""
        self._closed = True
        self._stop()

    def _start(self) -> None:
        import grain

        dataset = self.dataset.slice(slice(self._batches, None))
        # grain's own defaults, 16 threads and 500 elements, are meant for single examples.
        ahead = 1 if self.workers else _BUFFERED_BATCHES
        buffered = max(ahead, self.threads) if self.threads else 0
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=buffered)
        batches = dataset.to_iter_dataset(options)
        if self.workers:
            _answer_profiling_flag()
            processes = grain.MultiprocessingOptions(num_workers=self.workers)
            batches = batches.mp_prefetch(processes, worker_init_fn=_prepare_worker)
        self._running.append(iter(batches))
        # Workers take turns: once each has made a batch, all have certainly started.
        with _main_left_alone() if self.workers else contextlib.nullcontext():
            self._first.extend(self._receive() for _ in range(self.workers))

    def _receive(self) -> Any:
        batch = next(self._running[0])
        if not self.workers:
            return batch
        # Copied, because grain's arrays unmap their shared memory when they are deleted, even while
        # slices of them are in use, and complain of it at the interpreter's exit.
        return {key: np.array(value) for key, value in batch.items()}

    def _stop(self) -> None:
        self._first.clear()
        _end(self._running)


def _end(running: list[Any]) -> None:
    """Closes grain's iterator and lets go of it."""
    if running:
        running.pop().close()


def _answer_profiling_flag() -> None:
    """Lets grain read a flag of its own in programs that don't parse absl's flags."""
    from absl import flags

    name = "grain_enable_multiprocess_worker_profiling"
    if name in flags.FLAGS:
        flags.FLAGS[name].present = 1


_starting = threading.Lock()


@contextlib.contextmanager
def _main_left_alone() -> Iterator[None]:
    """Keeps processes that are started meanwhile from importing the program's main module.

    Nothing in the workers needs it: grain pickles what it sends by value. Importing it would run
    a script without an `if __name__ == "__main__"` once more in each worker, up to the place where
    it starts workers, which is an error; or initialise accelerators.
    """
    main = sys.modules["__main__"]
    with _starting:
        spec, file = getattr(main, "__spec__", None), main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is not None:
                main.__file__ = file


def _prepare_worker(index: int, count: int) -> None:
    """Runs first in each worker process."""
    import jax

    del index, count
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which also decides about ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose main process was killed and could not do so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
