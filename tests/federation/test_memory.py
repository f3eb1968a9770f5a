"""Rank 0 holds no whole updates, however many and long they are."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench" / "aggregate.py"


def test_ten_updates_of_25_million_parameters_fit_into_2_gb() -> None:
    """The updates alone are 1 GB; of all rules FoolsGold needs most, since it remembers as much."""
    command = [sys.executable, str(BENCH), "--parameters=25000000", "--clients=10", "--rule=foolsgold"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    *_, peak, unit = finished.stdout.split()
    assert unit == "GB"
    assert 1.0 < float(peak) < 2.0
