"""A plain `pytest` starts the tests marked mpi itself, on several numbers of ranks, with a deadline."""

from pathlib import Path

import pytest

from tests.jobs import launch


@pytest.mark.parametrize(
    ("file", "ranks"), [("test_channel.py", 2), ("test_channel.py", 5), ("test_rules.py", 4), ("test_bad_input.py", 3)]
)
def test_the_mpi_tests(file: str, ranks: int) -> None:
    path = str(Path(__file__).parent / "mpi" / file)
    finished = launch(
        ranks, "-m", "pytest", "--only-mpi", "-q", "-n", "0", "-p", "no:cacheprovider", "-x", path, deadline_s=240
    )
    assert finished.status == 0, finished
    assert "passed" in finished.out
