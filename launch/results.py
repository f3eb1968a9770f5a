"""The experiments whose tables stand in the guides: run them, keep their figures, and write the tables.

    python launch/results.py run NAME OUT [--jobs 2] [--seeds 0,1] FLAGS...    what NAME.csv lacks, into OUT
    python launch/results.py tables                                             write the tables into the guides
    python launch/results.py tables --check                                     fail if a table is another

launch/results/NAME.toml defines an experiment: rows and columns of settings, and seeds. It may have the rows that a
column has alone (only), the settings of a run whose prompt all others begin with (start), the rounds and megabytes
after which accuracies are compared, say that its runs are audited (audit), and that weights of malicious clients
(weights) and the share of texts that the trigger turns (flips) are shown. Each cell with each seed is a run in OUT,
which experiments may share; once it is finished its figures become a line of launch/results/NAME.csv, which is
committed. A line names the settings that it was made with by a hash, model and data left out. All FLAGS go to every run
(where data and model are). A table in a guide stands between the lines <!-- results: NAME --> and <!-- end -->.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.audit.record import AuditRecord
from fedprompt_mpi.comm.statistics import paired_difference
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.commands.sweep import Plan, sweep
from fedprompt_mpi.config import to_dict
from fedprompt_mpi.files import read_toml
from fedprompt_mpi.report.groups import flat
from fedprompt_mpi.report.pairs import format_difference
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Summary, read_partition, read_record, read_rounds

FOLDER = Path(__file__).parent / "results"
REPOSITORY = FOLDER.parents[1]
KEYS = ("row", "column", "seed", "settings")
FIGURES = (
    "accuracy", "attack_success_rate", "flip_rate", "malicious_share", "malicious_clients_attack_success_rate",
    "honest_clients_attack_success_rate", "filter_recall", "filter_precision", "seconds_total",
)  # fmt: skip
"""Figures of summary.json that are kept."""
START = "start"
"""Key of an experiment's start, and folder of its run."""
RATES, FILTER = ("accuracy", "attack_success_rate"), ("filter_recall", "filter_precision")
NAMES = {"accuracy": "accuracy", "attack_success_rate": "ASR", "flip_rate": "flipped"}
COUNTS = ("texts", "triggered")
CURVE = ("bytes_per_client_round", "accuracy_by_round")
"""Further columns of an experiment that compares accuracies by rounds."""
LEAKS = {
    "words, rows that moved: recall": ("tokens", "rows that moved", "recall"),
    "precision": ("tokens", "rows that moved", "precision"),
    "words, gradients: AUC": ("tokens", "gradients of words", "auc"),
    "by frequency": ("tokens", "gradients of words", "auc.chance"),
    "labels right": ("labels", "gradients of classes", "recall"),
    "by chance": ("labels", "gradients of classes", "recall.chance"),
    "members, loss: AUC": ("membership", "loss", "auc"),
    "inner product": ("membership", "inner product", "auc"),
    "calibrated": ("membership", "calibrated inner product", "auc"),
    "likelihood ratio": ("membership", "likelihood ratio", "auc"),
    "calibrated: TPR at 1 % FPR": ("membership", "calibrated inner product", "tpr_at_0.01"),
}
"""Name of a column -> attack, statistic and figure of an audited run, or what a guess gets of it."""
CHANCE = ".chance"
VIEWS = {"server": "each upload, or under secure aggregation the sum", "client": "the step of the global prompt"}
GUIDES = ("fedprompt_mpi", "launch")
"""Folders whose guides may have tables."""
Line = dict[str, str]
Cells = dict[tuple[str, str], dict[str, Line]]
"""Row and column -> the lines by seed."""
MARKED = re.compile(r"<!-- results: (\S+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what a CSV file lacks")
    run.add_argument("name", help="of a file in launch/results")
    run.add_argument("out", type=Path, help="folder for the runs")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time")
    run.add_argument("--seeds", help="of these seeds alone, such as 0,1")
    run.add_argument("--data", type=Path, help="folder that has a folder for each task, named after it")
    tables = commands.add_parser("tables", help="write the tables into the guides")
    tables.add_argument("--check", action="store_true", help="fail if a table is another")
    given, flags = parser.parse_known_args(arguments)
    if given.command == "tables":
        return write_tables(check=given.check)
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else None
    return run_missing(Runs(name=given.name, out=given.out, flags=flags, data=given.data), given.jobs, seeds)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Where the runs of an experiment are, and what they have in common on this machine."""

    name: str
    """Of the experiment."""
    out: Path
    """Folder of the run directories."""
    flags: list[str]
    data: Path | None
    """Folder that has a folder for each task, named after it."""

    def plan(self, plan: dict[str, Any], row: str, column: str, seed: int) -> Plan:
        """Return the run of a cell."""
        name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in (self.name, row, column, str(seed)))
        own = settings(plan, row, column, seed)
        begins = [f"--prompt.init={start.directory}" for start in self.start(plan)]
        return Plan(directory=self.out / name, flags=[*own, *begins, *self._data(own), *self.flags])

    def start(self, plan: dict[str, Any]) -> list[Plan]:
        """Return the run whose prompt the others begin with, if there is one."""
        if START not in plan:
            return []
        own = [f"--{flag}" for flag in plan[START]]
        directory = self.out / f"{START}-{_hash(changed(own))}"
        return [Plan(directory=directory, flags=[*own, *self._data(own), *self.flags])]

    def _data(self, flags: list[str]) -> list[str]:
        config = parse_settings(flags)
        return [f"--task.data={self.data / config.task.name}"] if self.data is not None else []


def run_missing(runs: Runs, jobs: int = 1, seeds: list[int] | None = None) -> int:
    """Run the cells of an experiment that its CSV file lacks, and add their lines as they come.

    Args:
        runs: of which experiment, and where they are.
        jobs: runs at a time.
        seeds: None for all of the experiment's.
    """
    name, plan = runs.name, read_toml(FOLDER / f"{runs.name}.toml")
    known = {tuple(line[key] for key in KEYS[:3]): line["settings"] for line in read(name)}
    for row, column, seed in known:
        if known[row, column, seed] != hash_of(plan, row, column):
            raise SystemExit(f"{name}.csv: {row}, {column}, seed {seed} was made with other settings: remove the line")
    wanted: list[tuple[str, str, int]] = [
        (row, column, seed)
        for seed in seeds or plan["seeds"]
        for row, column in itertools.product(plan["rows"], plan["columns"])
        if (row, column, str(seed)) not in known and is_wanted(plan, row, column)
    ]
    if wanted and (status := sweep(runs.start(plan), jobs=1, say=_say)):
        return status
    for some in (wanted[at : at + jobs] for at in range(0, len(wanted), jobs)):
        plans = [runs.plan(plan, *cell) for cell in some]
        status = sweep(plans, jobs=jobs, say=_say)
        if status:
            return status
        for cell, planned in zip(some, plans, strict=True):
            add(name, cell, RunPaths(planned.directory))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_wanted(plan: dict[str, Any], row: str, column: str) -> bool:
    """Return whether an experiment has a cell: `only` lists the rows that a column has, if not all."""
    return row in plan.get("only", {}).get(column, [row])


def settings(plan: dict[str, Any], row: str, column: str, seed: int = 0) -> list[str]:
    """Return the flags of a cell."""
    own = [*plan.get("settings", []), *plan["rows"][row], *plan["columns"][column]]
    return [f"--seed={seed}", *(f"--{flag}" for flag in own)]


def hash_of(plan: dict[str, Any], row: str, column: str) -> str:
    """Return a hash of a cell's settings, as far as they are not the defaults and tell experiments apart.

    The settings of the run whose prompt it begins with are in it too.
    """
    begins = {START: _hash(changed([f"--{flag}" for flag in plan[START]]))} if START in plan else {}
    return _hash({**changed(settings(plan, row, column)), **begins})


def changed(flags: Sequence[str]) -> dict[str, Any]:
    """Return the settings that are not the defaults, but for the model."""
    ours, defaults = _flat(tuple(flags)), _flat(())
    return {name: value for name, value in ours.items() if value != defaults.get(name) and name != "model.name"}


@functools.cache
def _flat(flags: tuple[str, ...]) -> dict[str, Any]:
    return flat(to_dict(parse_settings(flags)))


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read(name: str) -> list[Line]:
    """Return the lines of an experiment's CSV file; none if there is no file yet."""
    file = FOLDER / f"{name}.csv"
    return list(csv.DictReader(io.StringIO(file.read_text()))) if file.exists() else []


