"""Statistics of the phases of a round, from one run directory or from several launches of one job."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.statistics import LEAST_SAMPLES, communication, rounds_after, slowest_by_round
from fedprompt_mpi.comm.traffic import NOTHING, Traffic
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.report.run_data import RunData, read_run
from fedprompt_mpi.rules.setting import Comparison
from fedprompt_mpi.rundir.formats import format_seconds
from fedprompt_mpi.rundir.may_differ import compared, differences
from fedprompt_mpi.rundir.records import RoundTraffic

UNMEASURED = ("wait", "wait (rank 0)", "wait (workers)", "transfer", "broadcast", "gather", "reduce", "overhead")
"""Figures that have no meaning where nothing separates waiting from the collective."""


def is_told(name: str, mode: str) -> bool:
    """Return True if a figure has a meaning in a mode: in observe mode wait and transfer are one."""
    return name != "wait + transfer" if mode == "measure" else name not in UNMEASURED


def read_communication(directories: Sequence[Path], *, warmup: int | None) -> dict[str, Any]:
    """Return the pooled figures of run directories, and the last round's traffic.

    Args:
        directories: of launches of the same job.
        warmup: rounds to leave out; None for the setting of the runs.

    Raises:
        SettingsError: if one is no finished run, or they are not of one job.
    """
    runs = [read_run(directory) for directory in directories]
    jobs = [_job(run) for run in runs]
    for directory, run, job in zip(directories, runs, jobs, strict=True):
        if run.communication is None or not run.rounds:
            raise SettingsError(f"{directory} is not finished, and has no statistics yet: name a finished run")
        differs = differences(jobs[0], job)
        if differs:
            raise SettingsError(
                f"{directory} differs from {directories[0]} in {', '.join(differs)}: pool launches of one job, which "
                "differ in seed and output alone"
            )
    figures, last = runs[-1].communication, runs[-1].rounds[-1].traffic
    assert figures is not None
    launches = [rounds_after(slowest_by_round(run.timings), run.environment.resumed_after) for run in runs]
    pooled = communication(launches, warmup=figures.warmup_rounds if warmup is None else warmup)
    traffic = None if last is None else _parts(last)
    return {"mode": figures.mode, **pooled, "traffic": traffic}


def _parts(traffic: RoundTraffic) -> dict[str, Traffic]:
    """Return the parts of a round's traffic by name; keys and shares only if there were some."""
    parts = {field.name: getattr(traffic, field.name) for field in dataclasses.fields(traffic)}
    return {name: part for name, part in parts.items() if name != "secure" or part != NOTHING}


def _job(run: RunData) -> dict[str, Any]:
    """Return what launches of one job have in common: the settings, and the node of each rank."""
    return {**compared(run.settings, Comparison.LAUNCHES), "nodes": [rank.node for rank in run.environment.ranks]}


def format_communication(figures: dict[str, Any]) -> str:
    """Return the table as text."""
    of = "launches" if figures["launches"] > 1 else "rounds"
    lines = [
        f"{figures['launches']} launch{'es' if figures['launches'] > 1 else ''}, {figures['rounds']} rounds after "
        f"{figures['warmup_rounds']} of warm-up; seconds of the slowest rank in a round, over {of}",
        f"{'phase':<17}" + "".join(f"{name:>12}" for name in ("median", "95 % from", "to", "q05", "q25", "q75", "q95")),
    ]
    samples = figures["launches"] if figures["launches"] > 1 else figures["rounds"]
    if samples < LEAST_SAMPLES:
        lines.append(f"An interval needs {LEAST_SAMPLES} {of} or more, there are {samples}.")
    measured = figures["mode"] == "measure"
    for name, row in figures["seconds"].items():
        if not is_told(name, figures["mode"]):
            continue
        cells = (row[key] for key in ("median", "low", "high", "q05", "q25", "q75", "q95"))
        lines.append(f"{name:<17}" + "".join(f"{'-' if s is None else format_seconds(s):>12}" for s in cells))
    if not measured:
        lines.append("Waiting and transfer are told apart by --comm.mode measure.")
    if figures["traffic"] is not None:
        lines += ["", f"{'last round':<17}{'bytes':>15}{'messages':>10}{'on the wire':>15}{'messages':>10}"]
        for way, t in figures["traffic"].items():
            lines.append(f"{way:<17}{t.bytes:>15,}{t.messages:>10}{t.wire_bytes:>15,}{t.wire_messages:>10}")
    return "\n".join(lines)
