"""Where a run's arrays live: data-parallel over the local devices of one process.

The batch is cut over the devices; the training state is whole on every device, or cut too. The
compiler adds the communication (``jit`` with shardings, no ``pmap``), so a step on many devices
computes what one device computes, up to the order in which floats are added.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssvq_jax.quantizers.base import check_integer
from ssvq_jax.tree import PyTree

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run's arrays live; made by `local_layout`.

    Attributes:
        mesh: the devices, on the one axis ``data``.
        shard_state: cut the training state over the devices as well: parameters, latents, codes
            and optimizer state then take an n-th of the memory each on n devices (and the decoded
            weights are gathered in every step). What no axis allows to cut stays whole.
    """

    mesh: Mesh
    shard_state: bool = False

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def batch(self) -> NamedSharding:
        """Sharding of a batch: its first axis over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def state(self, tree: PyTree) -> PyTree:
        """Gives the sharding of every leaf of a training state.

        Args:
            tree: arrays, or their shapes (``jax.ShapeDtypeStruct``).

        Returns:
            The same tree of shardings: each leaf whole on every device, or with ``shard_state`` cut
            along the longest axis (the first of equals) whose length the devices divide.

        Example:
            >>> layout = local_layout(1, shard_state=True)
            >>> kernel = jax.ShapeDtypeStruct((4, 8), "float32")
            >>> tuple(layout.state({"kernel": kernel})["kernel"].spec)
            (None, 'data')
        """
        return jax.tree.map(self._leaf, tree)

    def shapes(self, tree: PyTree) -> PyTree:
        """Describes a training state where it lives, for reading a checkpoint into it.

        Args:
            tree: arrays or their shapes.

        Returns:
            The same tree of ``jax.ShapeDtypeStruct``, with the shardings of `state`.
        """
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.state(tree),
        )

    def _leaf(self, leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % self.devices == 0]
        if not self.shard_state or not axes:
            return self.replicated
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def place(self, tree: PyTree) -> PyTree:
        """Copies a training state to where it lives.

        Args:
            tree: arrays, e.g. of `ssvq_jax.training.step.make_state`.

        Returns:
            Arrays of their own: a training step that takes them over leaves the given ones alone.
        """
        # device_put may alias a buffer that is on one of the devices already, even if told not to.
        return jax.device_put(jax.tree.map(jnp.copy, tree), self.state(tree))

    def check_batch(self, batch_size: int) -> None:
        """Checks that the devices divide a batch.

        Args:
            batch_size: examples of a batch.

        Raises:
            ValueError: if they do not, with the batch sizes and device counts that would do.

        Example:
            >>> local_layout(1).check_batch(100)
        """
        if batch_size > 0 and batch_size % self.devices == 0:
            return
        lower = batch_size - batch_size % self.devices
        sizes = [str(size) for size in (lower, lower + self.devices) if size > 0]
        fewer = max(n for n in range(1, self.devices + 1) if batch_size % n == 0)
        raise ValueError(
            f"a batch of {batch_size} cannot be divided over {self.devices} devices: give "
            f"batch_size={' or '.join(sizes)}, or devices={fewer}"
        )


def local_layout(devices: int | None = None, *, shard_state: bool = False) -> Layout:
    """Lays a run out over the first local devices.

    Args:
        devices: how many; None for all that this process has.
        shard_state: cut the training state as well; see `Layout`.

    Returns:
        The layout. With one device a run computes the same bits as without a layout.

    Raises:
        ValueError: if there are not so many devices.
    """
    found = jax.local_devices()
    if devices is not None:
        check_integer("devices", devices, least=1)
        if devices > len(found):
            raise ValueError(
                f"devices={devices}: there are {len(found)} local devices "
                f"({found[0].platform}): pass devices={len(found)} or fewer, or None for all"
            )
    mesh = Mesh(np.array(found[:devices]), (AXIS,))
    return Layout(mesh, shard_state)
