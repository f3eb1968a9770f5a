"""Three nodes for all tests of this folder, if they are asked for and can be had."""

from collections.abc import Iterator

import pytest

from tests.cluster.virtual import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Return a cluster of three nodes; a test sets the rate of its links."""
    if not request.config.getoption("--cluster"):
        pytest.skip("a virtual cluster takes minutes and root: ask for it by --cluster")
    reason = why_not()
    if reason is not None:
        pytest.skip(f"a virtual cluster {reason}")
    made = Cluster(nodes=3)
    yield made
    made.close()
