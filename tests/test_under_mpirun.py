"""A plain `pytest` starts the tests marked mpi itself, on several numbers of ranks, with a deadline."""

from pathlib import Path

import pytest

from tests.jobs import launch


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_mpi_tests(ranks: int) -> None:
    folder = str(Path(__file__).parent / "mpi")
    finished = launch(ranks, "-m", "pytest", "--only-mpi", "-q", "-p", "no:cacheprovider", "-x", folder, deadline_s=90)
    assert finished.status == 0, finished.out + finished.err
    assert "passed" in finished.out
