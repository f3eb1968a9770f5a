"""The same under mpirun: every rank has the same message, and nobody waits for another."""

from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi import run
from fedprompt_mpi.cli import parse_settings
from fedprompt_mpi.comm.channel import open_channel
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.config import SettingsError
from tests.bad_input import CASES, arguments

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of files of `datasets`
]


@pytest.fixture(scope="module")
def job() -> Any:
    """Return a channel of the test's own."""
    channel = open_channel(read_launch(), measure=False)
    yield channel
    channel.close()


def _refused(flags: list[str]) -> str:
    try:
        run(parse_settings(flags))
    except SettingsError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_nothing_left(case: str, job: Any) -> None:
    root = Path(job.shared_folder()) / "".join(c if c.isalnum() else "-" for c in case)
    root.mkdir(exist_ok=True)
    if job.rank == 0:
        arguments(case, root)
    job.node_barrier()
    flags = arguments(case, root)
    job.node_barrier()
    before = sorted(root.rglob("*"))
    job.node_barrier()
    message = _refused(flags)
    texts = job.collect_text(message)
    wrong = None
    if job.rank == 0 and (set(texts) != {message} or CASES[case][1] not in message):
        wrong = f"{case}: {texts}"
    if job.rank == 0 and sorted(root.rglob("*")) != before:
        wrong = f"{case} left something behind"
    assert job.agree(wrong) is None
