"""The command run: federated prompt tuning; rank 0 aggregates, the other ranks hold the clients."""

import socket
from collections.abc import Sequence

from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.plugins.load import loaded
from fedprompt_mpi.rules.setting import OwnFileError
from fedprompt_mpi.start.launcher import read_launch


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Parse the settings and run."""
    config = _settings(arguments, liveness)
    from fedprompt_mpi.run import run

    run(config, liveness=liveness)


def _settings(arguments: Sequence[str], liveness: Liveness) -> RunConfig:
    """Return the settings; a rank whose files are wrong tells the others, which wait for it in `prepare`.

    Raises:
        SettingsError: if they are wrong.
    """
    launch = read_launch()
    try:
        return parse_settings(arguments)
    except SettingsError as error:
        if launch.is_alone or not (loaded() or isinstance(error, OwnFileError)):
            raise
        from fedprompt_mpi.comm.start import open_channel

        channel = open_channel(launch, liveness)
        message = channel.agree(f"{error} (rank {channel.rank} on {socket.gethostname()})")
        channel.close()
        raise SettingsError(message or str(error)) from error
