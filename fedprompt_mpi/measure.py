"""The commands that measure the machine and not a model: `bench` and `doctor`, top to bottom."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import Channel, open_channel, start_mpi
from fedprompt_mpi.comm.doctor import Rank, format_ranks, warnings_of
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.comm.topology import bind_device, own_processors, thread_count
from fedprompt_mpi.config import PromptConfig, SettingsError
from fedprompt_mpi.files import write_json
from fedprompt_mpi.records import check_directory


def bench(
    model: str, prompt: PromptConfig, more_sizes: list[int], largest: int | None, seconds: float, directory: Path
) -> None:
    """Measure raw collectives and ours, print the tables, and write bench.json and the plots.

    Args:
        model: whose vectors are predicted, and whose whole vector is the largest size.
        prompt: sizes of its prompt.
        more_sizes: bytes.
        largest: bytes; None for the whole model's.
        seconds: about so long for each size and collective.
        directory: where the files go.

    Raises:
        SettingsError: on every rank, if there is nobody to send to, or something is wrong on rank 0.
    """
    launch = read_launch()
    if launch.size == 1:
        raise SettingsError(
            "bench measures messages between ranks, but there is one: start it with mpirun -n 2 or more"
        )
    mpi = start_mpi(launch)
    from fedprompt_mpi.comm.bench import COLLECTIVES, Bench, fit, sizes_up_to

    measurement = Bench(mpi.COMM_WORLD, seconds=seconds)
    channel = measurement.channel
    vectors: dict[str, int] = {}
    wrong = None
    if channel.rank == 0:
        try:
            check_directory(directory, resume=False)
            vectors = _vectors(model, prompt)
        except SettingsError as error:
            wrong = str(error)
    wrong = channel.agree(wrong)
    if wrong is not None:
        channel.close()
        raise SettingsError(wrong)
    of_root = [float(largest or vectors["full"]), float(len(vectors))] if channel.rank == 0 else [0.0, 0.0]
    biggest, count = channel.sum(np.array(of_root)).tolist()
    asked = channel.sum(np.array([*vectors.values()] or np.zeros(int(count)), dtype=np.float64))
    sizes = sizes_up_to(int(biggest), [int(n) for n in (*asked, *more_sizes) if n <= biggest])
    rows = [measurement.measure(collective, size) for collective in COLLECTIVES for size in sizes]
    if channel.rank == 0:
        fits = {
            name: fit(sizes, [row.transfer["median"] or 0.0 for row in rows if row.collective == name])
            for name in COLLECTIVES
        }
        result = {
            "model": model,
            "ranks": channel.size,
            "nodes": int(channel.nodes.max()) + 1,
            "library": channel.library,
            "transport": channel.transport,
            "clock_resolution_s": channel.clock_resolution_s,
            "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
            "fits": {name: dataclasses.asdict(fitted) for name, fitted in fits.items()},
            "predictions": [
                {"name": name, "bytes": size, "seconds": {c: fitted.seconds(size) for c, fitted in fits.items()}}
                for name, size in vectors.items()
            ],
        }
        _write(result, directory)
    channel.close()


def _vectors(model: str, prompt: PromptConfig) -> dict[str, int]:
    """Return the bytes of every method's vector, and of LoRA adapters."""
    from fedprompt_mpi.cost import count_parameters, lora_parameters
    from fedprompt_mpi.plm.backbone import read_config

    config = read_config(model)
    counts = {**count_parameters(config, prompt), "LoRA (rank 8)": lora_parameters(config)}
    return {name: 4 * count for name, count in sorted(counts.items(), key=lambda item: item[1])}


def _write(result: dict[str, Any], directory: Path) -> None:
    from fedprompt_mpi.report.bench import format_bench, plot_bench

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "bench.json", result)
    print(format_bench(result), flush=True)
    print(
        "\n" + ", ".join(str(file) for file in (directory / "bench.json", *plot_bench(result, directory))), flush=True
    )


def doctor() -> None:
    """Print where every rank is and what it has, and warn of what will hurt.

    Raises:
        SettingsError: if MPI does not start as it should.
    """
    channel = open_channel(read_launch(), measure=False)
    everyone = channel.collect_text(look_around(channel).to_json())
    if everyone:
        ranks = [Rank.from_json(text) for text in everyone]
        print(format_ranks(ranks), flush=True)
        for warning in warnings_of(ranks):
            print(f"warning: {warning}", flush=True)
    channel.close()


def look_around(channel: Channel) -> Rank:
    """Return what this rank sees of its machine."""
    import torch
    from huggingface_hub import constants

    place, size = channel.place, channel.size
    device, gpu = bind_device(torch.cuda.device_count(), place, is_worker=channel.rank > 0 or size == 1), ""
    if device != "cpu":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    cache = constants.HF_HUB_CACHE + ("" if Path(constants.HF_HUB_CACHE).is_dir() else " (missing)")
    return Rank(
        rank=channel.rank,
        host=place.host,
        node=int(channel.nodes[channel.rank]),
        kernel=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        processors=tuple(sorted(own_processors())),
        threads=thread_count(place, os.environ.get("OMP_NUM_THREADS"), one_client_a_pass=False),
        device=device,
        gpu=gpu,
        library=channel.library,
        transport=channel.transport,
        thread_level=channel.thread_level,
        clock_resolution_s=channel.clock_resolution_s,
        survives=channel.survives,
        hub_cache=cache + (" (offline)" if constants.HF_HUB_OFFLINE else ""),
    )
