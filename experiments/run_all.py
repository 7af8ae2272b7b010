"""Runs the experiments one after the other, and writes their tables into docs/results.md.

    python experiments/run_all.py --data-dir DIR --processes 2
    python experiments/run_all.py --only compression_curve --seeds 0 1 2 --hours 3
    python experiments/run_all.py --only-report

Everything is cut into units of minutes and goes on where it was; a stop costs one unit. With two
processes on two cores, each has a core of its own, which is faster than sharing both.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import tyro
from units import Options

# In this order: the later ones use what the search chose.
EXPERIMENTS = (
    "compression_tuning",
    "compression_curve",
    "ablation_freezing",
    "gradient_dominance",
    "efficientnet_lite0",
    "language_curve",
    "language_finetuning",
    "language_activations",
)
LANGUAGE = ("language_curve", "language_finetuning", "language_activations")  # need a text
SEARCHES = ("compression_tuning",)  # have seeds of their own, and no tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Settings; `part` and `out` are those of a single experiment.

    Attributes:
        only: experiments to run; by default all.
        processes: that share the units of an experiment.
        wikipedia: dump of articles, for the language experiments, which are left out without.
        wikitext: WikiText-2's validation text, for the same.
    """

    only: tuple[str, ...] = EXPERIMENTS
    processes: int = 1
    wikipedia: Path | None = None
    wikitext: Path | None = None


def command(name: str, config: Config, hours: float) -> list[str]:
    """The command line of one experiment."""
    words = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
    if config.data_dir is not None:
        words += ["--data-dir", str(config.data_dir)]
    if name not in SEARCHES:
        words += ["--seeds", *map(str, config.seeds)]
    if name in LANGUAGE:
        texts = {"--wikipedia": config.wikipedia, "--wikitext": config.wikitext}
        words += [word for option, file in texts.items() if file for word in (option, str(file))]
    words += ["--quick"] * config.quick + ["--only-report"] * config.only_report
    return [*words, "--hours", str(hours)]


def run(words: list[str], processes: int) -> None:
    """Runs an experiment in as many processes, each on cores of its own.

    Raises:
        SystemExit: if one of them fails.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    started = []
    for index in range(processes):
        own = cores[index::processes]
        if own and processes > 1:
            os.sched_setaffinity(0, own)  # inherited by the process that is started
        started.append(subprocess.Popen([*words, "--part", f"{index + 1}/{processes}"]))
    if cores:
        os.sched_setaffinity(0, cores)
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"failed: {' '.join(words)}; run this one alone to see why")


def main(config: Config) -> None:
    unknown = sorted(set(config.only) - set(EXPERIMENTS))
    if unknown:
        raise SystemExit(f"only={unknown}: choose of {', '.join(EXPERIMENTS)}")
    if config.processes < 1 or config.part != "1/1" or config.out is not None:
        raise SystemExit("give processes of at least 1; part and out are for a single experiment")
    began = time.perf_counter()
    for name in config.only:
        left = config.hours - (time.perf_counter() - began) / 3600
        if left <= 0:
            print(f"no time is left for {name}: the same command goes on")
            break
        if name in SEARCHES and (config.only_report or config.quick):
            continue  # no tables, and --quick takes rates that were not searched for
        if name in LANGUAGE and not (config.wikipedia or config.quick or config.only_report):
            print(f"{name} is left out: give --wikipedia with a dump of articles")
            continue
        print(f"== {name}", flush=True)
        if not config.only_report:
            run(command(name, config, left), config.processes)
        if not config.quick and name not in SEARCHES:
            told = dataclasses.replace(config, only_report=True)
            subprocess.run([*command(name, told, left)], check=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
