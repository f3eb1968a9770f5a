"""Where the time of a round goes, from one run directory or from several launches of one job."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.statistics import communication
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.console import format_seconds
from fedprompt_mpi.records import read_timings

UNMEASURED = ("wait", "transfer", "broadcast", "gather", "reduce", "overhead")
"""What is not told apart where nothing separates waiting from the collective."""


def read_communication(directories: Sequence[Path], *, warmup: int | None) -> dict[str, Any]:
    """Return the pooled figures of run directories, and the last round's traffic.

    Args:
        directories: of launches of the same job.
        warmup: rounds to leave out; None for what the first run was told.

    Raises:
        SettingsError: if one is no finished run, or they were not measured alike.
    """
    modes, launches, first = set(), [], None
    for directory in directories:
        try:
            figures = json.loads((directory / "communication.json").read_text())
            modes.add(figures["mode"])
            launches.append(read_timings(directory))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{directory} cannot be read as a finished run ({error!r}): name a run directory"
            ) from error
        first = first or figures
    assert first is not None
    if len(modes) > 1:
        raise SettingsError("some of these runs have comm.mode measure and some observe: pool runs of one kind")
    pooled = communication(launches, warmup=first["warmup_rounds"] if warmup is None else warmup)
    traffic = json.loads((directories[0] / "rounds.jsonl").read_text().splitlines()[-1])["traffic"]
    return {"mode": first["mode"], **pooled, "traffic": traffic}


def format_communication(figures: dict[str, Any]) -> str:
    """Return the table, for people."""
    of = "launches" if figures["launches"] > 1 else "rounds"
    lines = [
        f"{figures['launches']} launch{'es' if figures['launches'] > 1 else ''}, {figures['rounds']} rounds after "
        f"{figures['warmup_rounds']} of warm-up; seconds of the slowest rank in a round, over {of}",
        f"{'phase':<17}" + "".join(f"{name:>12}" for name in ("median", "95 % from", "to", "q05", "q25", "q75", "q95")),
    ]
    measured = figures["mode"] == "measure"
    for name, row in figures["seconds"].items():
        if (name == "wait + transfer") if measured else (name in UNMEASURED):
            continue
        cells = (row[key] for key in ("median", "low", "high", "q05", "q25", "q75", "q95"))
        lines.append(f"{name:<17}" + "".join(f"{'-' if s is None else format_seconds(s):>12}" for s in cells))
    if not measured:
        lines.append("Waiting and transfer are told apart by --comm.mode measure.")
    if figures["traffic"] is not None:
        lines += ["", f"{'last round':<17}{'bytes':>15}{'messages':>10}{'on the wire':>15}{'messages':>10}"]
        for way, t in figures["traffic"].items():
            lines.append(f"{way:<17}{t['bytes']:>15,}{t['messages']:>10}{t['wire_bytes']:>15,}{t['wire_messages']:>10}")
    return "\n".join(lines)
