"""Ranks that wait for each other in different collectives end the job, each named with its collective."""

import re
import time
from pathlib import Path

import pytest

from fedprompt_mpi.config import CommConfig, FederationConfig, OutputConfig, RunConfig, TaskConfig
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.watchdog import StalledError
from tests.jobs import SMALL, launch, run_here

DIFFERENT = """
import sys, numpy as np
from mpi4py import MPI  # starts it: the deadline below is not for that
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.liveness.liveness import Liveness

launch = read_launch()
live = Liveness(rank=launch.rank, size=launch.size, ends_job=sys.argv[1] == "command")
with live.watched(1.5):
    channel = open_channel(launch, live)
    try:
        channel.close() if channel.rank == 0 else channel.sum(np.zeros(1))
    except RuntimeError as error:
        print(f"rank {channel.rank}: {type(error).__name__}: {error}", flush=True)
        if channel.rank == 2:
            import time
            time.sleep(3)  # the others find it out for themselves
        raise SystemExit(7)
"""
SLOW_BUT_ALIVE = """
import sys, time, numpy as np
from mpi4py import MPI  # starts it: the deadline below is not for that
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.liveness.liveness import Liveness

launch = read_launch()
live = Liveness(rank=launch.rank, size=launch.size, ends_job=True)
with live.watched(1.5):
    channel = open_channel(launch, live)
    for round_ in range(2):
        if channel.rank == 1:
            until = time.monotonic() + 4.5
            while time.monotonic() < until:
                live.step()
                time.sleep(0.05)
        channel.consult(np.zeros(1), np.ones(3, dtype=np.int64), np.sum, np.zeros(1))
        channel.tell(np.zeros(1))
        channel.sum(np.zeros(1))
    channel.close()
    print("fine", flush=True)
"""


SLOW_TO_SHARE = SLOW_BUT_ALIVE.replace(
    "    for round_ in range(2):", "    channel.connect(np.array([1, 2]))\n    for round_ in range(2):"
).replace(
    "        channel.consult(",
    "        channel.share(np.zeros((1, 3), dtype=np.float32), np.array([0, 1, 1]))\n        channel.consult(",
)
"""Ranks 1 and 2 meet before all do: rank 0 already waits in the next collective."""


def test_different_collectives_end_the_job() -> None:
    finished = launch(3, "-c", DIFFERENT, "command", deadline_s=45)
    assert finished.status == 3, finished
    assert finished.err.count("fedprompt_mpi:") == 1, finished
    assert "ranks wait for each other in different collectives" in finished.err
    assert re.search(r"rank 0 in close \(\d+\), rank 1 in sum \(\d+\)", finished.err)


def test_in_a_library_call_it_is_raised() -> None:
    finished = launch(3, "-c", DIFFERENT, "library", deadline_s=45)
    assert "StalledError: ranks wait for each other in different collectives" in finished.out, finished
    assert finished.status != 0


@pytest.mark.parametrize("program", [SLOW_BUT_ALIVE, SLOW_TO_SHARE], ids=["all", "some"])
def test_ranks_that_wait_long_for_one_that_works_go_on(program: str) -> None:
    finished = launch(3, "-c", program, deadline_s=60)
    assert finished.status == 0, finished
    assert finished.out.count("fine") == 3


def test_the_deadline_counts_from_the_run_and_not_from_the_import(tmp_path: Path) -> None:
    """A notebook imports, waits, and calls run()."""
    live = Liveness()
    live.since -= 3600
    config = RunConfig(
        task=TaskConfig(max_train=40, max_test=8),
        federation=FederationConfig(rounds=2),
        comm=CommConfig(deadline_s=30),
        output=OutputConfig(dir=str(tmp_path / "run"), report=False),
    )
    from fedprompt_mpi import run

    assert run(config, liveness=live)["rounds"] == 2


