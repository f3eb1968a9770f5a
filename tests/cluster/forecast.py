"""Forecasts against what the virtual cluster then takes: measured once, scored as often as the model changes.

python -m tests.cluster.forecast measure DIR MODEL DATA   sources on up to 3 nodes, then cells on 5 and 8 (root; 1 h)
python -m tests.cluster.forecast score DIR CSV            each cell's forecast and signed error
python -m tests.cluster.forecast tables CSV               the tables of the guide, of a CSV file, into the guide

Sources: bench on one node (3 ranks), two and three, vectors of up to 1 MB, at 1 Gbit/s; and rounds of each method on
one node, which say what training takes: their vectors cross no link. One of them has more workers than cores. What is
measured already is not measured again.
"""

import csv
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprompt_mpi.forecast.costs import Vector, evenly
from fedprompt_mpi.forecast.links import fit_links
from fedprompt_mpi.forecast.network import Network, read_network
from fedprompt_mpi.forecast.score import Score, score_run
from fedprompt_mpi.forecast.sources import Measured, read_sources
from tests.cluster.virtual import BURST_BYTES, Cluster
from tests.jobs import REPOSITORY

SOURCE_RATE = 1000
BENCHES = {"bench-1": (3,), "bench-2": (1, 1), "bench-3": (1, 1, 1)}
METHODS = {"soft": 30_720, "p_tuning": 25_445_376, "full": 90_978_024}
"""Method -> bytes of its vector, of the PLM that the runs share."""
SIZES = (6_144_000, 25_445_376, 90_978_024)
NODES, RATES, COLLECTIVES = (5, 8), (1000, 100), ("gather", "reduce")
RUNS = [(f"run-{method}-{collective}", 3, method, collective) for method in METHODS for collective in COLLECTIVES]
RUNS.append(("run-crowded", 6, "soft", "gather"))  # five workers on two cores
REPETITIONS = {1000: 5, 100: 2}
GUIDE = REPOSITORY / "fedprompt_mpi" / "forecast" / "README.md"
BEGIN, END = "<!-- errors -->", "<!-- end -->"
COLUMNS = (
    "kind",
    "nodes",
    "rate_mbit",
    "what",
    "phase",
    "bytes",
    "measured_s",
    "forecast_s",
    "low_s",
    "high_s",
    "error",
)


def network_file(folder: Path, rate_mbit: int, cores: int = 2) -> Path:
    """Write what is known of the virtual cluster as a network, and return the file."""
    file = folder / f"virtual-{rate_mbit}.toml"
    file.write_text(
        f"""\
name = "virtual cluster, {rate_mbit} Mbit/s"
latency_us = 0
up_mbit = {rate_mbit}
down_mbit = {rate_mbit}
efficiency = {1448 / 1514}
source = "tc's token buckets, which count frames of 1,514 bytes"
[contention]
cores = {cores}
burst_bytes = {BURST_BYTES}
"""
    )
    return file


def bench(cluster: Cluster, ranks: tuple[int, ...], folder: Path, largest: int = 2**20) -> None:
    """Measure collectives with so many ranks on each node."""
    flags = ("-m", "fedprompt_mpi", "bench", "--largest", str(largest), "--seconds", "0.3", "--dir", str(folder))
    done = cluster.mpirun(ranks, *flags, deadline_s=300)
    assert done.status == 0, done


def run(cluster: Cluster, ranks: tuple[int, ...], folder: Path, method: str, *flags: str) -> None:
    """Run rounds of a method."""
    done = cluster.mpirun(
        ranks, "-m", "fedprompt_mpi", f"--prompt.method={method}", "--comm.mode=measure", "--client.steps=1",
        "--client.lr=0.00005", "--task.max_train=100", "--task.max_test=20", f"--output.dir={folder}",
        "--output.checkpoint_every=100", *flags, deadline_s=900,
    )  # fmt: skip
    assert done.status == 0, done


def measure(folder: Path, model: str, data: str) -> None:
    """Measure the sources and the cells that are not there yet."""
    folder.mkdir(exist_ok=True)
    real = (f"--model.name={model}", "--task.name=sst2", f"--task.data={data}")
    cluster = Cluster(nodes=max(NODES), rate_mbit=SOURCE_RATE)
    try:
        for name, places in BENCHES.items():
            if not (folder / name / "bench.json").exists():
                bench(cluster, places, folder / name)
        for name, ranks, method, collective in RUNS:
            flags = (f"--comm.collective={collective}", "--federation.rounds=8", *real)
            if not (folder / name / "summary.json").exists():
                run(cluster, (ranks,), folder / name, method, *flags)
        for rate in RATES:
            cluster.limit(rate)
            for nodes in NODES:
                _cells(cluster, folder, nodes, rate, real)
    finally:
        cluster.close()


