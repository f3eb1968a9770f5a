"""Which launcher with which library makes a job."""

import pytest

from fedprompt_mpi.start.launcher import Launch, mismatch, read_launch, set_transport, transport_of

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "11"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "11"}
SLURM = {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "11"}


def test_rank_and_size_from_each_launcher() -> None:
    assert (read_launch(OPEN_MPI).rank, read_launch(OPEN_MPI).size) == (2, 11)
    assert (read_launch(MPICH).rank, read_launch(MPICH).size) == (3, 11)
    assert (read_launch(SLURM).rank, read_launch(SLURM).size) == (4, 11)
    assert (read_launch({}).rank, read_launch({}).size) == (0, 1)
    assert read_launch(SLURM | MPICH).launcher == "Slurm's srun"  # which speaks PMI too
    inside = read_launch(SLURM | MPICH | {"MPI_LOCALRANKID": "0"})  # mpirun inside an allocation
    assert (inside.launcher, inside.rank) == ("MPICH's mpirun", 3)
    assert read_launch(SLURM | OPEN_MPI).launcher == "Open MPI's mpirun"
    assert read_launch(MPICH | {"SLURM_PROCID": "0"}).launcher == "MPICH's mpirun"  # no step of Slurm's


@pytest.mark.parametrize(
    ("environment", "vendor", "fits"),
    [
        (OPEN_MPI, "Open MPI", True),
        (OPEN_MPI, "MPICH", False),
        (OPEN_MPI, "Intel MPI", False),
        (MPICH, "MPICH", True),
        (MPICH, "Intel MPI", True),
        (MPICH, "Open MPI", False),
        (SLURM, "Open MPI", True),
        (SLURM, "MPICH", True),
        ({}, "MPICH", True),
    ],
)
def test_mismatch(environment: dict[str, str], vendor: str, fits: bool) -> None:
    message = mismatch(read_launch(environment), vendor)
    assert (message is None) == fits
    if message:
        assert vendor in message
        assert "11 processes" in message


def test_one_process_never_mismatches() -> None:
    assert mismatch(Launch(rank=0, size=1, launcher="MPICH's mpirun", speaks="pmi"), "Open MPI") is None


def test_transport() -> None:
    mpich = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\n"
    assert transport_of(mpich, {}) == "ch4:ucx ofi"
    assert transport_of(mpich, {"UCX_TLS": "tcp,self"}) == "ch4:ucx ofi; UCX_TLS=tcp,self"
    assert transport_of("Open MPI v5.0.11", {"OMPI_MCA_btl": "tcp,self"}) == "OMPI_MCA_btl=tcp,self"
    assert transport_of("Open MPI v5.0.11", {}) == "the library's choice"


@pytest.mark.parametrize(
    ("environment", "library", "netmod"),
    [
        (SLURM | MPICH | {"PMI_FD": "10"}, "MPICH Device: ch4:ucx ofi", "ofi"),
        (SLURM | MPICH | {"PMI_FD": "10", "MPIR_CVAR_CH4_NETMOD": "ucx"}, "MPICH Device: ch4:ucx ofi", "ucx"),
        (SLURM | MPICH | {"PMI_FD": "10"}, "MPICH Device: ch4:ucx", None),  # has no other
        (SLURM | MPICH | {"PMI_FD": "10"}, "MPICH Device: ch4:ucx ofi\nMPICH configure: --with-pmi=pmi2", None),
        (SLURM, "MPICH Device: ch4:ucx ofi", None),  # srun --mpi=pmix
        (MPICH | {"PMI_FD": "10"}, "MPICH Device: ch4:ucx ofi", None),  # its own mpirun reads requests of any length
    ],
)
def test_mpich_under_srun_takes_the_module_with_short_addresses(
    environment: dict[str, str], library: str, netmod: str | None
) -> None:
    mine = dict(environment)
    set_transport(read_launch(environment), library, mine)
    assert mine.get("MPIR_CVAR_CH4_NETMOD") == netmod
