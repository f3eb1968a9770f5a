"""Two thousand rounds: nothing that a rank holds grows, and no round takes longer than the first ones did."""

from pathlib import Path

import numpy as np
import pytest

from tests.jobs import launch

RANKS, ROUNDS, SETTLED = 5, 2000, 100
TINY = (
    "--federation.clients=4", "--client.steps=1", "--client.batch_size=2", "--model.max_length=24",
    "--task.max_train=40", "--task.max_test=8", "--prompt.num_virtual_tokens=2", "--output.evaluate_every=100",
    "--output.report=false",
)  # fmt: skip
MOST_GROWTH, MOST_LONGER = 1.02, 1.2
"""The second has room for a shared machine, on which any hundred rounds differ from the next by up to 10 %."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Return what each rank had in each round: see `sampled.py`."""
    folder = tmp_path_factory.mktemp("samples")
    finished = launch(
        RANKS, "-m", "tests.failures.sampled", str(folder), *TINY, f"--federation.rounds={ROUNDS}",
        f"--output.dir={folder / 'run'}", deadline_s=500,
    )  # fmt: skip
    assert finished.status == 0, finished.err
    return [np.load(Path(folder) / f"{rank}.npy") for rank in range(RANKS)]


@pytest.mark.parametrize("rank", range(RANKS))
def test_nothing_grows(samples: list[np.ndarray], rank: int, table: list[str]) -> None:
    _, _, resident, files, begun, requests = samples[rank].T
    assert len(resident) == ROUNDS + 1
    growth = resident[-1] / resident[SETTLED]
    table.append(
        f"{f'rank {rank}: {resident[SETTLED] / 2**20:.1f} to {resident[-1] / 2**20:.1f} MiB':<44}"
        f"{'files':>7}{files[-1]:>9.0f}  {requests.max():.0f} requests at most"
    )
    assert growth < MOST_GROWTH
    assert files[SETTLED:].max() == files[SETTLED]
    assert begun[-1] > 2 * ROUNDS
    assert requests.max() <= 2


def test_rounds_do_not_get_longer(samples: list[np.ndarray], table: list[str]) -> None:
    """The quick ones of the first and of the last 400: the slow ones tell of whatever else the machine does.

    Judged is the processor time of all ranks, which others on the machine disturb least; the table has both.
    """
    clocks = {"a round": sum(np.diff(own[:, 1]) for own in samples), "by the clock": np.diff(samples[0][:, 0])}
    ratios = []
    for name, clock in clocks.items():
        first, last = (np.quantile(part, 0.2) for part in (clock[SETTLED : SETTLED + 400], clock[-400:]))
        ratios.append(last / first)
        told = f"{name}: {first * 1e3:.2f} ms at first, {last * 1e3:.2f} ms at last"
        table.append(f"{told:<44}{'ratio':>7}{last / first:>9.3f}")
    assert ratios[0] < MOST_LONGER
