"""How a rank leaves a job that went well."""

from tests.jobs import launch

LATE = """
import time
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.comm.start import start_mpi
from fedprompt_mpi.liveness.exit import end_process
from fedprompt_mpi.liveness.liveness import Liveness

mpi = start_mpi(read_launch(), Liveness(), 60)
rank, finalize = mpi.COMM_WORLD.rank, mpi.Finalize

def finalize_and_linger():
    finalize()
    if rank:
        time.sleep(1)
        print(f"rank {rank} is late", flush=True)

mpi.Finalize = finalize_and_linger
end_process(0)
"""


def test_the_launcher_waits_for_a_rank_that_leaves_late() -> None:
    finished = launch(3, "-c", LATE, deadline_s=30)
    assert finished.status == 0, finished
    assert sorted(finished.out.splitlines()) == ["rank 1 is late", "rank 2 is late"]
