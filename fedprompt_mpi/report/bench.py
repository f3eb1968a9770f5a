"""The results of `bench`: a table, fitted lines with predictions, and a plot; of one launch, or of several pooled."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.bench import BenchRow
from fedprompt_mpi.comm.fit import fit_segments, interpolate
from fedprompt_mpi.comm.statistics import LEAST_SAMPLES, quantiles
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import RunFile, read_json
from fedprompt_mpi.report.theme import save
from fedprompt_mpi.rules.setting import typed
from fedprompt_mpi.rundir.formats import format_seconds

FILE = "bench.json"
SAME = ("model", "ranks", "nodes", "rank_nodes", "library", "transport", "sync")
"""What launches that are pooled have in common."""
CORRELATED = 0.3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One method's vector."""

    name: str
    bytes: int
    seconds: dict[str, dict[str, float]]
    """Collective -> quantile -> seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchFile:
    """What is read of a bench.json."""

    model: str
    ranks: int
    nodes: int
    rank_nodes: list[int] | None = None
    """The node of each rank; an earlier version did not write them."""
    library: str
    transport: str
    clock_resolution_s: float
    sync: str
    launches: int
    rows: list[BenchRow]
    fits: dict[str, Any]
    predictions: list[Prediction]


def conclusions(rows: Sequence[Mapping[str, Any]], vectors: Mapping[str, int]) -> dict[str, Any]:
    """Return what follows from measured rows: lines fitted to the medians, and the seconds of each method's vector.

    Args:
        rows: of bench.json.
        vectors: name -> bytes.
    """
    fits: dict[str, Any] = {}
    predictions = [{"name": name, "bytes": size, "seconds": {}} for name, size in vectors.items()]
    for name in dict.fromkeys(row["collective"] for row in rows):
        own = sorted((row for row in rows if row["collective"] == name), key=lambda row: row["bytes"])
        sizes = [row["bytes"] for row in own]
        fits[name] = [dataclasses.asdict(line) for line in fit_segments(sizes, [r["transfer"]["median"] for r in own])]
        for vector in predictions:
            vector["seconds"][name] = {
                key: interpolate(sizes, [row["transfer"][key] for row in own], vector["bytes"])
                for key in ("median", "q05", "q95")
            }
    return {"fits": fits, "predictions": predictions}


def pool(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the pooled result of several launches: each counts once, with its own medians.

    Raises:
        SettingsError: if a folder has no bench.json, or they are not of one job; it names what differs.
    """
    found = [read_bench(folder, "--pool: ") for folder in folders]
    first = found[0]
    for folder, other in zip(folders, found, strict=True):
        differs = [name for name in SAME if getattr(other, name) != getattr(first, name)]
        if differs or _places(other) != _places(first):
            raise SettingsError(f"--pool: {folder} and {folders[0]} differ in {differs or 'what was measured'}")
    rows = [_pooled(same).to_json() for same in zip(*(result.rows for result in found), strict=True)]
    vectors = {vector.name: vector.bytes for vector in first.predictions}
    told = {name: getattr(first, name) for name in (*SAME, "clock_resolution_s")}
    return {**told, "launches": len(found), "rows": rows, **conclusions(rows, vectors)}


def _pooled(launches: Sequence[BenchRow]) -> BenchRow:
    """Return the row of several launches."""
    parts = {
        part: quantiles([getattr(row, part).median for row in launches])
        for part in ("raw", "transfer", "call", "raw_skew", "skew")
        if all(getattr(row, part) is not None for row in launches)
    }
    return dataclasses.replace(
        launches[0],
        repetitions=sum(row.repetitions for row in launches),
        missed=sum(row.missed for row in launches),
        autocorrelation=statistics.median(row.autocorrelation for row in launches),
        **parts,
    )


def read_bench(folder: Path, flag: str = "") -> BenchFile:
    """Read the result of a bench.

    Args:
        folder: of its files.
        flag: that named it, for the message.

    Raises:
        SettingsError: if there is none.
    """
    try:
        content = read_json(RunFile(folder, FILE))
        for row in content["rows"]:
            row.pop("ratio")  # which follows from the rest
        return typed(BenchFile, content)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise SettingsError(f"{flag}{folder / FILE} cannot be read as a result of bench ({error})") from error


def _places(result: BenchFile) -> list[tuple[Any, Any]]:
    return [(row.collective, row.bytes) for row in result.rows]


