import dataclasses

import numpy as np
import pytest
from matplotlib.image import imread

from ssvq_jax.analysis import CodeStatistics, LeafReport, Sensitivity, SignStatistics, WeightError
from ssvq_jax.report import plot_analysis, print_analysis


def leaf(path, relative=0.25, entry=None, codes=True):
    return LeafReport(
        path=path,
        entry=entry or path,
        method="sign_split",
        settings="k=16 d=8",
        weights=1000,
        bits_per_weight=1.5,
        error=WeightError(relative, 6.0, 0.875),
        signs=SignStatistics(0.5, 0.125, 0.0625),
        codes=CodeStatistics(16, 15, 3.75, 4.0, 1.25) if codes else None,
    )


def sensitivity(scope, path, increase, drop=0.0):
    return Sensitivity(scope, path, 0.5 + increase, 0.9 - drop, increase, drop, 1234)


LEAVES = [leaf("mild"), leaf("worst"), leaf("bad", entry="shared"), leaf("unknown", codes=False)]
ROWS = [
    sensitivity("float", "", 0.0),
    sensitivity("all", "", 2.0, 0.4),
    sensitivity("leaf", "mild", -0.25),
    sensitivity("leaf", "worst", 0.75, 0.125),
    sensitivity("leaf", "bad", 0.25),
]


def order(printed):
    """Leaf names in the first column, table by table."""
    names = [line.split()[1] for line in printed.splitlines() if line.startswith("│")]
    return [name for name in names if name in {leaf.path for leaf in LEAVES}]


def cells(printed, name):
    """The cells of the line that begins with a name, one list a table."""
    lines = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    return [[x.strip() for x in line] for line in lines if line[0].strip() == name]


def test_leaves_come_by_damage_and_unknown_ones_last(capsys):
    print_analysis("title", LEAVES, ROWS)
    assert order(capsys.readouterr().out) == ["worst", "bad", "mild", "unknown"] * 2


def test_without_losses_the_largest_error_comes_first(capsys):
    print_analysis("title", [leaf("mild", 0.1), leaf("exact", None), leaf("worst", 0.5)])
    printed = capsys.readouterr().out
    assert order(printed) == ["worst", "mild"] * 2
    assert cells(printed, "exact")[0][4] == ""
    assert cells(printed, "all at once")[0][-2:] == ["", ""]
    assert "leaves summed" not in printed
    assert "more bits" not in printed


def test_figures_of_a_leaf_and_totals(capsys):
    print_analysis("title", LEAVES, ROWS)
    printed = capsys.readouterr().out
    assert "title; float model on 1,234 examples: loss 0.5000, accuracy 90.00 %" in printed
    first, second = cells(printed, "worst")
    assert first[2:] == ["1,000", "1.5000", "25.0", "6.0", "0.8750", "+0.7500", "-12.50 %"]
    assert second[1:] == ["50.0", "12.5", "6.2", "15/16", "3.75/4.00", "1.25"]
    assert cells(printed, "bad")[1][4] == "15/16 of shared"
    assert cells(printed, "bad")[0][-1] == "+0.00 %"
    assert cells(printed, "unknown")[1][4:] == ["", "", ""]
    assert cells(printed, "leaves summed")[0][-2] == "+0.7500"
    total = cells(printed, "all at once")[0]
    assert total[2:4] == ["4,000", "1.5000"]
    assert total[-2:] == ["+2.0000", "-40.00 %"]


def test_the_leaves_to_keep_at_more_bits_are_named(capsys):
    extra = [sensitivity("leaf", name, value) for name, value in (("x", 0.5), ("y", 0.5))]
    print_analysis("title", LEAVES, ROWS + extra)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "Keep at more bits first: worst (+0.75), x (+0.5), y (+0.5): 88 % of the loss that "
        "leaves add."
    )


def test_harmless_compression_names_no_leaf(capsys):
    print_analysis("title", LEAVES, [sensitivity("leaf", "mild", 0.0)])
    assert "there is none to keep at more bits" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("count", [1, 100])
def test_pictures_grow_with_the_leaves(tmp_path, count):
    leaves = [leaf(f"blocks_{i}/mlp/fc1/kernel") for i in range(count)]
    rows = [sensitivity("leaf", x.path, 0.01 * (i + 1)) for i, x in enumerate(leaves)]
    plot_analysis(leaves, rows, tmp_path / "picture.png")
    height, width, _ = imread(tmp_path / "picture.png").shape
    assert width == 1200
    assert height > 24 * count  # pixels: room for a name a leaf


def test_pictures_show_the_losses_that_are_known(tmp_path):
    def ink(rows):
        plot_analysis(LEAVES, rows, tmp_path / "picture.png")
        image = imread(tmp_path / "picture.png")
        return np.sum(np.ptp(image[..., :3], axis=-1) > 0.5)  # coloured: bars and legend

    assert ink(()) < ink([sensitivity("leaf", "worst", 0.75)]) < ink(ROWS)


def test_leaves_of_several_methods_are_coloured_apart(tmp_path):
    def colours(leaves):
        plot_analysis(leaves, (), tmp_path / "picture.png")
        image = np.round(255 * imread(tmp_path / "picture.png")[..., :3])
        values, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        return np.sum((np.ptp(values, axis=1) > 100) & (counts > 500))

    assert colours(LEAVES) == 1
    assert colours([*LEAVES, dataclasses.replace(leaf("v"), method="vector")]) == 2
