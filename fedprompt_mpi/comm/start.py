"""Start MPI, if a launcher started several processes, and open the channel of the job."""

import contextlib
import os
import socket
import sys
from typing import Any

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.config import CommConfig, SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.start_guard import default_signals, start_guard
from fedprompt_mpi.start.launcher import Launch, lonely_in_a_job, set_transport, wrong_world

SHARED_BYTES_PER_RANK = 5_400_000
"""What MPICH 5.0 takes in shared memory, measured with 2 to 11 ranks on a host."""


def open_channel(launch: Launch, liveness: Liveness | None = None, config: CommConfig | None = None) -> Channel:
    """Return the channel of this job: over MPI if there is a sign of a launcher with several processes, else local.

    Args:
        launch: from the launcher's environment.
        liveness: of this process; by default one that ends nothing.
        config: mode and deadlines; the defaults if None.

    Raises:
        SettingsError: if there is no MPI library, or it is another one than the launcher's.
    """
    config, liveness = config or CommConfig(), liveness or Liveness(rank=launch.rank, size=launch.size)
    if launch.is_alone:
        from fedprompt_mpi.comm.local_channel import LocalChannel

        if liveness.ends_job and (warning := lonely_in_a_job(launch)):
            print(f"fedprompt_mpi: warning: {warning}", file=sys.stderr, flush=True)
        return LocalChannel(liveness)
    from fedprompt_mpi.comm.mpi_channel import MPIChannel

    mpi = start_mpi(launch, liveness, config.start_deadline_s)
    return MPIChannel(mpi.COMM_WORLD, liveness, measure=config.mode == "measure")


def shared_memory_warning(vendor: str, place: str = "/dev/shm") -> str:
    """Return what is wrong with the shared memory of this host; empty if nothing is, or another rank says it.

    MPICH ends with a bus error, or without a word, where it is too small. Open MPI takes another way by itself.

    Args:
        vendor: mpi4py's name of the MPI library.
        place: where the system keeps shared memory.
    """
    ranks = os.environ.get("MPI_LOCALNRANKS", "")
    if vendor != "MPICH" or os.environ.get("MPI_LOCALRANKID") != "0" or not ranks.isdigit():
        return ""
    try:
        space = os.statvfs(place)
    except OSError as error:
        return f"{place} on {socket.gethostname()} cannot be used ({error.strerror}), and MPICH needs it"
    if space.f_flag & os.ST_RDONLY:
        return f"{place} on {socket.gethostname()} is read-only, and MPICH needs to write there"
    free, needed = space.f_bavail * space.f_frsize, int(ranks) * SHARED_BYTES_PER_RANK
    if free >= needed:
        return ""
    return (
        f"{place} on {socket.gethostname()} has {free:,} bytes free, and MPICH may need {needed:,} there for {ranks} "
        "ranks: make it larger if MPI does not start"
    )


def start_mpi(launch: Launch, liveness: Liveness, deadline_s: float) -> Any:
    """Start MPI and return mpi4py's module.

    Until MPI has started, signals have their default actions, and on the command line a deadline holds.

    Raises:
        SettingsError: if there is no MPI library, or it is another one than the launcher's.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # the environment is set first
        mpi4py.rc.finalize = True  # at exit
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SettingsError(
            f"{launch.launcher} started {launch.size or 'several'} processes, but mpi4py finds no MPI library "
            f"({error}): install one (pip install mpi4py mpich), or load your cluster's module"
        ) from error
    if not MPI.Is_initialized():
        if warning := shared_memory_warning(MPI.get_vendor()[0]):
            print(f"fedprompt_mpi: warning: {warning}", file=sys.stderr, flush=True)
        set_transport(launch, MPI.Get_library_version())
        guard: contextlib.AbstractContextManager[None] = default_signals()
        if liveness.ends_job and launch.size is not None:  # else nobody knows which ranks are missing
            guard = start_guard(launch.rank, launch.size, deadline_s)
        with guard:
            MPI.Init_thread()
    if wrong := wrong_world(launch, MPI.COMM_WORLD.size, MPI.Get_library_version()):
        raise SettingsError(wrong)
    liveness.rank, liveness.size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    return MPI
