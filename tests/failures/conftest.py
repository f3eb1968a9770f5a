"""Failures take minutes: they are asked for by --failures. The table of who was killed where is printed at the end."""

import time

import pytest

from tests.jobs import Finished

TABLE = pytest.StashKey[list[str]]()
END_WITHIN_S = 10
"""After an exception."""


@pytest.fixture(scope="session", autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--failures"):
        pytest.skip("failures take minutes: ask for them by --failures")


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[str]:
    """Return lines to be printed at the end."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(TABLE, [])
    if lines:
        terminalreporter.write_line(f"{'killed':<44}{'status':>7}{'seconds':>9}  outcome")
        terminalreporter.write_line("\n".join(lines))


def check_report(finished: Finished) -> None:
    """The job ended soon after the exception, and has told of it once."""
    end = time.monotonic()
    assert finished.status == 3, finished
    assert finished.err.count(" failed in phase") == 1
    assert finished.err.count("ArithmeticError: boom") == 1
    assert end - float(finished.err.split("ArithmeticError: boom at ")[1].split()[0]) < END_WITHIN_S
