"""Every worker is killed once in each phase.

Where the launcher lets the others continue (Open MPI with ULFM) two of five ranks are killed in each job, one after the
other, and the result has the bits of an undisturbed run. Elsewhere (three ranks) the job ends, and says who was where.
"""

import itertools
import json
import time
from pathlib import Path

import pytest

from fedprompt_mpi import load_prompt
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.timings import read_timings
from tests.failures.conftest import check_report
from tests.jobs import Finished, find_mpirun, is_open_mpi, launch, read_rounds, run_here

ROUNDS = 5
PHASES = ("broadcast", "train", "gather", "aggregate", "evaluate", "checkpoint")
FLAGS = ("--client.batched=1", f"--federation.rounds={ROUNDS}", "--output.checkpoint_every=2")
SMALL = ("--task.max_train=120", "--task.max_test=24", "--client.steps=2", "--output.report=false")
"""A small run of rounds that take a tenth of a second."""


def _mpirun() -> str:
    mpirun = find_mpirun()
    assert mpirun is not None
    return mpirun


TOLERANT = is_open_mpi(_mpirun()) if find_mpirun() else False
RANKS = 5 if TOLERANT else 3
CELLS = [(worker, phase) for phase in PHASES for worker in range(1, RANKS)]
# one after the other, in rounds 2 and 4 (saved), never the same rank
PAIRS = [((a, p), (a % (RANKS - 1) + 1, q)) for a, (p, q) in itertools.product(
    range(1, RANKS), zip(PHASES[::2], PHASES[1::2], strict=True))]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(directory, *SMALL, *FLAGS)
    return directory


def _run(fates: str, directory: Path) -> tuple[Finished, float]:
    start = time.monotonic()
    finished = launch(
        RANKS, "-m", "tests.failures.doomed", fates, *SMALL, *FLAGS, f"--output.dir={directory}",
        deadline_s=90, launcher_flags=("--with-ft", "ulfm") if TOLERANT else (),
    )  # fmt: skip
    return finished, time.monotonic() - start


def _where(phase: str, round_: int) -> str:
    """Return a phase as a worker goes through it: who waits for rank 0's aggregation has sent its update."""
    return f"{'wait' if phase == 'aggregate' else phase}:{round_}"


