"""The first table of a comparison: a row a run, with the settings in which the runs differ, and what came out."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from fedprompt_mpi.comm.statistics import wilson_interval
from fedprompt_mpi.report.groups import Group, differing, shown_setting
from fedprompt_mpi.report.run_data import RunData
from fedprompt_mpi.report.tables import Table
from fedprompt_mpi.rundir.records import mean_of

FIGURES = ("accuracy, %", "macro F1", "before, %", "ASR, %", "bytes", "seconds")
NOISE, WEIGHT = "epsilon", "malicious weight, %"
"""Further columns, if a run has a privacy mechanism, or malicious clients."""
Cell = tuple[str, str]
"""What is shown (small print in a second line), and what it counts as when the table is sorted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """The table: cells by row, below the names of their columns."""

    head: list[str]
    rows: list[list[Cell]]

    @property
    def shown(self) -> list[list[str]]:
        """What is shown, small print behind a line's end."""
        return [[shown for shown, _ in row] for row in self.rows]

    @property
    def values(self) -> list[list[str]]:
        """What each cell counts as when the table is sorted."""
        return [[value for _, value in row] for row in self.rows]

    def table(self) -> Table:
        """Return it for the files, small print in brackets."""
        rows = [[re.sub(r"\n(.*)", r" (\1)", cell) for cell in row] for row in self.shown]
        return Table(name="runs", caption="All runs", rows=[self.head, *rows])


def run_table(groups: Sequence[Group]) -> RunTable:
    """Return the table of the runs of some groups."""
    names = differing(groups)
    runs = [(run, known.settings) for known in groups for run in known.runs]
    has_seeds = len({run.settings["seed"] for run, _ in runs}) > 1
    has_noise = any(run.settings["privacy"]["mechanism"] != "none" for run, _ in runs)
    head = ["run", *(["seed"] if has_seeds else []), *(name.partition(".")[2] for name in names), *FIGURES]
    has_malicious = any(run.malicious for run, _ in runs)
    head += [NOISE] * has_noise + [WEIGHT] * has_malicious
    rows = []
    for run, settings in runs:
        own = [_text(shown_setting(settings.get(name))) for name in names]
        seed = [_number(run.settings["seed"], "{}")] if has_seeds else []
        further = [_epsilon(run)] * has_noise + [_weight(run)] * has_malicious
        rows.append([_text(run.directory.name), *seed, *own, *_figures(run), *further])
    return RunTable(head=head, rows=rows)


def _figures(run: RunData) -> list[Cell]:
    """Return the cells of what came out, of the last evaluated round if the run is not finished."""
    if not run.evaluated:
        return [_text("-")] * len(FIGURES)
    first, last, summary, split = run.evaluated[0], run.evaluated[-1], run.summary, run.partition.evaluation
    return [
        _rate(last.accuracy, split.examples if split else 0),
        _number(last.macro_f1, "{:.4f}"),
        _rate(first.accuracy, 0),
        _rate(last.attack_success_rate, split.triggered if split else 0),
        _number(None if summary is None else summary.bytes_per_client_round, "{:,}"),
        _number(None if summary is None else summary.seconds_total, "{:.1f}"),
    ]


def _weight(run: RunData) -> Cell:
    """Return what malicious clients count for before the rule, the mean over the rounds."""
    share = mean_of(run.rounds, "malicious_share")
    return _number(None if share is None else 100 * share, "{:.2f}")


def _epsilon(run: RunData) -> Cell:
    return _number(None if not run.rounds else run.rounds[-1].epsilon, "{:,.4g}")


def _rate(rate: float | None, count: int) -> Cell:
    if rate is None:
        return _text("-")
    shown = f"{100 * rate:.2f}"
    if count:
        low, high = wilson_interval(rate, count)
        shown += f"\n{100 * low:.1f} to {100 * high:.1f}"
    return shown, str(rate)


def _number(value: float | None, form: str) -> Cell:
    return _text("-") if value is None else (form.format(value), str(value))


def _text(value: Any) -> Cell:
    return str(value), str(value)
