"""The command run: federated prompt tuning; rank 0 aggregates, the other ranks hold the clients."""

from collections.abc import Sequence

from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.liveness.liveness import Liveness


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Parse the settings and run."""
    config = parse_settings(arguments)
    from fedprompt_mpi.run import run

    run(config, liveness=liveness)
