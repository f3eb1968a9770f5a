"""The tables of the guide are those of the measured cells."""

from tests.cluster.forecast import GUIDE, in_guide, read_cells
from tests.jobs import REPOSITORY

CELLS = REPOSITORY / "launch" / "results" / "forecast.csv"


def test_the_tables_are_those_of_the_csv_file() -> None:
    rows, text = read_cells(CELLS), GUIDE.read_text()
    assert in_guide(text, rows) == text, "python -m tests.cluster.forecast tables launch/results/forecast.csv"
    assert {row["nodes"] for row in rows} == {"5", "8"} and {row["rate_mbit"] for row in rows} == {"100", "1000"}


def test_errors_follow_from_the_seconds_beside_them() -> None:
    for row in read_cells(CELLS):
        error = float(row["forecast_s"]) / float(row["measured_s"]) - 1
        assert abs(error - float(row["error"])) < 0.001 + 1e-5 / float(row["measured_s"])
        assert float(row["low_s"]) <= float(row["forecast_s"]) <= float(row["high_s"])
