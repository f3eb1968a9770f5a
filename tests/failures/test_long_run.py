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
MOST_GROWTH, MOST_LONGER = 1.02, 1.1
"""The second has room for a shared machine, which is slower and quicker by 10 % for minutes."""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Return what each rank had in each round."""
    return _run(tmp_path_factory.mktemp("samples"))


def _run(folder: Path) -> list[np.ndarray]:
    """Go through the rounds, and return what `sampled.py` says of them."""
    finished = launch(
        RANKS, "-m", "tests.failures.sampled", str(folder), *TINY, f"--federation.rounds={ROUNDS}",
        f"--output.dir={folder / 'run'}", deadline_s=500,
    )  # fmt: skip
    assert finished.status == 0, finished
    return [np.load(folder / f"{rank}.npy") for rank in range(RANKS)]


@pytest.mark.parametrize("rank", range(RANKS))
def test_nothing_grows(samples: list[np.ndarray], rank: int, table: list[str]) -> None:
    _, resident, files, begun, requests = samples[rank].T
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


def test_rounds_do_not_get_longer(samples: list[np.ndarray], tmp_path: Path, table: list[str]) -> None:
    """Judged by the quickest of either half: the others tell of whatever else the machine does.

    If that has grown in the whole of the second half, it will not have in another run.
    """
    longer = _longer(samples, table)
    if longer >= MOST_LONGER:
        longer = _longer(_run(tmp_path), table)
    assert longer < MOST_LONGER


def _longer(samples: list[np.ndarray], table: list[str]) -> float:
    """Return how much longer a round is in the second half, by the processor time of all ranks."""
    rounds = np.sum([np.diff(own[:, 0]) for own in samples], axis=0)
    half = (ROUNDS - SETTLED) // 2
    first, last = (np.quantile(part, 0.05) for part in (rounds[SETTLED : SETTLED + half], rounds[-half:]))
    told = f"a round: {first * 1e3:.2f} ms in the first half, {last * 1e3:.2f} ms in the second"
    table.append(f"{told:<60}{last / first:.3f}")
    return float(last / first)
