"""Accuracy and attack success rate (ASR) of every aggregator under every attack, as a table.

    python launch/edge.py [--jobs 2] [--matrix FILE] OUT --config launch/recipes/edge-sst2.toml --task.data=DIR ...

It is a sweep over a matrix file, launch/recipes/edge-matrix.toml. Each cell is a run in OUT/<rule>/<attack>; finished
cells are skipped, interrupted ones are resumed. All flags behind OUT go to every run. With --jobs 2, two cells run at a
time (set OMP_NUM_THREADS to fit).
"""

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from fedprompt_mpi.commands.sweep import Plan, sweep
from fedprompt_mpi.files import read_toml
from fedprompt_mpi.rules.aggregators import AGGREGATORS
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Summary, read_record, read_rounds

CLIENTS = 10
MATRIX = Path(__file__).parent / "recipes" / "edge-matrix.toml"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="accuracy / ASR of every aggregator under every attack")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at a time")
    parser.add_argument("--matrix", type=Path, default=MATRIX, help="TOML file with rows and columns")
    parser.add_argument("out", type=Path, help="folder for the runs")
    given, flags = parser.parse_known_args()
    matrix, out = read_toml(given.matrix), given.out
    clean = [(rule, matrix["clean"]) for rule in matrix["rows"]]
    cells = [(rule, attack) for attack in matrix["columns"] for rule in matrix["rows"]]
    for some in (
        clean[:1],
        clean,
        cells,
    ):  # norm_clip needs fedavg's clean run, attacked cells the clean one of their rule
        plans = [Plan(directory=place(out, *cell), flags=[*flags, *settings(matrix, out, *cell)]) for cell in some]
        status = sweep(plans, jobs=given.jobs, say=lambda line: print(line, file=sys.stderr, flush=True))
        if status:
            raise SystemExit(status)
    print(table(matrix, out))


def place(out: Path, rule: str, attack: str) -> Path:
    """Return the run directory of a cell."""
    return out / re.sub(r"[^\w.]+", "-", rule) / re.sub(r"[^\w.]+", "-", attack)


def settings(matrix: dict[str, Any], out: Path, rule: str, attack: str) -> list[str]:
    """Return the flags of a cell."""
    column = matrix["columns"][attack]
    found = [f"--{flag}" for flag in (*matrix["rows"][rule], *column["settings"])]
    if rule in AGGREGATORS:
        assumed = min(max(column["malicious"], 1), most_assumed(rule))
        found += [f"--federation.aggregator={rule}", f"--federation.assumed_malicious={assumed}"]
    if rule == "norm_clip":  # clip at the median norm of honest updates
        first = read_rounds(RunPaths(place(out, "fedavg", matrix["clean"])))[1]
        norms = [norm for norm in first.update_norms if norm is not None]
        found.append(f"--federation.clip_norm={statistics.median(norms)}")
    if attack != matrix["clean"]:
        found.append(f"--poison.clean_run={place(out, rule, matrix['clean'])}")
    return found


def most_assumed(rule: str) -> int:
    """Return the largest f that a rule can assume of `CLIENTS` clients."""
    return AGGREGATORS[rule].most_malicious(CLIENTS) or 0


def table(matrix: dict[str, Any], out: Path) -> str:
    """Return the cells as Markdown: accuracy / ASR in %, starred where more are malicious than the rule withstands."""
    columns = matrix["columns"]
    lines = ["| aggregator | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for rule in matrix["rows"]:
        cells = []
        for attack, column in columns.items():
            summary = read_record(RunPaths(place(out, rule, attack)).summary, Summary)
            star = "*" if rule in AGGREGATORS and column["malicious"] > most_assumed(rule) else ""
            cells.append(f"{100 * (summary.accuracy or 0):.1f} / {100 * (summary.attack_success_rate or 0):.1f}{star}")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
