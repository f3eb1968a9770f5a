"""What secure aggregation costs: a client's and rank 0's seconds and bytes, and whole rounds beside plain ones.

    PYTHONPATH=. python tests/bench/secure.py parts           # K = 10, 100, 1000 clients, P = 15,360 and 25.4M
    PYTHONPATH=. python tests/bench/secure.py rounds [RANKS]  # K = 10, P = 15,360, plain and secure in turn

Parts are of one client, the median of up to five, in one thread; rank 0's part is whole, with one client lost. It takes
the masks off a vector that is no sum: the time is the same.
"""

import argparse
import contextlib
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.exact_sum import in_units
from fedprompt_mpi.federation.secure_round import CHECKS, KEYS, REVEALED, SHARES
from fedprompt_mpi.secagg.check_words import HASHES, CheckWords
from fedprompt_mpi.secagg.client import SecureClient
from fedprompt_mpi.secagg.neighbours import graph, least_clients, neighbourhood
from fedprompt_mpi.secagg.server import SecureServer, WrongSumError
from tests.jobs import read_rounds, run_program

SIZES = (15_360, 25_400_000)
FLAGS = (
    "--prompt.num_virtual_tokens=120", "--model.max_length=64", "--federation.rounds=12",
    "--federation.update_bound=50", "--output.evaluate_every=12", "--output.checkpoint_every=12", "--client.steps=5",
)  # fmt: skip


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure_parts(clients: int) -> None:
    """Print a row for each size."""
    least = least_clients(None, clients)
    hood, round_id = neighbourhood(clients, least), secrets.token_bytes(16)
    neighbours = graph(range(clients), hood.neighbours, np.random.default_rng(0))
    everyone, key_s = {}, []
    for client in range(clients):
        seconds, everyone[client] = _timed(
            lambda client=client: SecureClient(client, round_id, least=least, threshold=hood.threshold)
        )
        key_s.append(seconds)
    server = SecureServer(round_id, neighbours, hood.threshold)
    server.advertised = {client: own.advertise() for client, own in everyone.items()}
    share_s, dealt = [], {}
    for client, own in everyone.items():
        keys = {other: server.advertised[other] for other in neighbours[client]}
        seconds, dealt[client] = _timed(lambda own=own, keys=keys: own.deal(keys))
        share_s.append(seconds)
    for client, own in everyone.items():
        received = {other: dealt[other][client] for other in neighbours[client]}
        share_s[client] += _timed(lambda own=own, received=received: own.accept(received))[0]
    came = range(1, clients)  # client 0 is lost
    revealed = {client: everyone[client].reveal(came) for client in came}
    k = hood.neighbours
    sent = KEYS.itemsize + k * SHARES.itemsize + CHECKS.itemsize + (k + 1) * REVEALED.itemsize
    received_bytes = k * (KEYS.itemsize + SHARES.itemsize)
    for size in SIZES:
        hashes, delta = CheckWords(size, round_id), np.full((1, size), 0.01, dtype=np.float32)
        plain_s, mask_s, check_s = [], [], []
        for client in range(min(clients, 5)):
            seconds, units = _timed(lambda delta=delta: in_units(delta, np.ones(1), 2.0**-20))
            plain_s.append(seconds)
            seconds, check = _timed(lambda hashes=hashes, units=units: hashes.of(units))
            check_s.append(seconds)
            words = units.view(np.uint32)
            mask_s.append(_timed(lambda own=everyone[client], w=words, c=check: own.mask(w, c))[0])
        total = np.zeros(size, dtype=np.uint32)

        def unmask(total: np.ndarray = total) -> None:
            with contextlib.suppress(WrongSumError):
                server.unmask(total, np.zeros(HASHES, dtype=np.uint64), came, revealed)

        unmask_s = _timed(unmask)[0]
        mask = statistics.median(mask_s)
        print(
            f"{clients:>6}{size:>12,}{k:>6}{hood.threshold:>5}{sent:>10,}{received_bytes:>10,}"
            f"{1e3 * statistics.median(key_s):>9.2f}{1e3 * statistics.median(share_s):>9.2f}"
            f"{1e3 * statistics.median(plain_s):>9.2f}{1e3 * statistics.median(check_s):>9.2f}{1e3 * mask:>10.2f}"
            f"{4e-9 * size * (k + 1) / mask:>8.2f}{unmask_s:>9.2f}",
            flush=True,
        )


def measure_rounds(ranks: int, repeats: int = 5) -> None:
    """Print the median seconds of plain and of secure rounds, run in turn, and their ratio."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for secure in (False, True):
                directory = Path(folder) / f"{repeat}-{secure}"
                flag = f"--privacy.secure_aggregation={str(secure).lower()}"
                finished = run_program(ranks, directory, *FLAGS, flag, deadline_s=300)
                assert finished.status == 0, finished
                records = read_rounds(directory)[2:-1]  # the first warms up, the last is evaluated
                seconds[secure].append(statistics.median(record["seconds"]["total"] for record in records))
    plain, secured = (statistics.median(seconds[secure]) for secure in (False, True))
    spread = [two / one for one, two in zip(seconds[False], seconds[True], strict=True)]
    print(f"{ranks} ranks: plain {1e3 * plain:.0f} ms, secure {1e3 * secured:.0f} ms, ratio {secured / plain:.2f} "
          f"({min(spread):.2f} to {max(spread):.2f})")  # fmt: skip


def main() -> None:
    """Measure the parts, or whole rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("parts", "rounds"))
    parser.add_argument("ranks", nargs="?", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "rounds":
        measure_rounds(arguments.ranks)
        return
    print(
        "K, P, k, t'; bytes sent, received; ms: keys, shares, plain, check, mask; GB/s of masks; seconds of unmasking"
    )
    for clients in (10, 100, 1000):
        measure_parts(clients)


if __name__ == "__main__":
    sys.exit(main())