def check_timings(directory: Path, survivors: set[int]) -> None:
    """Each survivor has each round once: what was lost on the way was written again, and nothing else."""
    rows = [(round_, rank) for round_, rank, phase, _, _ in read_timings(RunPaths(directory)) if phase == "gather"]
    assert sorted(pair for pair in rows if pair[1] in survivors) == sorted(
        itertools.product(range(1, ROUNDS + 1), survivors)
    )


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_others_go_on(
    pair: tuple[tuple[int, str], tuple[int, str]], table: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    (first, phase), (second, then) = pair
    fates = f"{first}:{_where(phase, 2)}:kill,{second}:{_where(then, 4)}:kill"
    finished, seconds = _run(fates, tmp_path / "run")
    said = finished.out + finished.err
    assert finished.status == 0, said
    assert f"lost rank {first} in round" in finished.out
    assert f"lost rank {second} in round" in finished.out
    assert f"rank {first} on" in finished.err
    assert f"rank {second} on" in finished.err
    assert load_prompt(tmp_path / "run").vector.tobytes() == load_prompt(undisturbed).vector.tobytes()
    ours, theirs = read_rounds(tmp_path / "run"), read_rounds(undisturbed)
    assert [line["round"] for line in ours] == list(range(ROUNDS + 1))
    assert [line["accuracy"] for line in ours] == [line["accuracy"] for line in theirs]
    check_timings(tmp_path / "run", survivors=set(range(RANKS)) - {first, second})
    name = f"rank {first} in {phase}, then {second} in {then}"
    table.append(f"{name:<44}{finished.status:>7}{seconds:>9.1f}  went on, same bits")


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
@pytest.mark.parametrize("phase", ["train", "checkpoint"])
def test_two_at_once_and_a_third_later(phase: str, undisturbed: Path, tmp_path: Path) -> None:
    finished, _ = _run(f"1:{phase}:2:kill,3:{phase}:2:kill,4:train:4:kill", tmp_path / "run")
    assert finished.status == 0, finished
    assert "lost rank 1, 3 in round" in finished.out
    assert "lost rank 4 in round" in finished.out
    assert load_prompt(tmp_path / "run").vector.tobytes() == load_prompt(undisturbed).vector.tobytes()
    lost = json.loads((tmp_path / "run" / "summary.json").read_text())["lost_ranks"]
    assert [loss["ranks"] for loss in lost] == [[1, 3], [4]]
    assert all(loss["seconds"] > 0 for loss in lost)


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
def test_without_rank_0_the_job_ends_and_can_be_resumed(undisturbed: Path, tmp_path: Path) -> None:
    finished, _ = _run("0:aggregate:3:kill", tmp_path / "run")
    assert finished.status == 3
    assert "rank 0, which keeps the records, was lost" in finished.err
    assert "Traceback" not in finished.err
    run_here(tmp_path / "run", *SMALL, *FLAGS, "--output.resume=true")
    assert load_prompt(tmp_path / "run").vector.tobytes() == load_prompt(undisturbed).vector.tobytes()


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
@pytest.mark.parametrize("before", ["", "4:train:2:kill,"], ids=["whole", "after a loss"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_is_not_survived(rank: int, before: str, tmp_path: Path) -> None:
    """The other ranks and the launcher end, although both could continue without the rank that failed."""
    finished, _ = _run(f"{before}{rank}:evaluate:3:raise", tmp_path / "run")
    check_report(finished)
    assert f"rank {rank} of {RANKS} on" in finished.err
    assert "failed in phase evaluate of round 3" in finished.err


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
@pytest.mark.parametrize(
    "before", ["", "4:train:2:kill,", "4:train:4:kill,"], ids=["whole", "after a loss", "with a loss"]
)
def test_a_request_to_stop_is_heard(before: str, undisturbed: Path, tmp_path: Path) -> None:
    finished, _ = _run(f"{before}3:train:4:term", tmp_path / "run")
    assert finished.status == 75, finished
    assert "stopped on request after round 3" in finished.out
    run_here(tmp_path / "run", *SMALL, *FLAGS, "--output.resume=true")
    lost = json.loads((tmp_path / "run" / "summary.json").read_text())["lost_ranks"]
    assert [loss["ranks"] for loss in lost] == ([[4]] if before else [])
    assert load_prompt(tmp_path / "run").vector.tobytes() == load_prompt(undisturbed).vector.tobytes()


DAMAGING = """
import sys
from fedprompt_mpi.rundir import checkpoint
save = checkpoint.save_checkpoint
def save_and_damage(paths, *given):
    save(paths, *given)
    for file in paths.checkpoints():
        file.path.write_bytes(b"torn")
import fedprompt_mpi.federation.federation as federation
federation.save_checkpoint = save_and_damage
import tests.failures.doomed
"""


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
def test_damaged_checkpoints_after_a_loss_are_one_message(tmp_path: Path) -> None:
    """Rank 0 alone reads them; the others do not wait for it for ever."""
    finished = launch(
        RANKS, "-c", DAMAGING, "2:train:4:kill", *SMALL, *FLAGS, f"--output.dir={tmp_path / 'run'}",
        deadline_s=90, launcher_flags=("--with-ft", "ulfm"),
    )  # fmt: skip
    assert finished.status == 2, finished
    assert finished.err.count("fedprompt_mpi: error:") == 1
    assert "is damaged" in finished.err


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
def test_bad_input_is_one_message(tmp_path: Path) -> None:
    finished = launch(
        RANKS, "-m", "fedprompt_mpi", "--task.max_train=5", f"--output.dir={tmp_path / 'run'}",
        deadline_s=60, launcher_flags=("--with-ft", "ulfm"),
    )  # fmt: skip
    assert finished.status == 2
    assert finished.err.count("fedprompt_mpi: error:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(TOLERANT, reason="this MPI's launcher lets the others continue")
@pytest.mark.parametrize(("worker", "phase"), CELLS)
def test_the_job_ends_and_says_who_was_where(worker: int, phase: str, tmp_path: Path, table: list[str]) -> None:
    finished, seconds = _run(f"{worker}:{_where(phase, 2)}:kill", tmp_path / "run")
    assert finished.status not in (0, 2, 3, 75)
    assert finished.err.count("fedprompt_mpi:") == 1, finished
    line = next(line for line in finished.err.splitlines() if line.startswith("fedprompt_mpi:"))
    assert f"rank {worker} on" in line
    assert f"rank {worker} in {_where(phase, 2).split(':')[0]} of round 2" in line
    assert all(f"rank {rank} in " in line for rank in range(RANKS))
    table.append(f"{f'rank {worker} in {phase}':<44}{finished.status:>7}{seconds:>9.1f}  ended, named")