def test_a_library_call_that_stalls_raises_and_the_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedprompt_mpi.federation.federation import Federation

    def never(self: Federation, cohort: object, round_: int) -> None:
        while True:
            pass

    monkeypatch.setattr(Federation, "train", never)
    with pytest.raises(StalledError, match=r"rank 0 has made no progress for 2 s \(comm.deadline_s\) in phase"):
        run_here(tmp_path / "run", "--comm.deadline_s=2")


def test_a_rank_in_a_transfer_lets_the_one_it_waits_for_report_first() -> None:
    live = Liveness()

    def work(phase: str, patience_s: float | None) -> None:
        with live.watched(0.3):
            live.enter(phase, 2, patience_s)
            until = time.monotonic() + 0.8
            while time.monotonic() < until:
                pass

    work("gather", 30)
    with pytest.raises(StalledError, match=r"made no progress for 0.3 s \(comm.deadline_s\) in phase train of round 2"):
        work("train", None)


def test_a_request_to_stop_is_for_one_run(tmp_path: Path) -> None:
    """The next run() of the process is not stopped."""
    from fedprompt_mpi import run
    from fedprompt_mpi.commands.settings import parse_settings
    from fedprompt_mpi.liveness.stop import Stopped

    live = Liveness()
    live.stop.request()
    with pytest.raises(Stopped, match="after round 0"):
        run(parse_settings([*SMALL, f"--output.dir={tmp_path / 'first'}"]), liveness=live)
    assert run_here(tmp_path / "second")["rounds"] == 2


FIRST_CAUSE = """
import sys, time
from pathlib import Path
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.cli import main
from fedprompt_mpi.plm import backbone

load, rank = backbone.load_backbone, read_launch().rank

def broken(config, folder, *others):
    if rank == int(sys.argv[1]):
        raise ImportError("a library of this checkpoint is missing")
    time.sleep(2)  # meanwhile the first rank has failed, and has removed what the ranks of the node share
    (Path(sys.argv[2]) / f"folder-{rank}").touch()
    (shared[0] / "model_folder.txt").read_text()
    return load(config, folder, *others)

backbone.load_backbone = broken
shared = []
from fedprompt_mpi.text.corpus import Corpus
map_corpus = Corpus.map
Corpus.map = lambda folder: (shared.append(folder), map_corpus(folder))[1]
main(sys.argv[3:])
"""


@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_cause_is_reported(rank: int, tmp_path: Path) -> None:
    """One rank fails and tidies up; other ranks then fail because of that. The first rank's error is reported."""
    flags = [*SMALL, f"--output.dir={tmp_path / 'run'}"]
    finished = launch(3, "-c", FIRST_CAUSE, str(rank), str(tmp_path), *flags, deadline_s=60)
    assert finished.status == 3, finished
    assert finished.err.count("fedprompt_mpi:") == 1, finished
    assert f"rank {rank} of 3 on" in finished.err
    assert "ImportError: a library of this checkpoint is missing" in finished.err
    assert "FileNotFoundError" not in finished.err


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    """Rank 0 alone reads checkpoints: without an agreement the others would wait for it in another collective."""
    program = (
        "import sys\n"
        "from fedprompt_mpi.start.launcher import read_launch\n"
        "from fedprompt_mpi.comm.start import open_channel\n"
        "from fedprompt_mpi.config import SettingsError\n"
        "from fedprompt_mpi.federation.prepare import run_on_all_ranks\n"
        "channel = open_channel(read_launch())\n"
        "def part():\n"
        "    if channel.rank == 0: raise SettingsError('all are damaged')\n"
        "try:\n"
        "    run_on_all_ranks(channel, part)\n"
        "except SettingsError as error:\n"
        "    print(f'rank {channel.rank}: {error}', flush=True)\n"
        "channel.close()\n"
    )
    finished = launch(3, "-c", program, deadline_s=40)
    assert finished.out.count("all are damaged") == 3, finished
    assert finished.status == 0