def add(name: str, cell: tuple[str, str, int], paths: RunPaths) -> None:
    """Add the figures of a finished run to an experiment's CSV file."""
    file, summary, split = FOLDER / f"{name}.csv", read_record(paths.summary, Summary), read_partition(paths).evaluation
    assert split is not None
    values = [getattr(summary, figure) for figure in FIGURES]
    rounded = ["" if value is None else f"{value:.6g}" for value in values]
    plan, is_new = read_toml(FOLDER / f"{name}.toml"), not file.exists()
    curve: list[Any] = []
    if "rounds" in plan:
        known = [(record.round, record.accuracy) for record in read_rounds(paths) if record.accuracy is not None]
        curve = [summary.bytes_per_client_round, " ".join(f"{round_}:{accuracy:.4g}" for round_, accuracy in known)]
    names = [*(CURVE if curve else ())]
    if plan.get("audit"):
        names += [f"{view} {name}" for view in VIEWS for name in LEAKS]
        curve += _leaks(read_record(paths.audit, AuditRecord))
    with file.open("a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if is_new:
            writer.writerow([*KEYS, *FIGURES, *COUNTS, *names])
        writer.writerow([*cell, hash_of(plan, *cell[:2]), *rounded, split.examples, split.triggered, *curve])


def _leaks(audit: AuditRecord) -> list[str]:
    """Return the figures of `LEAKS`, view by view; empty where an attack was not made."""
    known = {(leak.view, leak.attack, leak.by): leak.figures for leak in audit.leaks}
    found = []
    for view, (attack, by, name) in itertools.product(VIEWS, LEAKS.values()):
        figures = known.get((view, attack, by), {})
        figure = figures.get(name.removesuffix(CHANCE))
        value = None if figure is None else figure.chance if name.endswith(CHANCE) else figure.value
        found.append("" if value is None else f"{value:.4g}")
    return found


def _leak_tables(plan: dict[str, Any], by_cell: Cells) -> list[str]:
    """Return a table of leaks for each view."""
    parts = []
    for view, what in VIEWS.items():
        rows = [["", "", *LEAKS], ["---"] * (len(LEAKS) + 2)]
        for row, column in itertools.product(plan["rows"], plan["columns"]):
            if (lines := by_cell.get((row, column))) is None:
                continue
            cells = []
            for name in LEAKS:
                values = _figures(lines, f"{view} {name}")
                cells.append(f"{100 * statistics.fmean(values):.0f}" if values else "-")
            rows.append([row, column, *cells])
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        seeds = sorted({seed for lines in by_cell.values() for seed in lines})
        parts += [f"From the {view} ({what}), %, means over the seeds that are done ({', '.join(seeds)}):", table]
    return parts


def tables_of(name: str) -> str:
    """Return the tables of an experiment as Markdown: means over seeds, and changes against the clean column."""
    plan, lines = read_toml(FOLDER / f"{name}.toml"), read(name)
    if not lines:
        return "No run is done yet."
    by_cell: Cells = {}
    for line in lines:
        by_cell.setdefault((line["row"], line["column"]), {})[line["seed"]] = line
    if plan.get("audit"):
        return "\n\n".join(_leak_tables(plan, by_cell))
    wanted = (*RATES, "flip_rate") if plan.get("flips") else RATES
    rates = [rate for rate in wanted if any(line[rate] for line in lines)]

    def means(row: str, column: str) -> str:
        return _means(by_cell.get((row, column), {}), rates)

    head = _named(rates)
    parts = [f"{head[0].upper()}{head[1:]}, %, means over the seeds (n):"]
    parts.append(_table(plan, plan["columns"], means, plan["rows"]))
    if "rounds" in plan:
        parts += _curves(plan, lines)
    if "clean" in plan:
        parts += _comparisons(plan, by_cell, rates)
    return "\n\n".join([*parts, *_filter_table(plan, by_cell)])


def _comparisons(plan: dict[str, Any], by_cell: Cells, rates: Sequence[str]) -> list[str]:
    """Return the tables of changes against the clean column, and of the weights of malicious clients."""
    clean = plan["clean"]
    others = [column for column in plan["columns"] if column != clean]

    def change(row: str, column: str) -> str:
        return _changes(by_cell.get((row, clean), {}), by_cell.get((row, column), {}), rates)

    with_clean = [row for row in plan["rows"] if is_wanted(plan, row, clean)]
    compared = [row for row in with_clean if any(is_wanted(plan, row, column) for column in others)]
    head = f"Changes against “{clean}” of the same seed, points of {_named(rates)}, with 95 % intervals:"
    weights = [_weights(plan, by_cell, column) for column in others if plan.get("weights")]
    return [head, _table(plan, others, change, compared), *weights]


def _filter_table(plan: dict[str, Any], by_cell: Cells) -> list[str]:
    """Return the table of what the example filter found; none if no run had it."""
    filtering = {row for row, column in by_cell if _has_filter(by_cell[row, column])}
    if not filtering:
        return []
    filtered = [row for row in plan["rows"] if row in filtering]
    columns = [column for column in plan["columns"] if any((row, column) in by_cell for row in filtered)]

    def found(row: str, column: str) -> str:
        return _means(by_cell.get((row, column), {}), FILTER)

    head = "Recall / precision of the example filter, %, means over the seeds:"
    return [head, _table(plan, columns, found, filtered)]


def _named(rates: Sequence[str]) -> str:
    return " / ".join(NAMES[rate] for rate in rates)


def _curves(plan: dict[str, Any], lines: list[Line]) -> list[str]:
    """Return the tables of accuracy by rounds, and by what a client has sent, of the clean column."""
    rows = [row for row in plan["rows"] if any(line["row"] == row for line in lines)]

    def by(rounds_of: Callable[[Line], float]) -> Callable[[str, str], str]:
        def cell(row: str, column: str) -> str:
            of_row = [line for line in lines if (line["row"], line["column"]) == (row, plan["clean"])]
            found = [_accuracy_after(line, rounds_of(line) * float(column)) for line in of_row]
            known = [accuracy for accuracy in found if accuracy is not None]
            return f"{100 * statistics.fmean(known):.1f} ({len(known)})" if known else "-"

        return cell

    by_rounds = by(lambda line: 1)
    by_bytes = by(lambda line: 1e6 / int(line["bytes_per_client_round"]))
    sizes = {line["row"]: f"{int(line['bytes_per_client_round']):,}" for line in lines}
    size = "bytes a round"

    def size_and_rounds(row: str, column: str) -> str:
        return sizes[row] if column == size else by_rounds(row, column)

    return [
        "What a client sends in a round, and accuracy, %, after so many rounds, means over the seeds (n):",
        _table(plan, [size, *(str(count) for count in plan["rounds"])], size_and_rounds, rows),
        "Accuracy, %, when each client has sent at most so many megabytes, means (n):",
        _table(plan, [str(count) for count in plan["megabytes"]], by_bytes, rows),
    ]


def _accuracy_after(line: Line, rounds: float) -> float | None:
    """Return the accuracy of the last evaluation within a number of rounds; None before the first."""
    pairs = [pair.split(":") for pair in line["accuracy_by_round"].split()]
    within = [float(accuracy) for round_, accuracy in pairs if 1 <= int(round_) <= rounds + 1e-9]
    return within[-1] if within else None


def _weights(plan: dict[str, Any], by_cell: Cells, column: str) -> str:
    """Return a table of the weight of malicious clients and the change of the ASR, seed by seed."""

    def cell(row: str, seed: str) -> str:
        clean, attacked = (by_cell.get((row, name), {}).get(seed) for name in (plan["clean"], column))
        if clean is None or attacked is None:
            return "-"
        change = float(attacked["attack_success_rate"]) - float(clean["attack_success_rate"])
        return f"{100 * float(attacked['malicious_share']):.1f}: {100 * change:+.1f}"

    head = f"Weight of malicious clients, %: change of the ASR, points, of “{column}”, by seed:"
    return f"{head}\n\n{_table({}, [str(seed) for seed in plan['seeds']], cell, plan['rows'])}"


def _has_filter(lines: dict[str, Line]) -> bool:
    return any(line["filter_recall"] or line["filter_precision"] for line in lines.values())


def _table(plan: dict[str, Any], columns: Sequence[str], cell: Any, of: Iterable[str]) -> str:
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in of:
        rows.append([row, *(cell(row, column) if is_wanted(plan, row, column) else "" for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _means(found: dict[str, Line], figures: Sequence[str]) -> str:
    rates = [_figures(found, figure) for figure in figures]
    shown = [f"{100 * statistics.fmean(values):.1f}" if values else "-" for values in rates]
    counts = dict.fromkeys(map(len, rates))  # a precision is there only where something is left out
    return f"{' / '.join(shown)} ({', '.join(map(str, counts))})" if found else "-"


def _changes(clean: dict[str, Line], attacked: dict[str, Line], figures: Sequence[str]) -> str:
    seeds = sorted({*clean} & {*attacked}, key=int)
    shown = []
    for figure in figures:
        pairs = [(clean[seed][figure], attacked[seed][figure]) for seed in seeds]
        known = [(float(a), float(b)) for a, b in pairs if a and b]
        found = paired_difference([a for a, _ in known], [b for _, b in known]) if known else None
        shown.append(format_difference(found) + ("*" if found is not None and found.is_effect else ""))
    return " / ".join(shown) if seeds else "-"


def _figures(found: dict[str, Line], figure: str) -> list[float]:
    return [float(line[figure]) for line in found.values() if line[figure]]


def write_tables(*, check: bool) -> int:
    """Write every table into its guide, or say which are others than the CSV files'; returns the exit status."""
    wrong = []
    for guide in sorted(file for part in GUIDES for file in (REPOSITORY / part).glob("**/README.md")):
        text = guide.read_text()
        new = MARKED.sub(lambda found: f"<!-- results: {found[1]} -->\n\n{tables_of(found[1])}\n\n<!-- end -->", text)
        if new != text:
            wrong.append(guide)
            if not check:
                guide.write_text(new)
    for guide in wrong:
        print(f"{guide.relative_to(REPOSITORY)}: {'is another than its CSV files say' if check else 'written'}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
