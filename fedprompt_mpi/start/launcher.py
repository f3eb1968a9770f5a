"""How this process was started: the rank and the size that its launcher tells, and what MPI needs to start under it.

What a launcher tells may be half of it, and MPI may see another world. So where there is any sign of a launcher MPI is
asked (`comm.start`), and this file says what its answer means.
"""

import dataclasses
import os
from collections.abc import Mapping, MutableMapping


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How this process was started."""

    rank: int
    size: int | None
    """None if the launcher does not tell it."""
    launcher: str
    """For people: "Open MPI's mpirun", "MPICH's mpirun", "Slurm's srun", or "none"."""

    @property
    def is_alone(self) -> bool:
        """True if this process is a job of its own; False if MPI has to be asked."""
        return self.size == 1


SRUN, MPICH = "Slurm's srun", "MPICH's mpirun"
_LAUNCHERS: tuple[tuple[str, str | None, str], ...] = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun_rsh"),
    ("MPIRUN_RANK", "MPIRUN_NPROCS", "MVAPICH's mpirun_rsh"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "Flux"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "LSF's jsrun"),
    ("PALS_RANKID", "PMI_SIZE", "PALS (mpiexec of Cray systems)"),
    ("ALPS_APP_PE", "PMI_SIZE", "ALPS (aprun)"),
    ("PMI_RANK", "PMI_SIZE", MPICH),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", SRUN),
    ("PMIX_RANK", None, "a launcher that speaks PMIx"),
)
"""Variable of the rank, of the size, and who sets them; most specific first."""
_ONLY_HYDRA_SETS = "MPI_LOCALRANKID"
_JOBS = (
    ("SLURM_JOB_ID", "Slurm", "SLURM_NTASKS"),
    ("PBS_JOBID", "PBS", "PBS_NP"),
    ("LSB_JOBID", "LSF", "LSB_DJOB_NUMPROC"),
    ("FLUX_JOB_ID", "Flux", "FLUX_JOB_SIZE"),
    ("JOB_ID", "Grid Engine", "NSLOTS"),
)
"""Variable of a batch job, its system, and the variable of the number of tasks."""


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment says; a process that no launcher started is rank 0 of 1."""
    # srun and Flux speak MPICH's protocol too, and MPICH's mpirun may run in a step or a batch job of theirs
    by_hydra, in_step = _ONLY_HYDRA_SETS in environment, "SLURM_STEP_NUM_TASKS" in environment
    left_out = MPICH if in_step else SRUN
    for rank, size, launcher in _LAUNCHERS:
        told = environment.get(size or "", "")
        fits = launcher == MPICH if by_hydra else launcher != left_out
        if fits and environment.get(rank, "").isdigit():
            return Launch(rank=int(environment[rank]), size=int(told) if told.isdigit() else None, launcher=launcher)
    return Launch(rank=0, size=1, launcher="none")


def lonely_in_a_job(launch: Launch, environment: Mapping[str, str] = os.environ) -> str:
    """Return a warning if no launcher started this process, though its batch job has several tasks; else nothing."""
    if launch.launcher != "none":
        return ""
    for job, system, tasks in _JOBS:
        told = environment.get(tasks, "")
        if job in environment and told.isdigit() and int(told) > 1:
            return (
                f"{system} has given this job {told} tasks, but no launcher started this process, which runs alone: "
                "start it with srun or mpirun"
            )
    return ""


_LOCAL_SIZES = (
    "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"
)  # fmt: skip


def ranks_on_this_node(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return how many ranks the launcher has started on this node; None if it started several and does not tell."""
    if read_launch(environment).is_alone:
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


def wrong_world(launch: Launch, size: int, library: str) -> str | None:
    """Explain why MPI's world of `size` ranks is not what the launcher started, or return None if it may be.

    Where library and launcher do not understand each other, each process is a world of its own.

    Args:
        launch: from `read_launch`.
        size: of MPI's world.
        library: the library's whole version text.
    """
    if size == launch.size or (launch.size is None and size > 1):
        return None
    name, other = " ".join(library.split()[:3]).rstrip(","), "mpich" if is_open_mpi(library) else "openmpi"
    if launch.size is None:
        return (
            f"{launch.launcher} started this process, but in MPI's world it is alone. If it should be, start it "
            f"without a launcher; else that launcher and mpi4py's library ({name}) do not understand each other: "
            "start with the mpirun that belongs to the library, or let mpi4py find your site's own"
        )
    return (
        f"{launch.launcher} started {launch.size} processes, but MPI sees a world of {size}: mpi4py is bound to "
        f"{name}, which does not understand that launcher. Start with the mpirun that belongs to it, or install the "
        f"MPI of this launcher (pip install {other})"
    )


def is_open_mpi(library: str) -> bool:
    """Return True for a library of Open MPI's family, False for one with MPICH's binary interface.

    IBM's Spectrum MPI and Fujitsu's MPI are Open MPIs; MVAPICH, Intel's and Cray's MPI are MPICHs.
    """
    return any(name in library for name in ("Open MPI", "Spectrum MPI", "FUJITSU MPI"))


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


def is_fault_tolerant(library: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the job was started so that it survives a lost rank: by Open MPI's mpirun --with-ft ulfm."""
    return is_open_mpi(library) and environment.get("OMPI_MCA_mpi_ft_enable", "0") not in ("0", "false")
