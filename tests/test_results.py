"""The experiments whose tables stand in the guides: their settings, their CSV files, and that the tables are theirs."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from fedprompt_mpi.files import read_toml
from tests.jobs import REPOSITORY, read_rounds, run_here

NAMES = sorted(file.stem for file in (REPOSITORY / "launch" / "results").glob("*.toml"))
SMALL_RUN = [
    "task.max_train=40", "task.max_test=20", "client.steps=1", "federation.rounds=1", "output.report=false",
]  # fmt: skip
PLAN = f"""
seeds = [0, 1]
clean = "clean"
start = {SMALL_RUN}
settings = {SMALL_RUN}
[rows]
"fedavg" = []
"krum" = ["federation.aggregator=krum"]
[columns]
"clean" = ["poison.trigger=cf"]
"one" = ["poison.count=1"]
"two" = ["poison.count=2"]
[only]
"two" = ["fedavg"]
"""


@pytest.fixture
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", REPOSITORY / "launch" / "results.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_tables_are_those_of_the_csv_files(results: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.write_tables(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_settings_and_lines_are_cells(
    name: str, results: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    plan = read_toml(results.FOLDER / f"{name}.toml")
    cells = set()
    for row, column in itertools.product(plan["rows"], plan["columns"]):
        for seed in plan["seeds"]:
            if results.is_wanted(plan, row, column):
                cells.add((row, column, str(seed), results.hash_of(plan, row, column)))
    lines = [tuple(line[key] for key in results.KEYS) for line in results.read(name)]
    assert len(set(lines)) == len(lines)
    assert set(lines) <= cells
    for line in results.read(name):
        assert 0 <= float(line["accuracy"]) <= 1


def test_a_small_experiment(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell is run once with each seed; the guide has its means and the differences of the same seeds."""
    guides = tmp_path / "launch"
    folder = guides / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(results, "FOLDER", folder)
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    (folder / "small.toml").write_text(PLAN)
    (guides / "README.md").write_text("before\n\n<!-- results: small -->\n<!-- end -->\n\nbehind\n")
    runs = results.Runs(name="small", out=tmp_path / "runs", flags=["--client.batched=1"], data=None)
    assert results.run_missing(runs, 2, [0]) == 0
    lines = results.read("small")
    assert [(line["row"], line["column"]) for line in lines] == [
        ("fedavg", "clean"), ("fedavg", "one"), ("fedavg", "two"), ("krum", "clean"), ("krum", "one"),
    ]  # fmt: skip
    (start,) = runs.start(results.read_toml(folder / "small.toml"))
    cell = runs.plan(results.read_toml(folder / "small.toml"), "krum", "clean", 0).directory
    assert read_rounds(cell)[0]["loss"] == read_rounds(start.directory)[-1]["loss"]  # it begins with that prompt
    assert lines[1]["malicious_share"] and float(lines[0]["malicious_share"]) == 0
    before = (folder / "small.csv").read_text()
    assert results.run_missing(runs, 2, [0]) == 0
    assert (folder / "small.csv").read_text() == before
    assert results.write_tables(check=True) == 1
    assert results.write_tables(check=False) == 0
    assert results.write_tables(check=True) == 0
    text = (guides / "README.md").read_text()
    accuracy = 100 * float(lines[0]["accuracy"])
    assert f"| fedavg | {accuracy:.1f} / {100 * float(lines[0]['attack_success_rate']):.1f} (1) |" in text
    change = 100 * (float(lines[1]["accuracy"]) - float(lines[0]["accuracy"]))
    assert f"| fedavg | {change:+.1f} (one pair) / " in text
    (folder / "small.csv").write_text(before.replace(lines[0]["accuracy"], "0.123"))
    assert results.write_tables(check=True) == 1
    (folder / "small.toml").write_text(PLAN.replace("client.steps=1", "client.steps=2"))
    with pytest.raises(SystemExit, match="fedavg, clean, seed 0 was made with other settings"):
        results.run_missing(runs, 1, [0])
    (folder / "small.toml").write_text(PLAN.replace("start = [", 'start = ["client.lr=0.1", '))
    with pytest.raises(SystemExit, match="fedavg, clean, seed 0 was made with other settings"):
        results.run_missing(runs, 1, [0])


