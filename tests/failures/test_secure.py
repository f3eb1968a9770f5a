"""A rank is lost in the middle of secure aggregation: the round is done again with new keys, and nobody is missing."""

from pathlib import Path

import pytest

from fedprompt_mpi import load_prompt
from tests.failures.test_matrix import RANKS, SMALL, TOLERANT
from tests.jobs import launch, read_rounds, run_here

FLAGS = (
    *SMALL, "--client.batched=1", "--federation.rounds=4", "--federation.update_bound=50", "--federation.dropout=0.1",
    "--privacy.secure_aggregation=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(directory, *FLAGS)
    return directory


@pytest.mark.skipif(not TOLERANT, reason="this MPI's launcher ends the job with the first rank")
@pytest.mark.parametrize("collective", ["gather", "reduce"])
@pytest.mark.parametrize("phase", ["keys", "shares", "mask", "unmask"])
def test_a_rank_that_is_lost_between_shares_and_sum(
    phase: str, collective: str, undisturbed: Path, tmp_path: Path
) -> None:
    finished = launch(
        RANKS, "-m", "tests.failures.doomed", f"2:{phase}:2:kill", *FLAGS, f"--comm.collective={collective}",
        f"--output.dir={tmp_path / 'run'}", deadline_s=90, launcher_flags=("--with-ft", "ulfm"),
    )  # fmt: skip
    assert finished.status == 0, finished
    assert "lost rank 2 in round 2" in finished.out
    assert load_prompt(tmp_path / "run").vector.tobytes() == load_prompt(undisturbed).vector.tobytes()
    for ours, theirs in zip(read_rounds(tmp_path / "run"), read_rounds(undisturbed), strict=True):
        assert ours["vanished"] == theirs["vanished"] and ours["given_up"] is None
