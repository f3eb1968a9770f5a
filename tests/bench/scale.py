"""What a round costs beside training, by ranks and clients; no PLM.

    PYTHONPATH=. python tests/bench/scale.py channel [--ranks 2 11 64]
    PYTHONPATH=. python tests/bench/scale.py rank0
    PYTHONPATH=. python tests/bench/scale.py overlap [--ranks 3]

`channel` starts ranks under mpirun: medians of the seconds that rank 0 takes for the exchange of headers of 1 MB in
all, and for whole rounds of 61 kB and of 6 MB vectors of ten clients, and the share of a core that a rank takes while
it waits. `overlap` compares rounds of 40 MB vectors with and without aggregating one chunk while the next arrives, in
turn. `rank0` calls functions for as many ranks and clients as no test machine has. Nothing else may run beside.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VECTORS = {"a round of 61 kB vectors": (15_360, 60), "a round of 6 MB vectors": (1_536_000, 12)}
"""Name -> numbers in a vector, rounds."""
CLIENTS, OVERLAPPED_SIZE = 10, 10_000_000
HEADERS_BYTES = 10**6
WAIT_S = 10.0


def start(part: str, ranks: list[int]) -> None:
    """Measure a part on each number of ranks."""
    from tests.jobs import find_mpirun, is_open_mpi

    mpirun = find_mpirun()
    assert mpirun is not None
    options = ["--allow-run-as-root", "--oversubscribe"] if is_open_mpi(mpirun) else []
    for number in ranks:
        command = [mpirun, *options, "-n", str(number), sys.executable, __file__, f"{part}-rank"]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def rank() -> None:
    """Measure, as one rank of a job; rank 0 prints."""
    from fedprompt_mpi.comm.start import open_channel
    from fedprompt_mpi.federation.updates import HEADER
    from fedprompt_mpi.liveness.exit import end_process
    from fedprompt_mpi.start.launcher import read_launch

    ours = open_channel(read_launch())
    tell = print if ours.rank == 0 else lambda *_: None
    tell(f"{ours.size} ranks")
    workers = ours.size - 1
    counts = np.array([0, *[HEADERS_BYTES // HEADER.itemsize // workers] * workers])
    rows, verdict = np.zeros(counts[ours.rank], dtype=HEADER), np.zeros(4, dtype=np.int64)
    tell(_line("headers, 1 MB in all", _seconds(lambda: ours.consult(rows, counts, lambda _: 0, verdict), 30)))
    for name, (size, rounds) in VECTORS.items():
        tell(_line(name, _seconds(_round(ours, size), rounds)))
    if ours.rank == 0:
        time.sleep(WAIT_S)
    before = time.process_time()
    ours.agree(None)
    shares = ours.collect(f"{(time.process_time() - before) / WAIT_S}".encode())
    if ours.rank == 0:
        tell(f"{'of a core, to wait ' + f'{WAIT_S:g} s':<34}{statistics.median(map(float, shares[1:])):>12.2%}")
    ours.close()
    end_process(0)


def overlap_rank() -> None:
    """Measure rounds with and without overlap, as one rank of a job; rank 0 prints."""
    from fedprompt_mpi.comm.start import open_channel
    from fedprompt_mpi.federation import server
    from fedprompt_mpi.liveness.exit import end_process
    from fedprompt_mpi.start.launcher import read_launch

    def one_after_the_other(chunks: Any, size: int, work: Any, on_wait: Any) -> None:
        for chunk, numbers in chunks:
            on_wait()
            work(chunk, numbers)

    ours, overlapped = open_channel(read_launch()), server.overlapped
    round_, seconds = _round(ours, OVERLAPPED_SIZE), {True: [], False: []}
    round_()
    for number in range(20):
        server.overlapped = overlapped if number % 2 else one_after_the_other
        ours.agree(None)
        begin = time.perf_counter()
        round_()
        seconds[number % 2 == 1].append(time.perf_counter() - begin)
    if ours.rank == 0:
        print(f"{ours.size} ranks")
        print(_line("a round of 40 MB vectors, overlap", seconds[True]))
        print(_line("one after the other", seconds[False]))
    ours.close()
    end_process(0)


def _round(ours: Any, size: int) -> Callable[[], None]:
    """Return a round without training: each client's update is all ones."""
    from fedprompt_mpi.comm.codec import FLOAT32
    from fedprompt_mpi.config import FederationConfig, RunConfig
    from fedprompt_mpi.federation.cohort import draw_cohort
    from fedprompt_mpi.federation.server import Server
    from fedprompt_mpi.federation.updates import HEADER, LocalUpdates, announce, gather

    config = RunConfig(federation=FederationConfig(clients=CLIENTS))
    cohort = draw_cohort(config, ours.size, 1)
    clients = cohort.of_rank(ours.rank)
    server = Server(np.zeros(size, dtype=np.float32), config, is_root=ours.rank == 0)
    headers = np.zeros(len(clients), dtype=HEADER)
    headers["client"], headers["num_examples"] = clients, 1
    deltas = np.ones((len(clients), size), dtype=np.float32)
    updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=[])

    def round_() -> None:
        announce(ours, size, 0)
        server.broadcast(ours)
        server.apply(gather(ours, updates, FLOAT32, server.judge), ours.phases, 1)

    return round_