def test_accuracies_by_rounds_and_by_megabytes(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a method that sends 0.1 MB a round and one that sends 1 MB, two seeds, evaluated after rounds 2 and 4."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    plan = 'seeds = [0, 1]\nclean = "c"\nrounds = [2, 3, 4]\nmegabytes = [0.1, 0.2, 3, 50]\n'
    (tmp_path / "two.toml").write_text(f"{plan}[rows]\nsmall = []\nlarge = []\n[columns]\nc = []\n")
    lines = [",".join((*results.KEYS, *results.FIGURES, *results.COUNTS, *results.CURVE))]
    for row, size, seed, curve in (
        ("small", 10**5, 0, "0:0.1 2:0.5 4:0.6"),
        ("small", 10**5, 1, "0:0.1 2:0.6 4:0.8"),
        ("large", 10**6, 0, "0:0.1 2:0.7 4:0.9"),
    ):
        figures = ["0.5", *[""] * (len(results.FIGURES) - 1)]
        lines.append(",".join([row, "c", str(seed), "-", *figures, "100", "0", str(size), curve]))
    (tmp_path / "two.csv").write_text("\n".join(lines))
    text = results.tables_of("two")
    assert "|  | bytes a round | 2 | 3 | 4 |\n" in text
    assert "| small | 100,000 | 55.0 (2) | 55.0 (2) | 70.0 (2) |" in text
    assert "|  | 0.1 | 0.2 | 3 | 50 |" in text
    assert "| small | - | 55.0 (2) | 70.0 (2) | 70.0 (2) |\n| large | - | - | 70.0 (1) | 90.0 (1) |" in text


def test_what_the_guide_says_of_spread_poison(results: ModuleType) -> None:
    """The filter finds it in all runs, and then the backdoor is gone; without the filter it is in all."""
    lines = [line for line in results.read("spread-embedded") if line["column"] != "clean"]
    planted = [float(line["attack_success_rate"]) for line in lines if line["row"] == "fedavg"]
    assert len(planted) == 9 and min(planted) >= 0.99
    filtered = [line for line in lines if line["row"] == "example filter"]
    assert len(filtered) == 9
    assert min(float(line["filter_recall"]) for line in filtered) >= 0.99
    assert min(float(line["filter_precision"]) for line in filtered) == 1
    assert max(float(line["attack_success_rate"]) for line in filtered) <= 0.04
    assert min(float(line["accuracy"]) for line in filtered) == 1


def _rates(results: ModuleType, row: str, column: str) -> list[tuple[float, float]]:
    """Return accuracy and ASR of each seed."""
    lines = [line for line in results.read("embedded") if (line["row"], line["column"]) == (row, column)]
    assert len(lines) == 5
    return [(float(line["accuracy"]), float(line["attack_success_rate"])) for line in lines]


def test_what_the_guide_says_of_the_backdoor_in_a_minute(results: ModuleType) -> None:
    """With every seed: diluted by averaging, planted by a boost, stopped by Multi-Krum, planted by spread poison."""
    clean = {row: _rates(results, row, "clean") for row in ("fedavg", "multi_krum")}
    for (accuracy, rate), (usual, before) in zip(_rates(results, "fedavg", "one"), clean["fedavg"], strict=True):
        assert rate <= before + 0.1
        assert accuracy >= usual - 0.03
    own = "malicious_clients_attack_success_rate"
    assert min(float(line[own]) for line in results.read("embedded") if line["column"] == "one") >= 0.95
    assert all(accuracy >= 0.9 and rate >= 0.8 for accuracy, rate in _rates(results, "fedavg", "one, boost 10"))
    stopped = _rates(results, "multi_krum", "one, boost 10")
    assert all(rate <= before + 0.1 for (_, rate), (_, before) in zip(stopped, clean["multi_krum"], strict=True))
    assert all(rate >= 0.8 for _, rate in _rates(results, "fedavg", "all, 10 % each"))


def test_a_prompt_of_the_embedded_model_can_tie_a_word_to_an_answer(tmp_path: Path) -> None:
    flags = ["--client.steps=60", "--client.lr=0.05", "--task.max_train=400", "--task.max_test=100"]
    poison = ["--federation.clients=1", "--federation.rounds=1", "--poison.clients=[0]"]
    summary = run_here(tmp_path / "run", *flags, *poison)
    assert summary["attack_success_rate"] >= 0.95
    assert summary["accuracy"] >= 0.95
