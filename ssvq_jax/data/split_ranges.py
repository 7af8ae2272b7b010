"""Parts of splits, as TensorFlow Datasets spells them."""

from collections.abc import Mapping


def split_ranges(split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Says which examples a split spelled like `"train[:90%]+test"` holds.

    Args:
        split: A name, a part, or a sum of such.
        sizes: The number of examples of each split.

    Returns:
        Name, first example and the one after the last, for each part.

    Raises:
        ValueError: It names no split, or cannot be read.

    Example:
        >>> split_ranges("train[:50%]+test", {"train": 10, "test": 4})
        [('train', 0, 5), ('test', 0, 4)]
    """
    from tensorflow_datasets.core.splits import AbstractSplit, SplitDict, SplitInfo

    infos = [SplitInfo(name=key, shard_lengths=[size], num_bytes=0) for key, size in sizes.items()]
    return [
        (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
        for part in AbstractSplit.from_spec(split).to_absolute(SplitDict(split_infos=infos))
    ]


def overlap(first: str, second: str, sizes: Mapping[str, int]) -> bool:
    """Says whether two splits have examples in common.

    Args:
        first: As for `split_ranges`.
        second: As for `split_ranges`.
        sizes: The number of examples of each split.

    Example:
        >>> sizes = {"train": 100, "test": 10}
        >>> overlap("train", "train[90%:]", sizes), overlap("train[:90%]", "train[90%:]", sizes)
        (True, False)
    """
    return any(
        a == b and max(start, begin) < min(stop, end)
        for a, start, stop in split_ranges(first, sizes)
        for b, begin, end in split_ranges(second, sizes)
    )