def rank0() -> None:
    """Measure what rank 0 does by itself."""
    from fedprompt_mpi.rules.distance import bulyan_choice
    from fedprompt_mpi.rules.pairwise import add_inner_products

    rng = np.random.default_rng(0)
    for clients in (400, 800):
        rows, total = rng.standard_normal((clients, 15_360), dtype=np.float32), np.zeros((clients, clients))
        name = f"inner products, K = {clients}"
        print(_line(name, _seconds(lambda rows=rows, total=total: add_inner_products(total, rows), 5)))
    inner = rng.standard_normal((400, 64))
    print(_line("Bulyan's choice, K = 400", _seconds(lambda: bulyan_choice(inner @ inner.T, 99, np.arange(400)), 5)))
    _multi_krum(10_000, 15_360)
    _timings(1_000, 4_096)
    print(f"{'most memory':<34}{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:>9.2f} GB")


def _multi_krum(clients: int, size: int) -> None:
    from fedprompt_mpi.comm.chunks import chunks_of
    from fedprompt_mpi.config import FederationConfig
    from fedprompt_mpi.rules import registry
    from fedprompt_mpi.rules.aggregator_base import Updates

    config = FederationConfig(clients=clients, aggregator="multi_krum", assumed_malicious=clients // 100)
    rule, ones = registry.aggregators["multi_krum"](config), np.ones(clients)
    updates = Updates(
        clients=np.arange(clients), num_examples=ones, norms=ones, parameters=size,
        assumed_malicious=clients // 100, num_clients=clients,
    )  # fmt: skip
    chunks = chunks_of(clients, size)
    block = np.random.default_rng(0).standard_normal((clients, chunks[0].stop), dtype=np.float32)
    vector = np.zeros(size, dtype=np.float32)
    start = time.perf_counter()
    rule.begin(updates)
    for chunk in chunks:
        rule.observe(chunk, block[:, : chunk.stop - chunk.start], vector[chunk])
    weights = rule.weights(updates)
    for chunk in chunks:
        rule.combine(chunk, block[:, : chunk.stop - chunk.start], weights)
    print(_line(f"multi_krum, K = {clients:,}", [time.perf_counter() - start]))


def _timings(rounds: int, ranks: int) -> None:
    """Write some of the rounds and read them back: both pass over the file once."""
    from fedprompt_mpi.comm.statistics import slowest_by_round
    from fedprompt_mpi.comm.timing import PHASES, RECORD
    from fedprompt_mpi.rundir.paths import RunPaths
    from fedprompt_mpi.rundir.timings import append_timings, keep_timings, read_timings

    some = rounds // 10
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder))
        keep_timings(paths, None)
        start = time.perf_counter()
        for round_ in range(1, some + 1):
            records = np.array([(round_, phase, 0.001, 8) for phase in range(len(PHASES))], dtype=RECORD)
            append_timings(paths, dict.fromkeys(range(ranks), records))
        written = time.perf_counter() - start
        read = _seconds(lambda: sum(1 for _ in slowest_by_round(read_timings(paths))), 1)
    print(_line(f"a round's timings written, R = {ranks:,}", [written / some]))
    print(_line("a round's timings read", [seconds / some for seconds in read]))


def _seconds(call: Callable[[], Any], times: int) -> list[float]:
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _line(name: str, seconds: list[float]) -> str:
    return f"{name:<34}{1000 * statistics.median(seconds):>9.2f} ms   least {1000 * min(seconds):.2f}"


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["channel", "overlap", "rank0", "channel-rank", "overlap-rank"])
    parser.add_argument("--ranks", type=int, nargs="+")
    arguments = parser.parse_args()
    if arguments.part in ("channel", "overlap"):
        start(arguments.part, arguments.ranks or {"channel": [2, 11, 64], "overlap": [3]}[arguments.part])
    else:
        {"rank0": rank0, "channel-rank": rank, "overlap-rank": overlap_rank}[arguments.part]()


if __name__ == "__main__":
    main()
