"""If a test fails on one rank, the others may wait for it in a collective: the job ends once the failure is told."""

import pytest

from fedprompt_mpi.liveness.exit import end_job

FAILED = pytest.StashKey[bool]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[FAILED] = session.testsfailed > 0


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(FAILED, False):
        end_job(1)
