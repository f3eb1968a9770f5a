"""Waiting ranks sleep: rank 0 leaves its core to the ranks that train."""

import re
from pathlib import Path

from tests.jobs import launch

PROGRAM = """
import sys, time
from fedprompt_mpi.comm.mpi_channel import MPIChannel
from fedprompt_mpi.cli import main

waited = [0.0, 0.0]
consult = MPIChannel.consult
def measured(self, *arguments):
    wall, cpu = time.perf_counter(), time.process_time()
    result = consult(self, *arguments)
    waited[0] += time.perf_counter() - wall
    waited[1] += time.process_time() - cpu
    return result
MPIChannel.consult = measured
close = MPIChannel.close
def closed(self, **options):
    if self.rank == 0:
        print(f"waited {waited[0]:.3f} s, used {waited[1]:.3f} s", flush=True)
    close(self, **options)
MPIChannel.close = closed
main(["--federation.rounds=2", "--client.steps=40", "--task.max_test=20", "--poison.trigger=",
      "--output.evaluate_every=2", "--output.report=false", f"--output.dir={sys.argv[1]}"])
"""


def test_rank_0_uses_under_a_tenth_of_a_core_during_training(tmp_path: Path) -> None:
    finished = launch(3, "-c", PROGRAM, str(tmp_path / "run"), deadline_s=180)
    assert finished.status == 0, finished
    found = re.search(r"waited ([\d.]+) s, used ([\d.]+) s", finished.out)
    assert found is not None, finished
    waited, used = float(found[1]), float(found[2])
    assert waited > 1.0  # there was something to wait for
    assert used < 0.1 * waited
