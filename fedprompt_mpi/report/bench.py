"""The results of `bench`: a table, a fitted model with its predictions, and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.report.theme import save
from fedprompt_mpi.rundir.console import format_seconds


def format_bench(result: Mapping[str, Any]) -> str:
    """Return the tables of a bench.json as text."""
    lines = [
        f"{_where(result)}; {result['library']}; clock resolution {format_seconds(result['clock_resolution_s'])}",
        f"{'collective':<11}{'bytes':>13}{'runs':>6}{'raw':>12}{'transfer':>12}"
        f"{'95 % interval':>25}{'ratio':>7}{'call':>12}",
    ]
    for row in result["rows"]:
        raw = "-" if row["raw"] is None else format_seconds(row["raw"]["median"])
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        interval = f"{format_seconds(row['transfer']['low'])} - {format_seconds(row['transfer']['high'])}"
        lines.append(
            f"{row['collective']:<11}{row['bytes']:>13,}{row['repetitions']:>6}{raw:>12}"
            f"{format_seconds(row['transfer']['median']):>12}{interval:>25}{ratio:>7}"
            f"{format_seconds(row['call']['median']):>12}"
        )
    lines += ["", "transfer = latency + bytes / bandwidth, fitted"]
    for name, fit in result["fits"].items():
        slope = f"bytes / {1e-6 / fit['seconds_per_byte']:,.1f} MB/s" if fit["seconds_per_byte"] else "0"
        lines.append(
            f"{name:<11}{format_seconds(fit['latency_s']):>12} + {slope}   (off by {fit['worst']:.0%} at most)"
        )
    workers = result["ranks"] - 1
    lines += ["", f"predicted for {result['model']}, one collective, {workers} worker{'s' if workers > 1 else ''}"]
    lines.append(f"{'vector':<18}{'bytes':>15}" + "".join(f"{name:>12}" for name in result["fits"]))
    for vector in result["predictions"]:
        seconds = "".join(f"{format_seconds(vector['seconds'][name]):>12}" for name in result["fits"])
        lines.append(f"{vector['name']:<18}{vector['bytes']:>15,}{seconds}")
    return "\n".join(lines)


def _where(result: Mapping[str, Any]) -> str:
    return f"{result['ranks']} ranks on {result['nodes']} node{'s' if result['nodes'] > 1 else ''}"


def plot_bench(result: Mapping[str, Any], folder: Path) -> Sequence[Path]:
    """Write bench.png and bench.svg: raw collective, ours and the model over sizes, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(result["fits"]), sharey=True)
    for axis, (name, fit) in zip(axes, result["fits"].items(), strict=True):
        rows = [row for row in result["rows"] if row["collective"] == name]
        for key, marker, label in (("raw", "s", "raw mpi4py"), ("transfer", ".", "transfer"), ("call", "+", "call")):
            there = [row for row in rows if row[key]]
            sizes, medians = [row["bytes"] for row in there], [row[key]["median"] for row in there]
            axis.plot(sizes, medians, marker, markerfacecolor="none" if key == "raw" else None, label=label)
        sizes = [row["bytes"] for row in rows]
        model = [fit["latency_s"] + fit["seconds_per_byte"] * n for n in sizes]
        axis.plot(sizes, model, "-", linewidth=1, label="latency + bytes / bandwidth")
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
