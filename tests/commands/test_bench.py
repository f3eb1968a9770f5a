"""The fitted model, the sizes, and the command as a user starts it."""

import json
from pathlib import Path

import pytest

from fedprompt_mpi.comm.bench import fit, sizes_up_to
from tests.jobs import launch

SIZES = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]


def test_the_model_is_found_where_it_holds() -> None:
    found = fit(SIZES, [2e-5 + size / 1e9 for size in SIZES])
    assert found.latency_s == pytest.approx(2e-5)
    assert found.seconds_per_byte == pytest.approx(1e-9)
    assert found.worst < 1e-9
    assert found.seconds(5_000) == pytest.approx(2.5e-5)


def test_small_vectors_count_as_much_as_large_ones() -> None:
    """A millisecond more for the largest does not move the latency."""
    seconds = [2e-5 + size / 1e9 for size in SIZES]
    seconds[-1] += 1e-3
    found = fit(SIZES, seconds)
    assert found.latency_s == pytest.approx(2e-5, rel=0.1)
    assert 0.02 < found.worst < 0.1


@pytest.mark.parametrize(
    ("seconds", "zero"), [([1e-3] * 5, None), ([1e-9 * size - 1e-7 for size in SIZES], "latency_s")]
)
def test_neither_term_is_negative(seconds: list[float], zero: str | None) -> None:
    found = fit(SIZES, seconds)
    assert found.latency_s >= 0
    assert found.seconds_per_byte >= 0
    if zero:
        assert getattr(found, zero) == 0


def test_sizes() -> None:
    assert sizes_up_to(20_000, [61_440, 5]) == [4, 1024, 4096, 16_384, 20_000, 61_440]


def test_the_command(tmp_path: Path) -> None:
    """Table, fit, predictions and both plots; every collective at every size, raw beside ours."""
    flags = ("--largest=100000", "--seconds=0.05", f"--dir={tmp_path / 'bench'}")
    finished = launch(3, "-m", "fedprompt_mpi", "bench", *flags)
    assert finished.status == 0, finished
    result = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (result["ranks"], result["nodes"]) == (3, 1)
    rows = {(row["collective"], row["bytes"]): row for row in result["rows"]}
    assert {(c, n) for c in ("broadcast", "gather", "reduce") for n in (1024, 10_240, 100_000)} <= set(rows)
    for row in rows.values():
        assert 0 < row["transfer"]["median"] <= row["call"]["median"]
        assert row["ratio"] == pytest.approx(row["transfer"]["median"] / row["raw"]["median"])
    assert result["predictions"][0]["name"] == "soft"
    assert "LoRA (rank 8)" in finished.out
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "bench" / "bench.svg").read_text()
    again = launch(2, "-m", "fedprompt_mpi", "bench", *flags)
    assert again.status == 2
    assert "is not empty" in again.err


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (1, [], "start it with mpirun -n 2"),
        (2, ["--seconds=0"], "--seconds is 0"),
        (2, ["--sizes=[0]"], "each above 0"),
        (2, ["--model=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_message(ranks: int, flags: list[str], words: str, tmp_path: Path) -> None:
    finished = launch(ranks, "-m", "fedprompt_mpi", "bench", f"--dir={tmp_path / 'bench'}", *flags)
    assert finished.status == 2, finished
    assert finished.err.count("fedprompt_mpi: error") == 1
    assert words in finished.err
    assert not (tmp_path / "bench").exists()


def test_by_default_up_to_the_whole_model(tmp_path: Path) -> None:
    finished = launch(2, "-m", "fedprompt_mpi", "bench", "--seconds=0.005", f"--dir={tmp_path / 'bench'}")
    assert finished.status == 0, finished
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"]
    assert max(row["bytes"] for row in rows) == 4 * 478_132
