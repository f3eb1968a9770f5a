"""What ranks find wrong together, under mpirun: every one has the same message, and nobody waits for another."""

from typing import Any

import pytest

from fedprompt_mpi import run
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.start.launcher import read_launch
from tests.bad_input import CASES, LATE, arguments

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of files of `datasets`
]


@pytest.fixture(scope="module")
def job_and_folder() -> Any:
    """Return a channel of the test's own, and a folder that its ranks share."""
    channel = open_channel(read_launch())
    with channel.node_folder() as folder:
        yield channel, folder
    channel.close()


def _refused(flags: list[str]) -> str:
    try:
        run(parse_settings(flags))
    except SettingsError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize("case", LATE)
def test_one_message_and_nothing_left(case: str, job_and_folder: Any) -> None:
    job, folder = job_and_folder
    root = folder / "".join(c if c.isalnum() else "-" for c in case)
    root.mkdir(exist_ok=True)
    if job.rank == 0:
        arguments(case, root)
    job.agree(None)
    flags = arguments(case, root)
    job.agree(None)
    before = sorted(root.rglob("*"))
    job.agree(None)
    message = _refused(flags)
    texts = [text.decode() for text in job.collect(message.encode())]
    wrong = None
    if job.rank == 0 and (set(texts) != {message} or CASES[case][1] not in message):
        wrong = f"{case}: {texts}"
    if job.rank == 0 and sorted(root.rglob("*")) != before:
        wrong = f"{case} left something behind"
    assert job.agree(wrong) is None
