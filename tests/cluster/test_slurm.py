"""The scripts of launch/ under a real Slurm: submitted, finished, results in the run directory."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import GPUS, Slurm, why_not
from tests.cluster.virtual import Cluster
from tests.jobs import REPOSITORY, SMALL, find_mpirun, is_open_mpi, read_rounds

LAUNCH = REPOSITORY / "launch"
USED_MEMORY = Path(__file__).parent / "used_memory"
START_DEADLINE_S = 8
PLACES = """
import os
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.comm.placement import bind_device
channel = open_channel(read_launch())
gpus = len([gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
text = f"{channel.placement.host} {gpus} {bind_device(gpus, channel.placement, is_worker=channel.rank > 0)}"
lines = channel.collect(text.encode())
print("\\n".join(line.decode() for line in lines), end="\\n" if lines else "", flush=True)
channel.close()
"""


@pytest.fixture(scope="module")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"Slurm {reason}")
    cluster.limit(1000)
    running = Slurm(cluster, tmp_path_factory.mktemp("slurm"))
    yield running
    running.close()


def _variables(**more: str) -> dict[str, str]:
    """Return what a user has set up before sbatch: the environment of the package and the wire."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    wire = {"UCX_TLS": "tcp,self,sysv,posix", "UCX_NET_DEVICES": "eth0"}
    wire |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    wire |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,sm,self", "OMPI_MCA_btl_tcp_if_include": "eth0"}
    return {"PATH": path, "PYTHONPATH": f"{REPOSITORY}:{USED_MEMORY}", **wire, **more}


def _open_mpi() -> bool:
    mpirun = find_mpirun()
    return mpirun is not None and is_open_mpi(mpirun)


@pytest.mark.parametrize("launch", ["srun", "mpirun"])
def test_a_job_on_all_nodes(slurm: Slurm, launch: str, tmp_path: Path) -> None:
    if _open_mpi() and launch == "srun":
        pytest.skip("Open MPI's wheel needs Slurm's PMIx of its own version; its mpirun is tested")
    log, directory = tmp_path / "job.log", tmp_path / "run"
    states = slurm.submit(
        "--ntasks=3", "--ntasks-per-node=1", f"--output={log}", str(LAUNCH / "slurm.sh"), *SMALL,
        f"--output.dir={directory}", "--comm.mode=measure", variables=_variables(LAUNCH=launch),
    )  # fmt: skip
    assert list(states.values()) == ["COMPLETED"], log.read_text()
    assert "round 2/2" in log.read_text()
    ranks = json.loads((directory / "environment.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == ["node0", "node1", "node2"]
    assert [record["round"] for record in read_rounds(directory)] == [0, 1, 2]


def test_a_rank_that_leaves_before_mpi_has_started_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """Under srun, too: it ends the job with the first rank that fails, here the first that the start deadline kills."""
    if _open_mpi():
        pytest.skip("Open MPI's wheel needs Slurm's PMIx of its own version")
    log, directory, python = tmp_path / "job.log", tmp_path / "run", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" != 1 ] || exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    variables = _variables()
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    start = time.monotonic()
    states = slurm.submit(
        "--ntasks=3", "--ntasks-per-node=1", f"--output={log}", str(LAUNCH / "slurm.sh"), *SMALL,
        f"--output.dir={directory}", f"--comm.start_deadline_s={START_DEADLINE_S}", variables=variables,
    )  # fmt: skip
    assert list(states.values()) == ["FAILED"], log.read_text()
    assert time.monotonic() - start < START_DEADLINE_S + 40
    assert f"MPI has not started on all ranks within {START_DEADLINE_S} s (comm.start_deadline_s)" in log.read_text()
    assert not directory.exists()


def test_a_job_array_over_recipes(slurm: Slurm, tmp_path: Path) -> None:
    recipes = []
    for name, clients in (("four", 4), ("five", 5)):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(
            f"[federation]\nclients = {clients}\nrounds = 1\n[client]\nsteps = 1\n[task]\nmax_train = 60\n"
        )
        recipes.append(str(recipe))
    launch = "mpirun" if _open_mpi() else "srun"
    flags = "--task.max_test=20 --poison.clients '[0, 1]'"
    variables = _variables(LAUNCH=launch, RUNS=str(tmp_path / "runs"), RUN_FLAGS=flags)
    submit = (
        "--array=0-1", "--ntasks=3", "--ntasks-per-node=1", f"--output={tmp_path}/%a.log",
        str(LAUNCH / "slurm-array.sh"), *recipes,
    )  # fmt: skip
    states = slurm.submit(*submit, variables=variables)
    logs = (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert list(states.values()) == ["COMPLETED"] * 2, logs
    for name, clients in (("four", 4), ("five", 5)):
        assert len(read_rounds(tmp_path / "runs" / name)[1]["cohort"]) == clients
        partition = json.loads((tmp_path / "runs" / name / "partition.json").read_text())
        assert [client["client"] for client in partition["clients"] if client["malicious"]] == [0, 1]
    again = slurm.submit(*submit, variables=variables)
    assert list(again.values()) == ["COMPLETED"] * 2
    assert f"{tmp_path}/runs/four is done" in (tmp_path / "0.log").read_text()


def test_one_gpu_a_worker_and_none_for_rank_0(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm hands out two (fake) GPUs on each of two nodes; five ranks, rank 0 takes none."""
    if _open_mpi():
        pytest.skip("the same binding under MPICH's srun is tested; Open MPI's mpirun adds nothing to it")
    program, log = tmp_path / "places.py", tmp_path / "gpus.log"
    program.write_text(PLACES)
    states = slurm.submit(
        "--nodes=2", "--ntasks=5", "--ntasks-per-node=3", f"--gres=gpu:{GPUS}", f"--output={log}",
        f"--wrap=srun --mpi=pmi2 {sys.executable} {program} 2>/dev/null", variables=_variables(),
    )  # fmt: skip
    assert list(states.values()) == ["COMPLETED"], log.read_text()
    rows = [line.split() for line in log.read_text().splitlines()]
    assert rows == [
        ["node0", "2", "cpu"], ["node0", "2", "cuda:0"], ["node0", "2", "cuda:1"],
        ["node1", "2", "cuda:0"], ["node1", "2", "cuda:1"],
    ]  # fmt: skip


def test_a_signal_before_the_time_limit_and_a_resume(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm signals the script, which passes it on; the ranks save, the job queues again and continues where it was."""
    log, directory = tmp_path / "job.log", tmp_path / "run"
    job = slurm.call(
        "sbatch", "--parsable", "--ntasks=3", "--ntasks-per-node=1", "--open-mode=append", f"--output={log}",
        str(LAUNCH / "slurm.sh"), *SMALL, f"--output.dir={directory}", "--federation.rounds=30", "--client.steps=10",
        "--output.evaluate_every=30", "--comm.deadline_s=60",
        **_variables(LAUNCH="mpirun" if _open_mpi() else "srun"),
    ).strip()  # fmt: skip
    slurm.wait_for(lambda: log.exists() and "round  3/30" in log.read_text(), "round 3", deadline_s=120)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(lambda: "stopped on request after round" in log.read_text(), "the stop", deadline_s=60)
    slurm.wait_for(lambda: slurm.field(job, "Restarts") == "1", "the requeue", deadline_s=60)
    slurm.release(job)
    states = slurm.wait_for_end(job, deadline_s=240)
    assert states == {job: "COMPLETED"}, log.read_text()
    assert [record["round"] for record in read_rounds(directory)] == list(range(31))
