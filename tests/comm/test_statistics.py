"""Figures from records: the slowest rank counts, warm-up does not, and intervals come from the order alone."""

import numpy as np
import pytest

from fedprompt_mpi.comm import statistics
from fedprompt_mpi.comm.statistics import (
    TimingRow,
    communication,
    median_interval,
    paired_difference,
    quantiles,
    slowest_by_round,
    student_95,
)


def _rows(transfers: list[float]) -> list[TimingRow]:
    """Return the records of rounds 1, 2, ... of two ranks, of which the second is always twice as slow."""
    rows: list[TimingRow] = []
    for round_, seconds in enumerate(transfers, 1):
        for rank, factor in ((0, 1), (1, 2)):
            rows += [
                (round_, rank, "train", 1.0 + rank, 0),
                (round_, rank, "wait", 0.5 - 0.4 * rank, 0),
                (round_, rank, "sync", 0.01 * factor, 0),
                (round_, rank, "broadcast", 0.25 * seconds * factor, 8),
                (round_, rank, "gather", 0.5 * seconds * factor, 8),
                (round_, rank, "gather", 0.25 * seconds * factor, 8),
            ]
    return rows


def _figures(rows: list[TimingRow]) -> dict[int, dict[str, float]]:
    return dict(slowest_by_round(rows))


def test_a_round_counts_with_its_slowest_rank() -> None:
    figures = _figures(_rows([3.0]))[1]
    assert figures["transfer"] == pytest.approx(6.0)
    assert figures["gather"] == pytest.approx(4.5)
    assert figures["wait"] == figures["wait (rank 0)"] == pytest.approx(0.51)
    assert figures["wait (workers)"] == pytest.approx(0.12)
    assert figures["wait + transfer"] == pytest.approx(6.12)
    assert figures["overhead"] == pytest.approx(0.01)
    assert figures["evaluate"] == 0


def test_each_collective_counts_with_its_own_slowest_rank() -> None:
    """Rank 0 is late in the first and rank 1 in the second: they take 3 + 5 seconds, not the 6 of rank 1."""
    seconds = {0: [3.0, 2.0], 1: [1.0, 5.0]}
    rows: list[TimingRow] = [(1, rank, "gather", s, 8) for rank, pair in seconds.items() for s in pair]
    rows += [(1, rank, "sync", s, 0) for rank, pair in {0: [0.1, 0.7], 1: [0.6, 0.2]}.items() for s in pair]
    figures = _figures(rows)[1]
    assert figures["gather"] == figures["transfer"] == pytest.approx(8.0)
    assert figures["overhead"] == pytest.approx(0.3)


def test_a_long_run_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is told once there are records of the next but one: so the generator is asked for one row too many."""
    rows, asked = _rows([1.0, 2.0, 3.0, 4.0]), []
    monkeypatch.setattr(statistics, "MOST_OPEN", 6)
    found = slowest_by_round(asked.append(row[0]) or row for row in rows)
    assert next(found)[0] == 1
    assert asked[-1] == 3
    assert dict(found) == {round_: figures for round_, figures in _figures(rows).items() if round_ > 1}
    with pytest.raises(ValueError, match="a record of round 1 comes after round 2 is complete"):
        _figures([*rows, (1, 0, "train", 1.0, 0)])


def test_warm_up_is_left_out() -> None:
    figures = communication([_figures(_rows([100.0, 1.0, 2.0, 3.0]))], warmup=1)
    assert figures["rounds"] == 3
    assert figures["seconds"]["transfer"]["median"] == pytest.approx(4.0)
    assert "evaluate" not in figures["seconds"]  # nothing of it was there


def test_only_rounds_that_train_count() -> None:
    """Before the first and after the last round a vector is broadcast and evaluated, too."""
    rows = [(0, 0, "evaluate", 1.0, 0), *_rows([1.0] * 3), (4, 0, "broadcast", 9.0, 0)]
    assert communication([_figures(rows)], warmup=0)["rounds"] == 3


def test_launches_count_once_each() -> None:
    """Three quick rounds of one launch do not outweigh one slow round of another."""
    figures = communication([_figures(_rows([1.0] * 3)), _figures(_rows([3.0]))], warmup=0)
    assert figures["launches"] == 2
    assert figures["rounds"] == 4
    assert figures["seconds"]["transfer"]["median"] == pytest.approx(4.0)


def test_nothing_after_the_warm_up() -> None:
    assert communication([_figures(_rows([1.0]))], warmup=1)["seconds"] == {}


@pytest.mark.parametrize(
    ("n", "expected"), [(5, None), (6, (0, 5)), (10, (1, 8)), (20, (5, 14)), (100, (39, 60)), (2000, (955, 1044))]
)
def test_the_median_s_interval(n: int, expected: tuple[int, int] | None) -> None:
    """As in Le Boudec's table A.1 (there counted from 1), at 95 %."""
    assert median_interval(n) == expected


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """2,000 skewed samples of 20: at least 95 %, and not always."""
    rng = np.random.default_rng(0)
    hits = 0
    for samples in rng.lognormal(size=(2000, 20)):
        figures = quantiles(samples.tolist())
        hits += figures.low <= 1.0 <= figures.high  # type: ignore[operator]
    assert 0.95 <= hits / 2000 < 0.99


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (1000, 1.962339)]
)
def test_student_s_quantiles(freedom: int, expected: float) -> None:
    """Those of the printed tables."""
    assert student_95(freedom) == pytest.approx(expected, abs=2e-6)


def test_paired_differences_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, reach 4.3027 / sqrt(3) = 2.484: 0 is in the interval."""
    found = paired_difference([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    assert found == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138, 3), abs=1e-5)
    assert not found.is_effect
    assert paired_difference([0.0, 0.0, 0.0], [2.0, 2.5, 3.0]).is_effect
    assert paired_difference([3.0, 3.0, 3.0], [1.0, 0.9, 1.1]).is_effect
    assert not paired_difference([3.0, 3.0], [1.0, 1.0]).is_effect  # two may be equal by chance
    assert not paired_difference([1.0], [9.0]).is_effect  # one pair shows nothing


def test_paired_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = [
        (found := paired_difference([0.0] * 5, (0.3 + rng.standard_normal(5)).tolist())).low < 0.3 < found.high
        for _ in range(2000)
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
