"""Several runs side by side: curves with mean and band over seeds, and the paper's tables; on one page."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.files import RunFile, write_text
from fedprompt_mpi.report import page, theme
from fedprompt_mpi.report.figures import MOST_LEGEND, figure, legend_above, whole_numbers
from fedprompt_mpi.report.groups import Group, group, labels
from fedprompt_mpi.report.marks import mark_bar, mark_points
from fedprompt_mpi.report.pairs import pairs_table
from fedprompt_mpi.report.run_data import read_run
from fedprompt_mpi.report.run_table import run_table
from fedprompt_mpi.report.tables import Table, has_numbers, overview, paper_tables
from fedprompt_mpi.rundir.paths import RunPaths

TABLES_FOLDER = "tables"
STYLES = [(line, *look) for line in ("-", "--") for look in zip(theme.SERIES, theme.MARKERS, strict=True)]
MOST_CURVES = len(STYLES)
CURVES = (
    ("accuracy", False, "Accuracy by round"),
    ("attack_success_rate", False, "Attack success rate by round"),
    ("accuracy", True, "Accuracy by what each client has sent"),
)
"""Rate, whether it is drawn by bytes, and heading."""
CAPTION = "In percent; where there are several seeds, their mean, and one standard deviation to each side."
HOW_TO_READ = (
    "Small print: 95 % intervals (Wilson) for the number of texts that each rate is of. A click on a column's name "
    "sorts by it. Settings are those in which the runs differ; bytes are what a client sends in a round."
)


def read_groups(directories: Sequence[Path]) -> list[Group]:
    """Return the runs in some directories, one group for each experiment.

    Raises:
        SettingsError: if one is no run directory.
    """
    return group([read_run(directory) for directory in directories])


def write_comparison(groups: Sequence[Group], out: Path) -> tuple[Path, str]:
    """Write page, figures and tables of several runs.

    Args:
        groups: from `read_groups`.
        out: an existing folder for `report.html`, `figures/` and `tables/`.

    Returns:
        The page, and the tables as Markdown.
    """
    names = labels(groups)
    every = run_table(groups)
    listed = every.table()
    over_seeds = [overview(groups, names)] if any(len(known.runs) > 1 for known in groups) else []
    paired = [table for table in [pairs_table(groups, names)] if table is not None]
    tables = [listed, *over_seeds, *paired, *(table for table in paper_tables(groups) if has_numbers(table))]
    for table in tables:
        for ending, content in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(RunFile(out, f"{TABLES_FOLDER}/{table.name}.{ending}"), content)
    shown = page.Numbers(head=every.head, rows=every.shown, values=every.values)
    sections = [page.Section(name=listed.name, heading=listed.caption, table=shown, caption=HOW_TO_READ)]
    sections += [_section(table) for table in (*over_seeds, *paired)]
    with theme.style():
        for key, by_bytes, heading in CURVES:
            if by_bytes and _send_alike(groups):
                continue  # the same curves as by round
            for start in range(0, len(groups), MOST_CURVES):
                some = slice(start, start + MOST_CURVES)
                if not any(len(by_round(known, key)[0]) for known in groups[some]):
                    continue
                name = f"{key}{'-by-bytes' * by_bytes}-{start // MOST_CURVES + 1}".replace("_", "-")
                made = curves(groups[some], names[some], key, by_bytes=by_bytes)
                svg = theme.save(made, name, RunPaths(out).figure)
                numbers = None if by_bytes else _numbers(groups[some], names[some], key)
                sections.append(page.Section(name=name, heading=heading, svg=svg, caption=CAPTION, table=numbers))
    sections += [_section(table) for table in tables[1 + len(over_seeds) + len(paired) :]]
    html = page.render(
        title=f"{sum(len(known.runs) for known in groups)} runs, {len(groups)} different",
        lead=["Tables are beside this page as Markdown, CSV and LaTeX, figures as PNG and SVG."],
        tiles=[],
        sections=sections,
        refresh_s=None,
    )
    file = RunPaths(out).report
    write_text(file, html)
    markdown = "\n".join(f"{table.caption}\n\n{table.markdown()}" for table in tables)
    return file.path, markdown


def _section(table: Table) -> page.Section:
    shown = page.Numbers(head=table.rows[0], rows=table.rows[1:])
    return page.Section(name=table.name, heading=table.caption, table=shown)


def _numbers(groups: Sequence[Group], names: Sequence[str], key: str) -> page.Numbers:
    """Return the numbers of `curves`: a row a round, a column a group."""
    found = [dict(zip(rounds.tolist(), mean, strict=True)) for rounds, mean, _ in (by_round(g, key) for g in groups)]
    rounds = sorted(set().union(*found))
    rows = [[str(r), *(f"{own[r]:.2f}" if r in own else "-" for own in found)] for r in rounds]
    return page.Numbers(head=["round", *names], rows=rows, caption="%")


def curves(groups: Sequence[Group], names: Sequence[str], key: str, *, by_bytes: bool = False) -> Any:
    """Return a rate by round, or by the bytes that a client has sent, a curve a group."""
    shown = ["\n".join(textwrap.wrap(name, MOST_LEGEND)) for name in names]
    made, axis = figure(2.6 + 0.22 * sum(name.count("\n") + 1 for name in shown))
    for known, name, (style, colour, marker) in zip(groups, shown, STYLES, strict=False):
        rounds, mean, deviation = by_round(known, key)
        places: np.ndarray = rounds
        if by_bytes:
            sent = bytes_sent(known)[rounds]
            some = sent > 0  # a logarithmic axis has no 0
            places, rounds, mean, deviation = (values[some] for values in (sent, rounds, mean, deviation))
        if not len(places):
            continue
        (line,) = axis.plot(places, mean, style, color=colour, marker=marker, label=name)
        several = len(known.runs) > 1
        if several:
            band = axis.fill_between(places, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
            mark_bar(made, band, name, "")
        texts = [
            f"{name}, round {round_}: {rate:.2f} %".replace("\n", " ") + (f" ± {off:.2f}" if several else "")
            for round_, rate, off in zip(rounds, mean, deviation, strict=True)
        ]
        mark_points(made, line, name, texts)
    axis.set(xlabel="sent by each client" if by_bytes else "round", ylabel="%")
    if by_bytes:
        from matplotlib.ticker import EngFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
    else:
        whole_numbers(axis)
    legend_above(made, axis)
    return made


def bytes_sent(known: Group) -> np.ndarray:
    """Return how many bytes a client has sent up to each round `[R + 1]`: the mean over clients, of the longest run."""
    run = max(known.runs, key=lambda run: len(run.rounds))
    return np.cumsum([record.bytes_up for record in run.rounds]) / max(run.clients, 1)


def _send_alike(groups: Sequence[Group]) -> bool:
    """Return whether clients of all groups have sent as much after as many rounds, as far as all have come."""
    sent = [some for some in map(bytes_sent, groups) if len(some)]
    rounds = min(map(len, sent), default=0)
    return len({tuple(some[:rounds]) for some in sent}) <= 1


def by_round(known: Group, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rounds, mean and standard deviation of a rate in percent, where all runs of a group have it."""
    of_run = [{r.round: getattr(r, key) for r in run.evaluated if getattr(r, key) is not None} for run in known.runs]
    rounds = sorted(set.intersection(*map(set, of_run)))
    values = 100 * np.array([[rates[round_] for round_ in rounds] for rates in of_run])
    deviation = values.std(axis=0, ddof=1) if len(of_run) > 1 else np.zeros(len(rounds))
    return np.array(rounds, dtype=int), values.mean(axis=0), deviation
