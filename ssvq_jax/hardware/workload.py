"""What a model computes: matrix products, each with the weights that feed it, and the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssvq_jax.hardware.checks import check_keys, check_size

_COUNTS = ("operations", "leaves", "gathered")


@dataclasses.dataclass(frozen=True)
class Product:
    """Equal matrix products ``[M, K] x [K, N]``.

    A convolution is one of ``[batch · output pixels, window · channels] x [.., outputs]`` for each
    of its groups.

    Attributes:
        name: for tables.
        m: M, rows of the input: tokens, or output pixels.
        k: K, summed over.
        n: N, outputs.
        count: how many there are side by side, all of whose operands are there at once: heads,
            groups of a convolution.
        rounds: how often that is done, one after the other: the layers of a scan. A weight that a
            loop uses in every round comes from DRAM in every round, unless it stays in its buffer.
        leaves: paths of the leaves that ``[K, N]`` is made of; none if it is an activation, too.
        input_elements: different numbers in ``[M, K]``: fewer than M·K where the windows of a
            convolution overlap. By default M·K.
    """

    name: str
    m: int
    k: int
    n: int
    count: int = 1
    rounds: int = 1
    leaves: tuple[str, ...] = ()
    input_elements: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not all(isinstance(x, str) for x in self.leaves):
            raise ValueError(f"product {self.name!r} with leaves {self.leaves!r}: give text")
        for name in ("m", "k", "n", "count", "rounds"):
            check_size(f"product '{self.name}'", name, getattr(self, name))
        if self.input_elements is not None:
            check_size(f"product '{self.name}'", "input_elements", self.input_elements)
        check_size(f"product '{self.name}'", "M·N·K·count·rounds", self.macs)

    @property
    def macs(self) -> int:
        """Multiplications, of all ``count`` and ``rounds``."""
        return self.m * self.k * self.n * self.count * self.rounds

    @property
    def inputs(self) -> int:
        """Different numbers in one input."""
        return self.m * self.k if self.input_elements is None else self.input_elements

    @property
    def weights(self) -> int:
        """Numbers in the ``count`` operands ``[K, N]`` of a round."""
        return self.k * self.n * self.count


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one call of a model computes. Read by `read_workload`, or written by hand.

    Attributes:
        products: matrix products, in the order in which they are done.
        operations: other arithmetic, by kind: ``elementwise`` (one operation a result),
            ``transcendental`` (exp, erf, rsqrt, a division, …: likewise) and ``reduction`` (one an
            element that is reduced): what softmax, norms, biases and activation functions take.
        leaves: number of weights of every parameter, by leaf path, those that feed no product
            included.
        gathered: how many of them a call picks, for leaves that are used in no other way:
            embedding tables.
    """

    products: tuple[Product, ...]
    operations: Mapping[str, int] = dataclasses.field(default_factory=dict)
    leaves: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gathered: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in _COUNTS:
            for name, number in getattr(self, field).items():
                check_size(f"{field} of the workload", name, number)
        for name, number in self.gathered.items():
            if number > self.leaves.get(name, 0):
                raise ValueError(
                    f"gathered of the workload: {number} of leaf '{name}', which has "
                    f"{self.leaves.get(name, 'no')} weights"
                )

    @property
    def macs(self) -> int:
        """Multiplications of all products."""
        return sum(product.macs for product in self.products)

    def to_json(self) -> dict[str, Any]:
        """Writes it as plain data."""
        products = []
        for product in self.products:
            data = dataclasses.asdict(product) | {"leaves": list(product.leaves)}
            products.append({key: x for key, x in data.items() if x is not None})
        return {
            "products": products,
            "operations": dict(self.operations),
            "leaves": dict(self.leaves),
            "gathered": dict(self.gathered),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Workload":
        """Reads it from plain data.

        Raises:
            ValueError: for a missing or unknown key, or a size out of range.

        Example:
            >>> layer = {"name": "fc", "m": 1, "k": 192, "n": 1000}
            >>> Workload.from_json({"products": [layer]}).macs
            192000
        """
        check_keys("workload", data, needs={"products"}, knows=_COUNTS)
        known = {field.name for field in dataclasses.fields(Product)}
        needed = {"name", "m", "k", "n"}
        if not isinstance(data["products"], list):
            raise ValueError("workload: products must be a list")
        products = []
        for i, entry in enumerate(data["products"]):
            check_keys(f"product {i} of the workload", entry, needs=needed, knows=known)
            leaves = entry.get("leaves", [])
            if not isinstance(leaves, list):
                raise ValueError(f"product {i} of the workload: leaves must be a list")
            products.append(Product(**{**entry, "leaves": tuple(leaves)}))
        counts = {name: data.get(name, {}) for name in _COUNTS}
        for name, numbers in counts.items():
            if not isinstance(numbers, Mapping):
                raise ValueError(f"workload: {name} must be a mapping from names to numbers")
        return Workload(tuple(products), **counts)
