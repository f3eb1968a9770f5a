"""What the tests run on the virtual cluster's nodes, under mpirun; rank 0 prints JSON.

probe.py times P N    transfer, raw collective, reported and counted bytes of each collective, for P numbers, N times
probe.py ours P N     transfer of each collective N times, without the raw one
probe.py window P N   transfer and skew of a broadcast after barriers and at an agreed time, in turn
probe.py sleep P N    the same broadcast with and without a rank that sleeps before it
probe.py round P K    the same bytes of a round of K clients in int8, with headers and what a checkpoint gathers
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.bench import COLLECTIVES, Bench
from fedprompt_mpi.comm.clocks import clock_offset
from fedprompt_mpi.comm.codec import FLOAT32, Int8
from fedprompt_mpi.comm.start import start_mpi
from fedprompt_mpi.comm.timing import PHASES, TRANSFERS
from fedprompt_mpi.comm.traffic import Journey, to_root
from fedprompt_mpi.config import CommConfig, FederationConfig, RunConfig
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.feedback import ClientFeedback
from fedprompt_mpi.federation.server import Server
from fedprompt_mpi.federation.updates import HEADER, LocalUpdates, announce, gather
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.start.launcher import read_launch

SLEEP_S = 0.5


class Probe:
    """A channel, and what it takes to watch it."""

    def __init__(self, length: int, repetitions: int) -> None:
        self.length, self.repetitions = length, repetitions
        liveness = Liveness()
        self.mpi = start_mpi(read_launch(), liveness, 60)
        self.world = self.mpi.COMM_WORLD
        self.bench = Bench(self.world, liveness, seconds=0.0)
        self.channel = self.bench.channel

    def slowest(self, seconds: float) -> float:
        return float(self.world.allreduce(seconds, op=self.mpi.MAX))

    def seconds_of(self, records: np.ndarray, *phases: str) -> float:
        return self.slowest(float(records["seconds"][np.isin(records["phase"], [*map(PHASES.index, phases)])].sum()))

    def received(self) -> float:
        """Return what all nodes' links have received, in bytes; who asks together sees the same."""
        first_here = self.channel.placement.local_rank == 0
        counter = Path("/sys/class/net/eth0/statistics/rx_bytes")
        return float(self.world.allreduce(int(counter.read_text()) if first_here else 0))

    def times(self) -> dict[str, Any]:
        found: dict[str, Any] = {"nodes": self.channel.placement.nodes.tolist()}
        counts = np.array([0, *[1] * (self.channel.size - 1)])
        for name in COLLECTIVES:
            raw, ours = self.bench.calls(name, self.length)
            assert raw is not None
            ours()
            raw()
            self.channel.phases.timing.take()
            counted, transfers, raws = 0.0, [], []
            for _ in range(self.repetitions):  # they take turns, whatever else this machine does
                before = self.received()
                ours()
                transfers.append(self.seconds_of(self.channel.phases.timing.take(), *TRANSFERS))
                counted += (self.received() - before) / self.repetitions
                self.world.Barrier()
                start = time.perf_counter()
                raw()
                raws.append(self.slowest(time.perf_counter() - start))
            journey = Journey(nodes=self.channel.placement.nodes, counts=counts, size=self.length)
            traffic = journey.down(FLOAT32) if name == "broadcast" else journey.up(FLOAT32, name)
            found[name] = {
                "transfer": float(np.median(transfers)),
                "raw": float(np.median(raws)),
                "reported": traffic.wire_bytes,
                "counted": counted,
            }
        return found

    def ours(self) -> dict[str, list[float]]:
        """Return the seconds of each collective's transfers, each piece with its slowest rank."""
        found: dict[str, list[float]] = {}
        for name in COLLECTIVES:
            _, call = self.bench.calls(name, self.length)
            _, warm_up = self.bench.calls(name, min(self.length, 10_000))
            warm_up()
            self.channel.phases.timing.take()
            for _ in range(self.repetitions):
                self.world.Barrier()
                call()
                records = self.channel.phases.timing.take()
                pieces = records["seconds"][np.isin(records["phase"], [*map(PHASES.index, TRANSFERS)])]
                found.setdefault(name, []).append(sum(self.slowest(float(piece)) for piece in pieces))
        return found

    def window(self) -> dict[str, Any]:
        """Let each repetition be one after barriers and one at an agreed time."""
        agreed = Bench(self.world, Liveness(), seconds=0.0, sync="window")
        offset = clock_offset(self.world, self.channel.placement.nodes)
        found: dict[str, Any] = {"offset_error_s": self.slowest(abs(offset))}
        ways = {"barrier": self.bench, "window": agreed}
        samples: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        calls = {way: bench.calls("broadcast", self.length)[1] for way, bench in ways.items()}
        for number in range(self.repetitions + 3):
            for way, bench in ways.items():
                self.world.Barrier()
                calls[way]()
                seconds = self.seconds_of(bench.channel.phases.timing.take(), *TRANSFERS)
                start = bench.channel.started - offset
                late, early = self.slowest(start), -self.slowest(-start)
                missed = bench is agreed and self.world.allreduce(int(bench.missed)) > 0
                if number >= 3 and not missed:
                    samples[way].append((seconds, late - early))
        for way, pairs in samples.items():
            found[way] = dict(zip(("transfer", "skew"), np.median(pairs, axis=0).tolist(), strict=True))
            found[way]["repetitions"] = len(pairs)
        agreed.channel.close()
        return found

    def sleep(self) -> dict[str, Any]:
        """Let the last rank come late every second time."""
        _, broadcast = self.bench.calls("broadcast", self.length)
        samples: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(2 * self.repetitions + 2):
            late = number % 2 == 1
            self.world.Barrier()
            self.channel.phases.timing.take()
            if late and self.channel.rank == self.channel.size - 1:
                time.sleep(SLEEP_S)
            broadcast()
            records = self.channel.phases.timing.take()
            if number >= 2:
                pair = (self.seconds_of(records, "wait", "sync"), self.seconds_of(records, *TRANSFERS))
                samples[late].append(pair)
        medians = {late: np.median(pairs, axis=0).tolist() for late, pairs in samples.items()}
        return {"wait": [medians[False][0], medians[True][0]], "transfer": [medians[False][1], medians[True][1]]}

    def round(self) -> dict[str, Any]:
        """Take the steps of a round without a PLM, and of a checkpoint after it."""
        channel, clients = self.channel, self.repetitions
        config = RunConfig(federation=FederationConfig(clients=clients), comm=CommConfig(wire="int8"))
        cohort, codec = draw_cohort(config, channel.size, 1), Int8()
        server = Server(np.zeros(self.length, dtype=np.float32), config, is_root=channel.rank == 0)
        feedback = ClientFeedback(codec, clients, self.length, channel)
        own = cohort.of_rank(channel.rank)
        headers = np.zeros(len(own), dtype=HEADER)
        headers["client"], headers["num_examples"] = own, 1
        deltas = np.random.default_rng(channel.rank).standard_normal((len(own), self.length), dtype=np.float32)
        journey = Journey(nodes=channel.placement.nodes, counts=cohort.counts, size=self.length)
        server.broadcast(channel)  # the whole vector, once
        channel.phases.timing.take()
        before = self.received()
        announce(channel, self.length, 0)
        down = server.broadcast(channel)
        for client, delta in zip(own, deltas, strict=True):
            feedback.send(client, delta)
        feedback.note(cohort.clients)
        updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=[])
        server.apply(gather(channel, updates, codec, server.judge), channel.phases, 1)
        checkpoint = to_root(channel.placement.nodes, feedback.bytes_to_collect)
        feedback.collect()
        counted = self.received() - before
        parts = {
            "down": journey.down(down),
            "up": journey.up(codec, "gather"),
            "headers": journey.headers(HEADER.itemsize),
            "checkpoint": checkpoint,
        }
        return {"reported": {name: part.wire_bytes for name, part in parts.items()}, "counted": counted}


def main() -> None:
    what, length, repetitions = sys.argv[1], *map(int, sys.argv[2:])
    probe = Probe(length, repetitions)
    found = {
        "times": probe.times,
        "ours": probe.ours,
        "sleep": probe.sleep,
        "window": probe.window,
        "round": probe.round,
    }[what]()
    if probe.channel.rank == 0:
        print(json.dumps(found), flush=True)
    probe.channel.close()


if __name__ == "__main__":
    main()
