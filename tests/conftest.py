"""What many tests need: tiny PLMs, made once, and settings of small runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import save_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run the tests on a virtual cluster too (needs root)")
    parser.addoption("--failures", action="store_true", help="run tests of failures in every phase too")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/mpi to the runs under mpirun, which test_under_mpirun.py starts."""
    under_mpirun = config.getoption("--with-mpi") or config.getoption("--only-mpi")
    return True if collection_path.name == "mpi" and not under_mpirun else None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes (once) the folder of a tiny PLM of a kind."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny(kind, root / kind)
        return made[kind]

    return folder
