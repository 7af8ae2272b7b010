"""The console command ``ssvq``."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from ssvq_jax.cli.plan import PlanCommand
from ssvq_jax.cli.quickstart import QuickstartCommand

Command = (
    Annotated[QuickstartCommand, tyro.conf.subcommand("quickstart", prefix_name=False)]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan", prefix_name=False)]
)


DESCRIPTION = "Compress trained JAX models 10 to 30 times and check what it costs."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: the command line; by default the program's own.
    """
    try:
        tyro.cli(Command, prog="ssvq", description=DESCRIPTION, args=arguments).run()
    except (ValueError, OSError) as error:  # messages that say what to change
        sys.exit(f"ssvq: error: {error}")
    except KeyboardInterrupt:
        sys.exit("ssvq: interrupted; run the same command to start again")
