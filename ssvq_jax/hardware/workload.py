"""What a model computes: matrix products, each with the weights that feed it, and the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssvq_jax.hardware.checks import check_keys, check_size

_COUNTS = ("operations", "leaves", "gathered")


@dataclasses.dataclass(frozen=True)
class Product:
    """Equal matrix products ``[M, K] x [K, N]``, done one after the other.

    A convolution is one of ``[batch · output pixels, window · channels] x [.., outputs]`` for each
    of its groups.

    Attributes:
        name: for tables.
        m: M, rows of the input: tokens, or output pixels.
        k: K, summed over.
        n: N, outputs.
        count: how many there are: heads, groups, rounds of a loop.
        leaves: paths of the leaves that ``[K, N]`` is made of; none if it is an activation, too.
        input_elements: different numbers in ``[M, K]``: fewer than M·K where the windows of a
            convolution overlap. By default M·K.
    """

    name: str
    m: int
    k: int
    n: int
    count: int = 1
    leaves: tuple[str, ...] = ()
    input_elements: int | None = None

    def __post_init__(self) -> None:
        for name in ("m", "k", "n", "count"):
            check_size(f"product '{self.name}'", name, getattr(self, name))
        if self.input_elements is not None:
            check_size(f"product '{self.name}'", "input_elements", self.input_elements)
        check_size(f"product '{self.name}'", "M·N·K·count", self.macs)

    @property
    def macs(self) -> int:
        """Multiplications, of all ``count``."""
        return self.m * self.k * self.n * self.count

    @property
    def inputs(self) -> int:
        """Different numbers in one input."""
        return self.m * self.k if self.input_elements is None else self.input_elements

    @property
    def weights(self) -> int:
        """Numbers in all ``count`` operands ``[K, N]``."""
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
        products = []
        for i, entry in enumerate(data["products"]):
            check_keys(f"product {i} of the workload", entry, needs=needed, knows=known)
            products.append(Product(**entry | {"leaves": tuple(entry.get("leaves", ()))}))
        counts = {name: dict(data.get(name, {})) for name in _COUNTS}
        for name, numbers in counts.items():
            for key, number in numbers.items():
                check_size(f"{name} of the workload", key, number)
        return Workload(tuple(products), **counts)
