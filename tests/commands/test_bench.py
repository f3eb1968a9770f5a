"""The fitted model, the sizes, and the command as a user starts it."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.comm.bench import autocorrelation, sizes_up_to
from fedprompt_mpi.comm.fit import fit, fit_segments, interpolate
from fedprompt_mpi.commands import bench
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.report.bench import pool
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


def test_a_library_that_changes_its_way_is_fitted_in_segments() -> None:
    """From 16 kB on ten times the latency and a tenth of the time a byte: one line is off by half."""
    sizes = [2**bit for bit in range(10, 24)]
    seconds = [1e-6 + size * 1e-9 if size < 2**14 else 1e-5 + size * 1e-10 for size in sizes]
    assert fit(sizes, seconds).worst > 0.3
    found = fit_segments(sizes, seconds)
    assert [(line.first, line.last) for line in found] == [(2**10, 2**13), (2**14, 2**23)]
    assert max(line.worst for line in found) < 1e-6


def test_between_measured_sizes_a_straight_line_holds() -> None:
    assert interpolate([10, 20, 40], [1.0, 3.0, 4.0], 15) == 2.0
    assert interpolate([10, 20, 40], [1.0, 3.0, 4.0], 40) == 4.0
    assert interpolate([10, 20, 40], [1.0, 3.0, 4.0], 60) == 5.0
    assert interpolate([10], [1.0], 60) == 1.0


def test_samples_that_follow_each_other_are_noticed() -> None:
    drifting, alternating = np.linspace(1, 2, 50), np.array([1.0, 2.0] * 25)
    assert autocorrelation(drifting) > 0.9
    assert autocorrelation(alternating) < -0.9
    assert autocorrelation(np.ones(5)) == 0
    assert abs(autocorrelation(np.random.default_rng(0).standard_normal(1000))) < 0.1


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
    assert "lora" in finished.out
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "bench" / "bench.svg").read_text()
    assert "No intervals: they need 6 launches or more" in finished.out
    assert result["launches"] == 1
    for row in rows.values():
        assert row["skew"]["median"] >= 0
        assert row["raw_skew"]["q95"] < 1  # of one clock
    again = launch(2, "-m", "fedprompt_mpi", "bench", *flags)
    assert again.status == 2
    assert "is not empty" in again.err


def test_six_launches_are_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At an agreed time; the launches differ in what was measured, not in what was asked."""
    flags = ("--largest=4096", "--seconds=0.01", "--sync=window")
    first = launch(2, "-m", "fedprompt_mpi", "bench", *flags, f"--dir={tmp_path / '0'}")
    assert first.status == 0, first
    assert "ranks start at an agreed time" in first.out
    result = json.loads((tmp_path / "0" / "bench.json").read_text())
    for number in range(1, 6):
        for row in result["rows"]:
            row["transfer"]["median"] *= 1.1
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "bench.json").write_text(json.dumps(result))
    folders = [str(tmp_path / str(number)) for number in range(6)]
    bench.main([f"--pool={json.dumps(folders)}"], Liveness())
    out = capsys.readouterr().out
    assert "95 % intervals of the medians, over 6 launches" in out
    pooled = pool([Path(folder) for folder in folders])
    assert pooled["rows"][0]["transfer"]["low"] == pytest.approx(result["rows"][0]["transfer"]["median"] / 1.1**5)
    result["ranks"] = 3
    (tmp_path / "5" / "bench.json").write_text(json.dumps(result))
    with pytest.raises(SettingsError, match=r"differ in \['ranks'\]"):
        pool([Path(folder) for folder in folders])
    (tmp_path / "5" / "bench.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"bench\.json cannot be read as a result of bench"):
        pool([Path(folder) for folder in folders])


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