def format_bench(result: Mapping[str, Any]) -> str:
    """Return the tables of a bench.json, or of several pooled, as text."""
    several = result["launches"] > 1
    start = "after two barriers" if result["sync"] == "barrier" else "at an agreed time"
    lines = [
        f"{_where(result)}; {result['library']}; clock resolution {format_seconds(result['clock_resolution_s'])}",
        f"each repetition with its slowest rank; ranks start {start}; caches are warm, buffers used again",
        f"{'collective':<11}{'bytes':>13}{'runs':>6}{'raw':>11}{'skew':>11}{'transfer':>11}{'q05 - q95':>23}"
        f"{'skew':>11}{'ratio':>7}{'call':>11}",
    ]
    for row in result["rows"]:
        raw, raw_skew = (
            "-" if row[name] is None else format_seconds(row[name]["median"]) for name in ("raw", "raw_skew")
        )
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        spread = f"{format_seconds(row['transfer']['q05'])} - {format_seconds(row['transfer']['q95'])}"
        lines.append(
            f"{row['collective']:<11}{row['bytes']:>13,}{row['repetitions']:>6}{raw:>11}{raw_skew:>11}"
            f"{format_seconds(row['transfer']['median']):>11}{spread:>23}{format_seconds(row['skew']['median']):>11}"
            f"{ratio:>7}{format_seconds(row['call']['median']):>11}"
        )
    lines += _notes(result)
    lines += ["", "lines fitted to the medians: transfer = latency + bytes / bandwidth"]
    for name, segments in result["fits"].items():
        for line in segments:
            slope = f"bytes / {1e-6 / line['seconds_per_byte']:,.1f} MB/s" if line["seconds_per_byte"] else "0"
            lines.append(
                f"{name:<11}{line['first']:>13,} to {line['last']:>11,} bytes{format_seconds(line['latency_s']):>12} + "
                f"{slope}   (off by {line['worst']:.0%} at most)"
            )
            name = ""
    workers, of = result["ranks"] - 1, "launches" if several else "repetitions"
    lines += [
        "",
        f"for {result['model']}, one collective, {workers} worker{'s' if workers > 1 else ''}, between the measured "
        f"sizes: median (q05 - q95 of {of})",
        f"{'vector':<18}{'bytes':>15}" + "".join(f"{name:>36}" for name in result["fits"]),
    ]
    for vector in result["predictions"]:
        seconds = "".join(f"{_with_spread(vector['seconds'][name]):>36}" for name in result["fits"])
        lines.append(f"{vector['name']:<18}{vector['bytes']:>15,}{seconds}")
    return "\n".join(lines)


def _with_spread(figures: Mapping[str, float]) -> str:
    median, low, high = (format_seconds(figures[key]) for key in ("median", "q05", "q95"))
    return f"{median} ({low} - {high})"


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table has to know."""
    rows, launches, lines = result["rows"], result["launches"], []
    if launches >= LEAST_SAMPLES:
        lines.append(f"95 % intervals of the medians, over {launches} launches:")
        lines += [
            f"  {row['collective']:<11}{row['bytes']:>13,}   {format_seconds(row['transfer']['low'])} - "
            f"{format_seconds(row['transfer']['high'])}"
            for row in rows
        ]
    else:
        lines.append(
            f"No intervals: they need {LEAST_SAMPLES} launches or more, since each places its processes anew, and "
            f"there {'is 1' if launches == 1 else f'are {launches}'}. Pool them with bench --pool DIR DIR..."
        )
    most = max(row["autocorrelation"] for row in rows)
    if most > CORRELATED:
        lines.append(
            f"Repetitions follow those before them (correlation up to {most:.2f}): they tell less than so many."
        )
    if any(row["ratio"] is not None and row["ratio"] < 1 for row in rows):
        lines.append("A ratio below 1 is no gain: both call one collective, after different waits; see --sync window.")
    missed = sum(row["missed"] for row in rows)
    if missed:
        lines.append(f"{missed} repetitions were left out, or marked: a rank had missed the agreed start.")
    return lines


def _where(result: Mapping[str, Any]) -> str:
    return f"{result['ranks']} ranks on {result['nodes']} node{'s' if result['nodes'] > 1 else ''}"


def plot_bench(result: Mapping[str, Any], folder: Path) -> Sequence[Path]:
    """Write bench.png and bench.svg: raw collective, ours and the fitted lines over sizes, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(result["fits"]), sharey=True)
    for axis, (name, segments) in zip(axes, result["fits"].items(), strict=True):
        rows = [row for row in result["rows"] if row["collective"] == name]
        for key, marker, label in (("raw", "s", "raw mpi4py"), ("transfer", ".", "transfer"), ("call", "+", "call")):
            there = [row for row in rows if row[key]]
            sizes, medians = [row["bytes"] for row in there], [row[key]["median"] for row in there]
            axis.plot(sizes, medians, marker, markerfacecolor="none" if key == "raw" else None, label=label)
        low, high = ([row["transfer"][key] for row in rows] for key in ("q05", "q95"))
        axis.fill_between([row["bytes"] for row in rows], low, high, alpha=0.15, linewidth=0, label="q05 - q95")
        for number, line in enumerate(segments):
            own = [row["bytes"] for row in rows if line["first"] <= row["bytes"] <= line["last"]]
            model = [line["latency_s"] + line["seconds_per_byte"] * n for n in own]
            label = "_" if number else "latency + bytes / bandwidth"
            axis.plot(own, model, "-", linewidth=1, color="0.3", label=label)
        for vector in result["predictions"]:
            axis.axvline(vector["bytes"], color="0.8", linewidth=0.8, zorder=0)
            place = (vector["bytes"], 0.02)
            style = {"rotation": 90, "ha": "right", "color": "0.4", "fontsize": 8}
            axis.annotate(vector["name"].split()[0], place, xycoords=("data", "axes fraction"), **style)
        axis.set(xscale="log", yscale="log", title=name, xlabel="bytes of one vector")
    axes[0].set_ylabel("seconds (median of the slowest rank)")
    axes[0].legend(fontsize=8)
    figure.suptitle(_where(result), fontsize=10)
    save(figure, "bench", folder.joinpath)
    return [folder / "bench.png", folder / "bench.svg"]