def _cells(cluster: Cluster, folder: Path, nodes: int, rate: int, real: tuple[str, ...]) -> None:
    for size in SIZES:
        file = folder / f"transfer-{nodes}-{rate}-{size}.json"
        if not file.exists():
            repetitions = str(REPETITIONS[rate])
            done = cluster.mpirun(
                (1,) * nodes, "-m", "tests.cluster.probe", "ours", str(size // 4), repetitions, deadline_s=600
            )
            assert done.status == 0, done
            file.write_text(done.out.splitlines()[-1] + "\n")
    for method in METHODS:
        for collective in COLLECTIVES:
            directory = folder / f"rounds-{nodes}-{rate}-{method}-{collective}"
            rounds = 3 if (rate, method) == (100, "full") else 8 if method == "soft" else 5
            if not (directory / "summary.json").exists():
                run(cluster, (1,) * nodes, directory, method, f"--comm.collective={collective}",
                    f"--federation.rounds={rounds}", *real)  # fmt: skip


def sources(folder: Path) -> tuple[Measured, Network]:
    """Return what was measured on up to 3 nodes, and the network on which."""
    named = [str(folder / name) for name in (*BENCHES, *(name for name, *_ in RUNS))]
    return read_sources(named), read_network(str(network_file(folder, SOURCE_RATE)))


def cells(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each measured cell with its forecast, as a line of the CSV."""
    measured, on = sources(folder)
    for rate in RATES:
        network = read_network(str(network_file(folder, rate)))
        links = fit_links(measured.transfers, on, network)
        for nodes in NODES:
            for size in SIZES:
                file = folder / f"transfer-{nodes}-{rate}-{size}.json"
                for name, seconds in json.loads(file.read_text()).items() if file.exists() else ():
                    median = statistics.median(seconds)
                    forecast = links.seconds(name, evenly(nodes, 1, nodes - 1), Vector(size // 4, size))
                    score = Score(name=name, forecast=forecast, measured=median)
                    yield _line(("transfer", nodes, rate), name, size, score)
            for method, size in METHODS.items():
                for collective in COLLECTIVES:
                    directory = folder / f"rounds-{nodes}-{rate}-{method}-{collective}"
                    if (directory / "summary.json").exists():
                        for score in score_run(directory, measured, on, network):
                            yield _line(("round", nodes, rate), f"{method}, {collective}", size, score)


def _line(place: tuple[str, int, int], what: str, size: int, score: Score) -> dict[str, Any]:
    low, high = score.forecast.interval
    seconds = (score.measured, score.forecast.seconds, low, high)
    return dict(zip(COLUMNS, (*place, what, score.name, size, *(f"{s:.6f}" for s in seconds),
                              f"{score.error:+.4f}"), strict=True))  # fmt: skip


def read_cells(file: Path) -> list[dict[str, str]]:
    """Return the lines of the CSV file."""
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def tables(rows: list[dict[str, str]]) -> str:
    """Return the signed errors of every cell in two tables, and how good they are together."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("transfer", "round")}
    places = [(nodes, rate) for rate in RATES[::-1] for nodes in NODES]
    head = "".join(f" {nodes} nodes, {rate:,} Mbit/s |" for nodes, rate in places)
    lines = [f"| collective | bytes |{head}", "| --- | --- |" + " --- |" * len(places)]
    for size in SIZES:
        for name in ("broadcast", *COLLECTIVES):
            own = [row for row in kinds["transfer"] if (row["what"], row["bytes"]) == (name, str(size))]
            lines.append(f"| `{name}` | {size:,} |" + "".join(f" {_error(own, place)} |" for place in places))
    lines += ["", f"| method | round | figure |{head}", "| --- | --- | --- |" + " --- |" * len(places)]
    for method in METHODS:
        for collective in COLLECTIVES:
            own = [row for row in kinds["round"] if row["what"] == f"{method}, {collective}"]
            for phase in ("broadcast", collective, "train", "evaluate", "round"):
                found = [row for row in own if row["phase"] == phase]
                cells = "".join(f" {_error(found, place)} |" for place in places)
                lines.append(f"| `{method}` | `{collective}` | {phase} |{cells}")
    whole = [row for row in kinds["round"] if row["phase"] == "round"]
    inside = [row for row in kinds["round"] if row["phase"] in ("broadcast", *COLLECTIVES)]
    large = [row for row in inside if int(row["bytes"]) >= SIZES[0]]
    lines += [
        "",
        "| cells | number | median error | worst | held by their interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    together = {
        "collectives by themselves": kinds["transfer"], "collectives in rounds, of 25 and 91 MB": large,
        "rounds": whole, "these together": [*kinds["transfer"], *large, *whole],
        "training": [row for row in kinds["round"] if row["phase"] == "train"],
        "evaluation": [row for row in kinds["round"] if row["phase"] == "evaluate"],
        "collectives in rounds, of 30 kB": [row for row in inside if row not in large], "all cells": rows,
    }  # fmt: skip
    for name, own in together.items():
        errors = sorted(abs(float(row["error"])) for row in own)
        held = statistics.fmean(float(row["low_s"]) <= float(row["measured_s"]) <= float(row["high_s"]) for row in own)
        lines.append(f"| {name} | {len(own)} | {statistics.median(errors):.1%} | {errors[-1]:.1%} | {held:.0%} |")
    return "\n".join(lines).replace("%", " %").replace("95  %", "95 %")


def _error(rows: list[dict[str, str]], place: tuple[int, int]) -> str:
    """Return the signed error of the row at a place, in percent; a star if its interval does not hold it."""
    for row in rows:
        if (int(row["nodes"]), int(row["rate_mbit"])) == place:
            holds = float(row["low_s"]) <= float(row["measured_s"]) <= float(row["high_s"])
            return f"{100 * float(row['error']):+.1f}{'' if holds else '*'}"
    return "-"


def in_guide(text: str, rows: list[dict[str, str]]) -> str:
    """Return the text of the guide with its tables as the rows have them."""
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n\n{tables(rows)}\n\n{text[after:]}"


def main() -> None:
    command, folder, *rest = sys.argv[1:]
    if command == "measure":
        measure(Path(folder), *rest)
    elif command == "tables":
        GUIDE.write_text(in_guide(GUIDE.read_text(), read_cells(Path(folder))))
    elif command == "score":
        with Path(rest[0]).open("w", newline="") as opened:
            writer: csv.DictWriter[str] = csv.DictWriter(opened, COLUMNS)
            writer.writeheader()
            writer.writerows(cells(Path(folder)))


if __name__ == "__main__":
    main()
