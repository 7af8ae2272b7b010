"""The console command ``ssvq``."""

import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from ssvq_jax.cli.analyze import AnalyzeCommand
from ssvq_jax.cli.compress import CompressCommand
from ssvq_jax.cli.cost import CostCommand
from ssvq_jax.cli.evaluate import EvalCommand
from ssvq_jax.cli.export import ExportCommand
from ssvq_jax.cli.finetune import FinetuneCommand
from ssvq_jax.cli.generate import GenerateCommand
from ssvq_jax.cli.inspect import InspectCommand
from ssvq_jax.cli.models import ModelsCommand
from ssvq_jax.cli.options import check_out
from ssvq_jax.cli.pack import PackCommand
from ssvq_jax.cli.plan import PlanCommand
from ssvq_jax.cli.quickstart import QuickstartCommand
from ssvq_jax.cli.train import TrainCommand

Command = (
    Annotated[QuickstartCommand, tyro.conf.subcommand("quickstart", prefix_name=False)]
    | Annotated[ModelsCommand, tyro.conf.subcommand("models", prefix_name=False)]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan", prefix_name=False)]
    | Annotated[CostCommand, tyro.conf.subcommand("cost", prefix_name=False)]
    | Annotated[TrainCommand, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[AnalyzeCommand, tyro.conf.subcommand("analyze", prefix_name=False)]
    | Annotated[CompressCommand, tyro.conf.subcommand("compress", prefix_name=False)]
    | Annotated[FinetuneCommand, tyro.conf.subcommand("finetune", prefix_name=False)]
    | Annotated[EvalCommand, tyro.conf.subcommand("eval", prefix_name=False)]
    | Annotated[GenerateCommand, tyro.conf.subcommand("generate", prefix_name=False)]
    | Annotated[PackCommand, tyro.conf.subcommand("pack", prefix_name=False)]
    | Annotated[InspectCommand, tyro.conf.subcommand("inspect", prefix_name=False)]
    | Annotated[ExportCommand, tyro.conf.subcommand("export", prefix_name=False)]
)

_INTO_A_FILE = (ExportCommand, InspectCommand, PackCommand, PlanCommand)

DESCRIPTION = "Compress trained JAX models 10 to 30 times and check what it costs."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: the command line; by default the program's own.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises as well
    warnings.formatwarning = _format_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of leaves may hold any character
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None:
        _keep_compiled()
    try:
        command = tyro.cli(Command, prog="ssvq", description=DESCRIPTION, args=arguments)
        if (out := getattr(command, "out", None)) is not None:
            check_out(out, folder=not isinstance(command, _INTO_A_FILE))
        command.run()
    except (ValueError, OSError, ImportError) as error:  # messages that say what to change
        sys.exit(f"ssvq: error: {error}")
    except KeyboardInterrupt:
        print(
            "\nssvq: interrupted; the same command, without --no-resume, goes on", file=sys.stderr
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: libraries' threads that are at work in the middle of a computation may
        # crash while Python winds down. What is to be kept is on disk by now.
        os._exit(130)  # as the shell reports an interrupt


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """One line for people; who wrote the code that warns wants to know where it is."""
    where = "" if category is UserWarning else f" ({filename}:{lineno})"
    return f"ssvq: warning: {message}{where}\n"


def _keep_compiled() -> None:
    """Keeps compiled programs on disk, so that the next command starts sooner.

    JAX's own variable ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return
    # By machine: what is compiled for one processor need not run on another that shares the home.
    folder = root / "ssvq_jax" / "compiled" / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
