"""From the launch to the first broadcast and to the exit: together and plain in turn, medians.

    PYTHONPATH=. python tests/bench/start.py [--ranks 1 3 11] [--launches 5] [--ways together plain]

Prints for each number of ranks and each way: seconds to the first broadcast and to the exit by the clock, and the
machine's processor seconds up to each of the two. OMP_NUM_THREADS is 1. Nothing else may run beside it.
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

EVERY_S = 0.02  # the machine's processor time is looked at so often


def main() -> None:
    """Measure, and print a line for each number of ranks and each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 11])
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["together", "plain"], choices=["together", "plain"])
    arguments = parser.parse_args()
    print(f"{'':16}{'first broadcast':>24}{'exit':>24}")
    print(f"{'ranks':>5}  {'way':<9}" + f"{'s':>12}{'processor s':>12}" * 2 + "   (medians)")
    for ranks in arguments.ranks:
        ways = arguments.ways if ranks > 1 else ["plain"]
        taken: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
        for _ in range(arguments.launches):
            for way in ways:  # in turn: the machine may be slower for a while
                taken[way].append(measure(ranks, way))
        for way in ways:
            medians = [statistics.median(column) for column in zip(*taken[way], strict=True)]
            print(f"{ranks:>5}  {way:<9}" + "".join(f"{median:>12.2f}" for median in medians), flush=True)


def measure(ranks: int, way: str) -> tuple[float, float, float, float]:
    """Return the main job's seconds and processor seconds to the first broadcast, and both to the exit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedprompt_mpi", f"--output.dir={folder}/run"]
        if ranks > 1:
            mpirun = find_mpirun()
            assert mpirun is not None
            options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
            command = [mpirun, *options, "-n", str(ranks), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDPROMPT_START": way}
        busy, begin = [_busy_s()], time.perf_counter()
        job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while job.poll() is None:
            time.sleep(EVERY_S)
            busy.append(_busy_s())
        whole = time.perf_counter() - begin
        assert job.returncode == 0, command
        first = json.loads((Path(folder) / "run" / "summary.json").read_text())["seconds_to_first_broadcast"]
        at_first = busy[round(first / whole * (len(busy) - 1))]
        return first, at_first - busy[0], whole, busy[-1] - busy[0]


def _busy_s() -> float:
    """Return the processor seconds of the whole machine: forked ranks are no children of this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system = fields[:3]
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
