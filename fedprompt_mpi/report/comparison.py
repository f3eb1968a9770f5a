"""Several runs side by side: curves with mean and band over seeds, and the paper's tables; on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.files import RunFile, write_text
from fedprompt_mpi.report import page, theme
from fedprompt_mpi.report.figures import figure, legend_above, whole_numbers
from fedprompt_mpi.report.groups import Group, group, labels
from fedprompt_mpi.report.run_data import read_run
from fedprompt_mpi.report.tables import Table, overview, paper_tables
from fedprompt_mpi.rundir.paths import RunPaths

TABLES_FOLDER = "tables"
MOST_CURVES = len(theme.SERIES)
CAPTION = "Mean over seeds, and one standard deviation to each side, where there are several."


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
    tables = [overview(groups, names), *paper_tables(groups)]
    for table in tables:
        for ending, content in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            write_text(RunFile(out, f"{TABLES_FOLDER}/{table.name}.{ending}"), content)
    sections = [_section(table) for table in tables]
    with theme.style():
        for start in range(0, len(groups), MOST_CURVES):
            some = slice(start, start + MOST_CURVES)
            name = f"curves-{start // MOST_CURVES + 1}"
            svg = theme.save(curves(groups[some], names[some]), name, RunPaths(out).figure)
            sections.append(page.Section(name=name, heading="Round by round", svg=svg, caption=CAPTION))
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


def curves(groups: Sequence[Group], names: Sequence[str]) -> Any:
    """Return accuracy and attack success rate by round, a curve a group."""
    made, (left, right) = figure(3.6 + 0.22 * len(groups), columns=2, sharex=True)
    looks = zip(theme.SERIES, theme.MARKERS, strict=True)
    for known, name, (colour, marker) in zip(groups, names, looks, strict=False):
        for axis, key in ((left, "accuracy"), (right, "attack_success_rate")):
            rounds, mean, deviation = by_round(known, key)
            if not len(rounds):
                continue
            axis.plot(rounds, mean, color=colour, marker=marker, label=name)
            if len(known.runs) > 1:
                axis.fill_between(rounds, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
    for axis, name in ((left, "accuracy, %"), (right, "attack success rate, %")):
        axis.set(xlabel="round", title=name)
        whole_numbers(axis)
    legend_above(made, left)
    return made


def by_round(known: Group, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rounds, mean and standard deviation of a rate in percent, where all runs of a group have it."""
    of_run = [{r.round: getattr(r, key) for r in run.evaluated if getattr(r, key) is not None} for run in known.runs]
    rounds = sorted(set.intersection(*map(set, of_run)))
    values = 100 * np.array([[rates[round_] for round_ in rounds] for rates in of_run])
    deviation = values.std(axis=0, ddof=1) if len(of_run) > 1 else np.zeros(len(rounds))
    return np.array(rounds), values.mean(axis=0), deviation
