"""Several runs: those of one experiment are pooled over seeds, and the paper's tables are filled."""

import csv
import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from fedprompt_mpi.report.comparison import by_round, bytes_sent, curves, read_groups, write_comparison
from fedprompt_mpi.report.groups import group, labels
from fedprompt_mpi.report.pairs import pair, pairs_table
from fedprompt_mpi.report.run_data import read_run
from fedprompt_mpi.report.tables import Table, paper_tables
from tests.jobs import launch, run_here

SEEDS = (0, 1, 2)
CELLS = {
    "iid": [],
    "quantity": ["--federation.partition=quantity"],
    "poisoned": ["--poison.clients=[1]"],
    "short": ["--prompt.num_virtual_tokens=4"],
    "prefix": ["--prompt.method=prefix", "--client.lr=0.001"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return run directories: the first cell with three seeds, the others with one."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for name, flags in CELLS.items():
        for seed in SEEDS if name == "iid" else (0,):
            run_here(root / f"{name}{seed}", f"--seed={seed}", "--poison.trigger=cf", *flags)
            made.append(root / f"{name}{seed}")
    return made


def test_runs_that_differ_in_seed_alone_are_one(runs: list[Path]) -> None:
    groups = group([read_run(run) for run in runs])
    assert [known.seeds for known in groups] == [[0, 1, 2], [0], [0], [0], [0]]
    names = labels(groups)
    assert len(set(names)) == len(CELLS)
    assert "quantity" in names[1]
    assert "clients [1] poisoned" in names[2]
    assert "num_virtual_tokens 4" in names[3]


def test_a_method_s_own_settings_are_no_other_method_s(runs: list[Path]) -> None:
    """Ranks of LoRA stand beside LoRA alone, by name."""
    run = read_run(runs[0])
    both = []
    for rank in (1, 4):
        lora = {**run.settings["prompt"], "method": "lora", "lora": {"rank": rank, "alpha": 8.0, "seed": 0}}
        both.append(dataclasses.replace(run, settings={**run.settings, "prompt": lora}))
    names = labels(group([run, *both]))
    assert names == ["soft", "rank 1, lora", "rank 4, lora"]


def test_mean_and_deviation_over_seeds(runs: list[Path]) -> None:
    (known,) = group([read_run(run) for run in runs[:3]])
    accuracies = [read_run(run).rounds[-1].accuracy or 0.0 for run in runs[:3]]
    assert known.spread("accuracy") == pytest.approx((statistics.fmean(accuracies), statistics.stdev(accuracies)))
    rounds, mean, deviation = by_round(known, "accuracy")
    assert rounds.tolist() == [0, 1, 2]
    assert mean[-1] == pytest.approx(100 * statistics.fmean(accuracies))
    assert deviation[-1] == pytest.approx(100 * statistics.stdev(accuracies))


def test_bytes_are_those_that_clients_have_sent(runs: list[Path]) -> None:
    """Of ten clients that all send in round 1, and five of them in round 2."""
    run = read_run(runs[0])
    assert run.summary is not None
    size = run.summary.bytes_per_client_round
    first, second, third = run.rounds
    assert second.bytes_up == third.bytes_up == size * run.clients
    half = dataclasses.replace(run, rounds=[first, second, dataclasses.replace(third, bytes_up=third.bytes_up // 2)])
    for known, sent in ((run, [0, size, 2 * size]), (half, [0, size, 1.5 * size])):
        assert bytes_sent(group([known])[0]).tolist() == sent
    begun = dataclasses.replace(read_run(runs[-1]), rounds=[])  # nothing is evaluated yet
    curves(group([run, begun]), ["run", "begun"], "accuracy", by_bytes=True)


def test_the_tables(runs: list[Path], tmp_path: Path) -> None:
    groups = read_groups(runs)
    assert len(groups) == len(CELLS)
    page, markdown = write_comparison(groups, tmp_path)
    source = page.read_text()
    for name in ("accuracy-1", "attack-success-rate-1"):
        section = source[source.index(f'<section id="{name}">') :]
        assert "<td>" in section[: section.index("</section>")]
    section = source[source.index('<section id="accuracy-by-bytes-1">') :]
    by_bytes = section[: section.index("</section>")]  # a prefix sends much more in two rounds than a soft prompt
    assert by_bytes.count(", round 2: ") == len(CELLS)
    assert ", round 0: " not in by_bytes

    def read(name: str) -> list[list[str]]:
        with (tmp_path / "tables" / f"{name}.csv").open(newline="") as file:
            return list(csv.reader(file))

    accuracy = {run.name: read_run(run).rounds[-1] for run in runs}

    def cell(name: str) -> str:
        line = accuracy[name]
        return f"{100 * (line.accuracy or 0):.2f} / {100 * (line.attack_success_rate or 0):.2f}"

    first = read("table-1")
    assert first[0] == ["", "embedded IID", "embedded non-IID"]
    assert first[1][0] == "embedded"
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d / \d+\.\d\d ± \d+\.\d\d", first[1][1])
    assert first[1][2] == cell("quantity0")
    assert read("table-3") == [["", "embedded IID"], ["embedded, clients [1] poisoned", cell("poisoned0")]]
    assert [row[0] for row in read("prompt-length")] == ["", "4", "20"]
    assert read("prompt-length")[1][1] == cell("short0")
    sent = dict(row for row in read("table-2"))
    assert "2,560 (0.5354%)" in sent["soft"]
    assert set(sent) == {"", "prefix", "soft"}
    assert not (tmp_path / "tables" / "local-steps.csv").exists()
    latex = (tmp_path / "tables" / "table-1.tex").read_text()
    assert r"\toprule" in latex
    assert r"$\pm$" in latex
    assert (tmp_path / "tables" / "table-1.md").read_text() in markdown


def test_a_table_that_compares_has_something_to_compare(runs: list[Path]) -> None:
    one, prefix = read_run(runs[0]), read_run(runs[-1])
    task = {**one.settings, "task": {**one.settings["task"], "name": "another"}}
    names = [{table.name for table in paper_tables(group(some))} for some in (
        [one, dataclasses.replace(one, settings=task)], [one, prefix],
    )]  # fmt: skip
    assert names == [{"table-1", "table-2"}, {"table-1", "table-2", "methods"}]


def test_what_latex_would_take_for_its_own() -> None:
    table = Table(name="t", caption="50 % of a_b", rows=[["", "a & b"], ["x|y", "1 ± 2"]])
    assert r"50 \% of a\_b" in table.latex()
    assert r"a \& b" in table.latex()
    assert r"x\|y" in table.markdown()


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    finished = launch(1, "-m", "fedprompt_mpi", "report", *map(str, runs), f"--dir={tmp_path / 'out'}")
    assert finished.status == 0, finished
    assert "Table III" in finished.out
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "figures" / "accuracy-1.svg").exists()


def test_long_names_stay_within_the_figure(runs: list[Path]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    groups = read_groups(runs)
    names = [f"run {n}, " + "a setting with a long value, " * 4 for n in range(len(groups))]
    made = curves(groups, names, "accuracy")
    FigureCanvasAgg(made).draw()
    box = made.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= made.bbox.x1
    assert box.y0 >= 0 and box.y1 <= made.bbox.y1


def _numbered(runs: list[Path], poisoned: list[Path]) -> tuple[list[str], list[list[str]]]:
    groups = read_groups([*runs, *poisoned])
    table = pairs_table(groups, labels(groups))
    assert table is not None
    head, *rows = table.rows
    return head, rows


def test_poisoned_runs_are_paired_with_clean_ones_of_their_seed(runs: list[Path], tmp_path: Path) -> None:
    """The differences are those of the same seed; another seed, or another defence, is no pair."""
    poisoned = []
    for seed in (0, 1, 7):
        directory = tmp_path / f"poisoned{seed}"
        flags = ["--poison.count=1", "--poison.boost=10", "--poison.rate=0"]
        run_here(directory, f"--seed={seed}", "--poison.trigger=cf", *flags)
        poisoned.append(directory)
    head, rows = _numbered(runs, poisoned)
    row = next(row for row in rows if "boost 10" in row[0])
    assert row[head.index("pairs")] == "2"
    summaries = [json.loads((run / "summary.json").read_text()) for run in (*runs[:2], *poisoned[:2])]
    changes = [100 * (summaries[k + 2]["accuracy"] - summaries[k]["accuracy"]) for k in (0, 1)]
    assert row[head.index("accuracy")].startswith(f"{statistics.fmean(changes):+.1f} (")
    assert row[head.index("effect on ASR")] == "none shown"  # two pairs
    assert float(row[head.index("weight, %")]) == pytest.approx(100 * summaries[2]["malicious_share"], abs=5)
    run_here(tmp_path / "krum", "--poison.count=1", "--federation.aggregator=krum")
    groups = read_groups([*runs, tmp_path / "krum"])
    assert not pair(groups[-1], groups).poisoned
