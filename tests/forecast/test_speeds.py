"""Unequal clients: order statistics against a simulation, event by event."""

import heapq
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.forecast.speeds import Speeds, kept_mean, read_speeds, slowest


def simulate_round(times: np.ndarray, workers: int) -> tuple[float, np.ndarray]:
    """Play one round event by event: each worker trains its block of clients one after the other.

    Args:
        times: `[K]` of the clients, in order.
        workers: W.

    Returns:
        The time at which the last worker is done, and the time `[W]` that each worker then has waited.
    """
    blocks = [list(block) for block in np.array_split(times, workers)]
    done = np.zeros(workers)
    events = [(block.pop(0), worker) for worker, block in enumerate(blocks) if block]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, worker = heapq.heappop(events)
        if blocks[worker]:
            heapq.heappush(events, (now + blocks[worker].pop(0), worker))
        else:
            done[worker] = now
    return now, now - done


@pytest.mark.parametrize("spec", ["lognormal:0.5", "lognormal:1.5", "uniform:4"])
@pytest.mark.parametrize(("clients", "workers"), [(10, 10), (25, 7), (400, 40), (2000, 5)])
@pytest.mark.parametrize("left_out", [0.0, 0.2])
def test_order_statistics_agree_with_the_simulation(spec: str, clients: int, workers: int, left_out: float) -> None:
    speeds, rng = Speeds(spec), np.random.default_rng(3)
    limit = np.quantile(speeds.draw((200_000,), rng), 1 - left_out) if left_out else np.inf
    rounds, waits = [], []
    for _ in range(150):
        times = speeds.draw((clients,), rng)
        last, waited = simulate_round(np.where(times <= limit, times, 0.0), workers)
        rounds.append(last)
        waits.append(waited.mean())
    error, longest = 4 * np.std(rounds) / len(rounds) ** 0.5, slowest(speeds, clients, workers, left_out)
    assert longest == pytest.approx(np.mean(rounds), abs=error + 0.01)
    mean = clients * kept_mean(speeds, left_out) / workers
    assert longest - mean == pytest.approx(np.mean(waits), abs=error + 0.01)


def test_the_largest_of_uniform_times_has_a_closed_form() -> None:
    """Of W uniform on [a, b] the largest is a + (b - a) W / (W + 1) in the mean."""
    low, high = 2 / 4, 6 / 4
    assert slowest(Speeds("uniform:3"), 20, 20) == pytest.approx(low + (high - low) * 20 / 21, rel=0.002)


def test_a_simulated_round_ends_with_its_slowest_worker() -> None:
    last, waited = simulate_round(np.array([1.0, 1.0, 5.0, 1.0]), 2)
    assert last == 6 and waited.tolist() == [4, 0]


def test_of_three_kinds_of_devices_none_is_left_out_for_a_few_percent() -> None:
    three = Speeds("rates.csv", [1.0, 2.0, 5.0])
    assert kept_mean(three, 0.2) == pytest.approx(1, abs=0.01)  # a third is slower, which is more than 20 %
    assert kept_mean(three, 0.5) == pytest.approx(3 / 8, abs=0.01)


def test_workers_that_differ_multiply_what_clients_do() -> None:
    speeds, rng = Speeds("lognormal:0.5"), np.random.default_rng(5)
    rounds = [
        (speeds.draw((511,), rng) * np.exp(rng.normal(-0.005, 0.1, 511))).max() for _ in range(400)
    ]  # fmt: skip
    assert slowest(speeds, 511, 511, 0.0, 0.1) == pytest.approx(np.mean(rounds), abs=4 * float(np.std(rounds)) / 20)


def test_equal_clients_go_in_waves() -> None:
    assert slowest(Speeds("equal"), 10, 10) == 1
    assert slowest(Speeds("equal"), 10, 3) == 4
    assert slowest(Speeds("lognormal:0"), 12, 3) == 4


def test_rates_of_a_file_and_clients_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "rates.csv").write_text("device,rate\na,1\nb,3\n")
    found = read_speeds(str(tmp_path / "rates.csv"), [])
    assert sorted(set(found.draw((100,), np.random.default_rng(0)))) == pytest.approx([0.5, 1.5])
    own = read_speeds("run", [10, 30])
    assert sorted(set(own.draw((100,), np.random.default_rng(0)))) == pytest.approx([0.5, 1.5])
    assert read_speeds("run", [7, 7, 7]).are_equal
    (tmp_path / "rates.csv").write_bytes(b"\xef\xbb\xbfrate\n2\n2\n")
    assert read_speeds(str(tmp_path / "rates.csv"), []).are_equal


@pytest.mark.parametrize(
    "spec",
    [
        "normal:1",
        "lognormal:-1",
        "lognormal:x",
        "uniform:0.5",
        "uniform:",
        "uniform:30",
        "lognormal:nan",
        "lognormal",
        "lognormal:2",
    ],
)
def test_no_such_distribution(spec: str) -> None:
    with pytest.raises(SettingsError, match="--speeds is"):
        Speeds(spec)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "speed\n1\n",
        "rate\n0\n",
        "rate\n-1\n",
        "rate\nx\n",
        "rate\nnan\n",
        "rate\n" + "9" * 200_000,
        "rate\n1e-310\n",
    ],
)
def test_no_rates(text: str, tmp_path: Path) -> None:
    (tmp_path / "rates.csv").write_text(text)
    with pytest.raises(SettingsError, match="--speeds"):
        read_speeds(str(tmp_path / "rates.csv"), [])
    with pytest.raises(SettingsError, match="--speeds"):
        read_speeds(str(tmp_path / "gone.csv"), [])
