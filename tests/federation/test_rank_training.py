"""The steps that ranks take in a round, against a count client by client."""

import dataclasses
import time
import types
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.config import ClientConfig, FederationConfig, RunConfig
from fedprompt_mpi.federation.cohort import Cohort, draw_cohort
from fedprompt_mpi.federation.rank_training import steps_by_rank


def _setup(config: RunConfig, counts: np.ndarray) -> Any:
    return types.SimpleNamespace(
        config=config,
        method=types.SimpleNamespace(shares_passes=True, adds_tokens=True),
        corpus=types.SimpleNamespace(num_examples=lambda client: int(counts[client])),
    )


def _steps(client: ClientConfig, n: int) -> int:
    return client.steps if client.epochs is None else client.epochs * -(-n // min(n, client.batch_size))


def _one_by_one(config: RunConfig, cohort: Cohort, counts: np.ndarray, size: int) -> list[int]:
    client, taken = config.client, []
    for rank in range(cohort.size):
        own = [int(counts[trainer]) for trainer in cohort.trainers(rank)]
        steps = [_steps(client, n) for n in own]
        taken.append(sum(max(steps[at : at + size]) for at in range(0, len(steps), size)))
    return taken


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("server", [False, True])
@pytest.mark.parametrize("batched", [1, 3])
def test_they_are_those_of_the_clients(epochs: int | None, server: bool, batched: int) -> None:
    config = RunConfig(
        client=ClientConfig(epochs=epochs, batch_size=4, batched=batched),
        federation=FederationConfig(clients=30, fraction=0.5),
    )
    counts = np.random.default_rng(0).integers(1, 40, size=31)
    for size in (1, 2, 5, 12):
        cohort = dataclasses.replace(draw_cohort(config, size, 1), server=30 if server else None)
        assert steps_by_rank(_setup(config, counts), cohort).tolist() == _one_by_one(config, cohort, counts, batched)
    assert steps_by_rank(_setup(config, counts), Cohort(clients=(), ranks=(), size=4)).tolist() == [0] * 4


def test_thousands_of_ranks_cost_no_round() -> None:
    """What grows with ranks times clients takes a second here; this is far below, on any machine."""
    config = RunConfig(federation=FederationConfig(clients=10_000), client=ClientConfig(batched=1))
    cohort = draw_cohort(config, 4096, 1)
    begin = time.process_time()
    assert steps_by_rank(_setup(config, np.ones(10_000)), cohort).sum() == 10_000 * config.client.steps
    assert time.process_time() - begin < 0.2
