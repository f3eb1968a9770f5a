"""From the launch to the first broadcast and to the exit: together and plain in turn, medians.

    PYTHONPATH=. python tests/bench/start.py [--ranks 1 3 11] [--launches 5]

Prints for each number of ranks and each way: seconds to the first broadcast and to the exit by the clock, and processor
seconds of all processes of the job. OMP_NUM_THREADS is 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.jobs import find_mpirun, is_open_mpi


def main() -> None:
    """Measure, and print a line for each number of ranks and each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 11])
    parser.add_argument("--launches", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'ranks':>5}  {'way':<9}{'first broadcast':>16}{'exit':>8}{'processor':>11}   (median s)")
    for ranks in arguments.ranks:
        ways = ("together", "plain") if ranks > 1 else ("plain",)
        taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(arguments.launches):
            for way in ways:  # in turn: the machine may be slower for a while
                taken[way].append(measure(ranks, way))
        for way in ways:
            first, whole, processor = (statistics.median(column) for column in zip(*taken[way], strict=True))
            print(f"{ranks:>5}  {way:<9}{first:>16.2f}{whole:>8.2f}{processor:>11.1f}", flush=True)


def measure(ranks: int, way: str) -> tuple[float, float, float]:
    """Return seconds to the first broadcast, to the exit, and of processors, of the main job on some ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedprompt_mpi", f"--output.dir={folder}/run"]
        if ranks > 1:
            mpirun = find_mpirun()
            assert mpirun is not None
            options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
            command = [mpirun, *options, "-n", str(ranks), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDPROMPT_START": way}
        busy, begin = _busy_s(), time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        whole = time.perf_counter() - begin
        first = json.loads((Path(folder) / "run" / "summary.json").read_text())["seconds_to_first_broadcast"]
        return first, whole, _busy_s() - busy


def _busy_s() -> float:
    """Return the processor seconds of the whole machine: forked ranks are no children of this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system = fields[:3]
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
