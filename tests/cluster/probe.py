"""What the tests run on the virtual cluster's nodes, under mpirun; rank 0 prints JSON.

probe.py times P N    transfer, raw collective, reported and counted bytes of each collective, for P numbers, N times
probe.py sleep P N    the same broadcast with and without a rank that sleeps before it
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import HEADER, start_mpi
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.comm.mpi_channel import MPIChannel
from fedprompt_mpi.comm.timing import PHASES, TRANSFERS
from fedprompt_mpi.comm.traffic import round_traffic
from fedprompt_mpi.comm.wire import FLOAT32

SLEEP_S = 0.5


class Probe:
    """A channel, and what it takes to watch it."""

    def __init__(self, length: int, repetitions: int) -> None:
        self.length, self.repetitions = length, repetitions
        self.mpi = start_mpi(read_launch())
        self.world = self.mpi.COMM_WORLD
        self.channel = MPIChannel(self.world, measure=True)
        self.vector = np.ones(length, dtype=np.float32)
        self.counts = np.array([0, *[1] * (self.channel.size - 1)])
        self.deltas = self.vector[None] if self.channel.rank else np.empty((0, length), dtype=np.float32)
        self.headers = np.zeros(len(self.deltas), dtype=HEADER)
        self.headers["largest"] = 1

    def slowest(self, seconds: float) -> float:
        return float(self.world.allreduce(seconds, op=self.mpi.MAX))

    def seconds_of(self, records: np.ndarray, *phases: str) -> float:
        return self.slowest(float(records["seconds"][np.isin(records["phase"], [*map(PHASES.index, phases)])].sum()))

    def received(self) -> float:
        """Return what all nodes' links have received, in bytes; who asks together sees the same."""
        first_here = self.channel.place.local_rank == 0
        counter = Path("/sys/class/net/eth0/statistics/rx_bytes")
        return float(self.world.allreduce(int(counter.read_text()) if first_here else 0))

    def calls(self) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """Return name -> our call and the raw one."""
        channel, world = self.channel, self.world
        rooms = np.empty((channel.size - 1, self.length), dtype=np.float32) if channel.rank == 0 else None
        received = None if rooms is None else [rooms, self.counts * self.length, self.mpi.FLOAT]
        total = np.empty_like(self.vector) if channel.rank == 0 else None
        factors = np.ones(channel.size - 1)

        def gather() -> None:
            for _ in channel.gather(self.headers, self.deltas, self.counts).blocks:
                pass

        def reduce() -> None:
            for _ in channel.gather(self.headers, self.deltas, self.counts).sums(factors):
                pass

        return {
            "broadcast": (lambda: channel.broadcast(self.vector, 0), lambda: world.Bcast(self.vector, root=0)),
            "gather": (gather, lambda: world.Gatherv(self.deltas, received, root=0)),
            "reduce": (reduce, lambda: world.Reduce(self.vector, total, op=self.mpi.SUM, root=0)),
        }

    def times(self) -> dict[str, Any]:
        found: dict[str, Any] = {"nodes": self.channel.nodes.tolist()}
        for name, (ours, raw) in self.calls().items():
            ours()
            raw()
            self.channel.timing.take()
            counted, transfers, raws = 0.0, [], []
            for _ in range(self.repetitions):  # they take turns, whatever else this machine does
                before = self.received()
                ours()
                transfers.append(self.seconds_of(self.channel.timing.take(), *TRANSFERS))
                counted += (self.received() - before) / self.repetitions
                self.world.Barrier()
                start = self.mpi.Wtime()
                raw()
                raws.append(self.slowest(self.mpi.Wtime() - start))
            way = {"broadcast": 0, "gather": 1, "reduce": 1}[name]
            collective = "reduce" if name == "reduce" else "gather"
            traffic = round_traffic(
                self.channel.nodes, self.counts, self.length, collective=collective, wire_down=FLOAT32, wire_up=FLOAT32
            )[way]
            found[name] = {
                "transfer": float(np.median(transfers)),
                "raw": float(np.median(raws)),
                "reported": traffic.wire_bytes,
                "counted": counted,
            }
        return found

    def sleep(self) -> dict[str, Any]:
        """Let the last rank come late every second time."""
        samples: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(2 * self.repetitions + 2):
            late = number % 2 == 1
            self.world.Barrier()
            self.channel.timing.take()
            if late and self.channel.rank == self.channel.size - 1:
                time.sleep(SLEEP_S)
            self.channel.broadcast(self.vector, 0)
            records = self.channel.timing.take()
            if number >= 2:
                pair = (self.seconds_of(records, "wait", "sync"), self.seconds_of(records, *TRANSFERS))
                samples[late].append(pair)
        medians = {late: np.median(pairs, axis=0).tolist() for late, pairs in samples.items()}
        return {
            "wait": [medians[False][0], medians[True][0]],
            "transfer": [medians[False][1], medians[True][1]],
        }


def main() -> None:
    what, length, repetitions = sys.argv[1], *map(int, sys.argv[2:])
    probe = Probe(length, repetitions)
    found = probe.times() if what == "times" else probe.sleep()
    if probe.channel.rank == 0:
        print(json.dumps(found), flush=True)
    probe.channel.close()


if __name__ == "__main__":
    main()
