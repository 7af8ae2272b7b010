"""The console command ``ssvq``."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from ssvq_jax.cli.analyze import AnalyzeCommand
from ssvq_jax.cli.compress import CompressCommand
from ssvq_jax.cli.evaluate import EvalCommand
from ssvq_jax.cli.finetune import FinetuneCommand
from ssvq_jax.cli.plan import PlanCommand
from ssvq_jax.cli.quickstart import QuickstartCommand
from ssvq_jax.cli.train import TrainCommand

Command = (
    Annotated[QuickstartCommand, tyro.conf.subcommand("quickstart", prefix_name=False)]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan", prefix_name=False)]
    | Annotated[TrainCommand, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[AnalyzeCommand, tyro.conf.subcommand("analyze", prefix_name=False)]
    | Annotated[CompressCommand, tyro.conf.subcommand("compress", prefix_name=False)]
    | Annotated[FinetuneCommand, tyro.conf.subcommand("finetune", prefix_name=False)]
    | Annotated[EvalCommand, tyro.conf.subcommand("eval", prefix_name=False)]
)


DESCRIPTION = "Compress trained JAX models 10 to 30 times and check what it costs."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: the command line; by default the program's own.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises as well
    try:
        tyro.cli(Command, prog="ssvq", description=DESCRIPTION, args=arguments).run()
    except (ValueError, OSError) as error:  # messages that say what to change
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
