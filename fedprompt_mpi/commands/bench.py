"""The command bench: raw MPI collectives and the channel's, side by side over message sizes."""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.start import start_mpi
from fedprompt_mpi.commands.settings import add_sizes, command_parser, model_of, parse, prompt_of
from fedprompt_mpi.config import CommConfig, PromptConfig, SettingsError
from fedprompt_mpi.files import write_json
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.report.bench import conclusions, format_bench, plot_bench, pool
from fedprompt_mpi.rundir.directory import check_directory, make_directory
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.start.launcher import read_launch


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Measure, print the tables, and write bench.json and the plots."""
    parser = command_parser("bench", "raw MPI collectives and this program's, side by side over message sizes")
    add_sizes(parser)
    parser.add_argument("--sizes", type=list[int], default=[], help="more sizes to measure, in bytes")
    parser.add_argument("--largest", type=int, help="largest size, in bytes; by default the whole model's vector")
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate time for each size and collective")
    parser.add_argument(
        "--sync", type=Literal["barrier", "window"], default="barrier",
        help="ranks start after a barrier, or at an agreed time",
    )  # fmt: skip
    parser.add_argument("--pool", type=list[str], default=[], help="folders of several launches: pool them, no ranks")
    parser.add_argument("--dir", help="folder of bench.json and the plots; by default runs/bench-<time>")
    parsed = parse(parser, arguments)
    for name in ("largest", "seconds"):
        if getattr(parsed, name) is not None and getattr(parsed, name) <= 0:
            raise SettingsError(f"--{name} is {getattr(parsed, name)}: give a number above 0")
    if any(size <= 0 for size in parsed.sizes):
        raise SettingsError(f"--sizes is {parsed.sizes}: give bytes, each above 0")
    if parsed.largest is not None and max(parsed.sizes, default=0) > parsed.largest:
        raise SettingsError(f"--sizes is {parsed.sizes}, of which some are above --largest {parsed.largest}: raise it")
    launch = read_launch()
    if parsed.pool:
        given = [name for name, value in vars(parsed).items() if name != "pool" and value != parser.get_default(name)]
        if given:
            raise SettingsError(f"--pool takes the launches as they are: leave out --{given[0]}")
        if launch.rank == 0:
            print(format_bench(pool([Path(folder) for folder in parsed.pool])), flush=True)
        return
    if launch.is_alone:
        raise SettingsError(
            "bench measures messages between ranks, but there is one: start it with mpirun -n 2 or more"
        )
    mpi = start_mpi(launch, liveness, CommConfig().start_deadline_s)
    from fedprompt_mpi.comm.bench import COLLECTIVES, Bench, sizes_up_to

    measurement = Bench(mpi.COMM_WORLD, liveness, seconds=parsed.seconds, sync=parsed.sync)
    channel = measurement.channel
    directory = Path(parsed.dir or f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
    vectors = _agree_on_vectors(channel, model_of(parsed), prompt_of(parsed), directory)
    largest = parsed.largest or max([vectors["full"], *parsed.sizes])
    sizes = sizes_up_to(largest, [size for size in (*vectors.values(), *parsed.sizes) if size <= largest])
    rows = [measurement.measure(collective, size) for collective in COLLECTIVES for size in sizes]
    if channel.rank == 0:
        made = make_directory(directory, is_new=parsed.dir is None)
        _write(_result(channel, parsed, rows, vectors), made)
    channel.close()


def _agree_on_vectors(channel: Channel, model: str, prompt: PromptConfig, directory: Path) -> dict[str, int]:
    """Return the bytes of every method's vector, on every rank; rank 0 reads the model's config.

    Raises:
        SettingsError: on every rank, if there is none, or the directory cannot be written to.
    """
    vectors: dict[str, int] = {}
    wrong = None
    if channel.rank == 0:
        try:
            check_directory(RunPaths(directory), resume=False)
            vectors = _vectors(model, prompt)
        except SettingsError as error:
            wrong = str(error)
    wrong = channel.agree(wrong)
    if wrong is not None:
        channel.close()
        raise SettingsError(wrong)
    count = np.array([len(vectors)])
    channel.tell(count)
    named = np.zeros(int(count[0]), dtype=[("name", "S32"), ("bytes", "<i8")])
    if channel.rank == 0:
        named["name"], named["bytes"] = [name.encode() for name in vectors], list(vectors.values())
    channel.tell(named.view(np.uint8))
    return {name.decode(): int(size) for name, size in named.tolist()}


def _vectors(model: str, prompt: PromptConfig) -> dict[str, int]:
    """Return the bytes of every method's vector, ascending."""
    from fedprompt_mpi.commands.cost import count_parameters
    from fedprompt_mpi.plm.hugging_face import read_config

    config = read_config(model)
    counts = count_parameters(config, prompt)
    return {name: 4 * count for name, count in sorted(counts.items(), key=lambda item: item[1])}


def _result(channel: Channel, parsed: Namespace, rows: Sequence[Any], vectors: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of bench.json: measurements, fitted lines, predictions."""
    mpi = channel.placement.mpi
    told = {
        "model": model_of(parsed),
        "ranks": channel.size,
        "nodes": int(channel.placement.nodes.max()) + 1,
        "rank_nodes": channel.placement.nodes.tolist(),
        "library": mpi.library,
        "transport": mpi.transport,
        "clock_resolution_s": mpi.clock_resolution_s,
        "sync": parsed.sync,
        "launches": 1,
        "rows": [row.to_json() for row in rows],
    }
    return told | conclusions(told["rows"], vectors)


def _write(result: dict[str, Any], directory: Path) -> None:
    write_json(directory / "bench.json", result)
    print(format_bench(result), flush=True)
    files = (directory / "bench.json", *plot_bench(result, directory))
    print("\n" + ", ".join(str(file) for file in files), flush=True)
