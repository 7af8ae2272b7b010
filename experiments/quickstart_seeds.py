"""The quickstart with three seeds: mean and standard deviation of every method.

    python experiments/quickstart_seeds.py

Runs ``ssvq quickstart`` for seeds 0, 1, 2 (about five minutes each on two CPU cores; finished seeds
are not run again), copies their results to experiments/results/, and writes the table of
docs/results.md and README.md from those files. ``--only-report`` writes the tables alone.
Expected at 26x: learned signs with freezing above VQ above fixed signs.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import tyro

from ssvq_jax.cli.quickstart import METHODS, QuickstartCommand, compare
from ssvq_jax.json_files import read_json
from ssvq_jax.report.pages import insert

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: seeds to run.
        results: folder that keeps a results file a seed.
        runs: folder for everything else the runs write.
        only_report: write the tables from what is there.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    results: Path = ROOT / "experiments" / "results"
    runs: Path = ROOT / "runs"
    only_report: bool = False


def main(config: Config) -> None:
    files = [config.results / f"quickstart_seed{seed}.json" for seed in config.seeds]
    config.results.mkdir(parents=True, exist_ok=True)
    for seed, file in zip(config.seeds, files, strict=True):
        if not config.only_report and not file.exists():
            command = QuickstartCommand(out=config.runs / f"quickstart_seed{seed}", seed=seed)
            results, _ = compare(command)
            results["config"] |= {"out": f"runs/quickstart_seed{seed}"}
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table([read_json(file) for file in files])
    for page in PAGES:
        insert(page, "quickstart table", text)
    print(text)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown table of mean ± standard deviation over the runs."""
    lines = [
        "| method | bits/weight | ratio | file ratio | before | after fine-tuning | loss |",
        "|---|---|---|---|---|---|---|",
        f"| float32 | 32 | 1.0x | 1.0x | | {_over(runs, 'float', 'accuracy')} "
        f"| {_over(runs, 'float', 'loss', scale=1, digits=4)} |",
    ]
    rows = [run["methods"] for run in runs]
    for name in (method.removesuffix("-shared") for method in METHODS):
        first = rows[0][name]
        lines.append(
            f"| {name} | {first['bits_per_weight']:.3f} | {first['compression_ratio']:.1f}x "
            f"| {first['file_ratio']:.1f}x | {_over(rows, name, 'accuracy_before')} "
            f"| {_over(rows, name, 'accuracy_after')} "
            f"| {_over(rows, name, 'loss_after', scale=1, digits=4)} |"
        )
    examples = runs[0]["float"]["examples"]
    steps = runs[0]["config"]["steps"]
    lines += [
        "",
        f"Test accuracy in % and cross-entropy on {examples:,} digits; mean ± standard deviation "
        f"of {len(runs)} seeds; {steps} updates of fine-tuning each.",
    ]
    return "\n".join(lines)


def _over(
    runs: list[dict[str, Any]], name: str, key: str, *, scale: float = 100, digits: int = 2
) -> str:
    values = [scale * run[name][key] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main(tyro.cli(Config))
