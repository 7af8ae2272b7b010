"""What compression does before any fine-tuning, leaf by leaf: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from ssvq_jax.analysis import LeafReport, Sensitivity
from ssvq_jax.report.tables import print_table

_NAMED = 3  # leaves that the closing sentence names
_LEAF_HEIGHT = 0.22  # inches of a bar in the picture


def print_analysis(
    title: str, leaves: Sequence[LeafReport], sensitivities: Sequence[Sensitivity] = ()
) -> None:
    """Prints errors and loss, then signs and codes, the most damaging leaf first.

    Args:
        title: heading.
        leaves: the compressed leaves.
        sensitivities: what is known of the loss; leaves without one come last, by their error.
    """
    found = _by_leaf(sensitivities)
    ordered = _by_damage(leaves, found)
    base = _scope(sensitivities, "float")
    if base is not None:
        title = (
            f"{title}; float model on {base.examples:,} examples: loss {base.loss:.4f}, accuracy "
            f"{100 * base.accuracy:.2f} %"
        )
    columns = ("leaf", "method", "weights", "bits/weight", "error %", "SQNR dB", "cosine")
    rows = [(*_error_cells(leaf), *_loss_cells(found.get(leaf.path))) for leaf in ordered]
    totals = _total_cells(leaves, found, _scope(sensitivities, "all"))
    print_table(title, (*columns, "Δ loss", "Δ accuracy"), [*rows, (), *totals])
    columns = ("leaf", "negative %", "wrong sign %", "near zero %", "codewords used", "entropy")
    print_table("signs and codes", (*columns, "imbalance"), [_sign_cells(leaf) for leaf in ordered])
    if found:
        print(_advice(found))


def plot_analysis(
    leaves: Sequence[LeafReport], sensitivities: Sequence[Sensitivity], file: Path
) -> None:
    """Draws the loss that each leaf costs beside its error, the most damaging leaf on top.

    Args:
        leaves: the compressed leaves.
        sensitivities: what is known of the loss; leaves without one have no bar.
        file: where to write the picture; the ending decides the format.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    found = _by_leaf(sensitivities)
    ordered = _by_damage(leaves, found)
    height = 2.0 + _LEAF_HEIGHT * max(len(ordered), 4)
    figure = Figure(figsize=(10, height), layout="constrained", dpi=120)
    loss, error = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    methods = list(dict.fromkeys(f"{leaf.method} {leaf.settings}" for leaf in leaves))
    for i, method in enumerate(methods):
        places = [p for p, x in enumerate(ordered) if f"{x.method} {x.settings}" == method]
        members = [ordered[place] for place in places]
        known = {p: found[x.path] for p, x in zip(places, members, strict=True) if x.path in found}
        style = {"color": f"C{i}", "label": method, "height": 0.75}
        loss.barh(list(known), [row.loss_increase for row in known.values()], **style)
        error.barh(places, [100 * (leaf.error.relative or 0.0) for leaf in members], **style)
    loss.set_yticks(range(len(ordered)), [leaf.path for leaf in ordered], fontsize="small")
    loss.set_ylim(len(ordered) - 0.4, -0.6)
    loss.axvline(0, color="black", linewidth=0.8)
    loss.set(xlabel="loss increase with this leaf alone compressed, nats")
    error.set(xlabel="relative error ‖W - Ŵ‖² / ‖W‖², %")
    error.tick_params(axis="y", left=False)
    for axes in (loss, error):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(_headline(found, _scope(sensitivities, "all")))
    figure.savefig(file)


def _headline(found: dict[str, Sensitivity], whole: Sensitivity | None) -> str:
    text = "Compressed, before fine-tuning"
    if whole is not None:
        text += f": loss {whole.loss_increase:+.3g} with all leaves at once"
    if found:
        increases = sum(row.loss_increase for row in found.values())
        text += f", {increases:+.3g} summed over single leaves"
    return text


def _advice(found: dict[str, Sensitivity]) -> str:
    """Names the leaves whose bits matter most."""
    harmful = {path: row.loss_increase for path, row in found.items() if row.loss_increase > 0}
    if not harmful:
        return "No leaf raises the loss on its own: there is none to keep at more bits."
    first = sorted(harmful, key=lambda path: -harmful[path])[:_NAMED]
    named = ", ".join(f"{path} ({harmful[path]:+.3g})" for path in first)
    share = sum(harmful[path] for path in first) / sum(harmful.values())
    return f"Keep at more bits first: {named}: {100 * share:.0f} % of the loss that leaves add."


def _by_leaf(sensitivities: Sequence[Sensitivity]) -> dict[str, Sensitivity]:
    return {row.path: row for row in sensitivities if row.scope == "leaf"}


def _scope(sensitivities: Sequence[Sensitivity], scope: str) -> Sensitivity | None:
    return next((row for row in sensitivities if row.scope == scope), None)


def _by_damage(leaves: Sequence[LeafReport], found: dict[str, Sensitivity]) -> list[LeafReport]:
    def rank(leaf: LeafReport) -> tuple[bool, float, float]:
        row = found.get(leaf.path)
        damage = row.loss_increase if row else 0.0
        return row is None, -damage, -(leaf.error.relative or 0.0)

    return sorted(leaves, key=rank)


def _error_cells(leaf: LeafReport) -> tuple[str, ...]:
    error = leaf.error
    return (
        leaf.path,
        f"{leaf.method} {leaf.settings}",
        f"{leaf.weights:,}",
        f"{leaf.bits_per_weight:.4f}",
        _number(error.relative and 100 * error.relative, "#.3g"),
        _number(error.sqnr, ".1f"),
        _number(error.cosine, ".4f"),
    )


def _loss_cells(row: Sensitivity | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return f"{row.loss_increase:+.4f}", f"{-100 * row.accuracy_drop + 0.0:+.2f} %"  # no minus zero


def _total_cells(
    leaves: Sequence[LeafReport], found: dict[str, Sensitivity], whole: Sensitivity | None
) -> list[tuple[str, ...]]:
    weights = sum(leaf.weights for leaf in leaves)
    bits = sum(leaf.bits_per_weight * leaf.weights for leaf in leaves) / max(weights, 1)
    whole_cells = "", "", "", *_loss_cells(whole)
    rows: list[tuple[str, ...]] = [("all at once", "", f"{weights:,}", f"{bits:.4f}", *whole_cells)]
    if found:
        increase = sum(row.loss_increase for row in found.values())
        rows.insert(0, ("leaves summed", *[""] * 6, f"{increase:+.4f}", ""))
    return rows


def _sign_cells(leaf: LeafReport) -> tuple[str, ...]:
    signs = [leaf.signs.negative, leaf.signs.wrong, leaf.signs.near_zero]
    cells = (leaf.path, *(f"{100 * share:.1f}" for share in signs))
    if leaf.codes is None:
        return (*cells, "", "", "")
    codes = leaf.codes
    name = f" of {leaf.entry}" if leaf.entry != leaf.path else ""
    return (
        *cells,
        f"{codes.used:,}/{codes.codewords:,}{name}",
        f"{codes.entropy:.2f}/{codes.entropy_limit:.2f}",
        f"{codes.imbalance:.2f}",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
