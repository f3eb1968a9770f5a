"""Bad input gets one message, and leaves nothing behind. Under mpirun: tests/mpi/test_bad_input.py."""

from pathlib import Path

import pytest

from fedprompt_mpi import run
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import SettingsError
from tests.bad_input import CASES, arguments

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files of `datasets`


def test_there_are_many() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_nothing_left(case: str, tmp_path: Path) -> None:
    flags = arguments(case, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError) as caught:
        run(parse_settings(flags))
    message = str(caught.value)
    assert CASES[case][1] in message
    assert "\n" not in message
    assert len(message) < 1000
    assert sorted(tmp_path.rglob("*")) == before
