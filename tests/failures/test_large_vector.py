"""A vector of more bytes than a 32-bit number counts."""

from tests.jobs import launch

BYTES = 2**31 + 4096
CODE = f"""
import numpy as np
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.start.launcher import read_launch
channel = open_channel(read_launch())
vector = np.zeros({BYTES // 4}, dtype=np.float32)
if channel.rank == 0:
    vector[[0, 2**28 - 1, 2**28, 2**29, -1]] = 1, 2, 3, 4, 5
channel.broadcast(vector)
assert vector[[0, 2**28 - 1, 2**28, 2**29, -1]].tolist() == [1, 2, 3, 4, 5]
assert np.count_nonzero(vector) == 5
channel.agree(None)
print("received", flush=True)
channel.close()
"""


def test_more_than_two_gigabytes_are_broadcast() -> None:
    finished = launch(2, "-c", CODE, deadline_s=100)
    assert finished.status == 0, finished
    assert finished.out.count("received") == 2
