"""What each aggregator costs rank 0: seconds and peak memory of a round of K updates, checkpoint included.

    python tests/bench/aggregate.py --parameters 25000000 --clients 10

Each rule has a process of its own, with torch imported as on a real rank 0. The updates come in pieces of 64 MB, made
up on arrival, as they would from the network.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measure(rule: str, parameters: int, clients: int) -> None:
    """Run one round and print seconds and peak memory."""
    import torch  # noqa: F401 - a real rank 0 has it
    import transformers  # noqa: F401

    from fedprompt_mpi.comm.chunks import chunks_of
    from fedprompt_mpi.comm.timing import Phases, Timing
    from fedprompt_mpi.config import FederationConfig, RunConfig
    from fedprompt_mpi.federation.server import Server
    from fedprompt_mpi.federation.updates import HEADER, Gathered
    from fedprompt_mpi.liveness.liveness import Liveness
    from fedprompt_mpi.rundir.checkpoint import Checkpoint, save_checkpoint
    from fedprompt_mpi.rundir.paths import RunPaths
    from fedprompt_mpi.rundir.records import RoundRecord

    rows = clients + (rule == "fltrust")
    headers = np.zeros(rows, dtype=HEADER)
    headers["client"] = np.arange(rows) if rows == clients else [clients, *range(clients)]
    headers["num_examples"], headers["norm"] = 1, np.sqrt(parameters)
    rng = np.random.default_rng(0)
    blocks = ((s, rng.standard_normal((rows, s.stop - s.start), dtype=np.float32)) for s in chunks_of(rows, parameters))
    config = RunConfig(federation=FederationConfig(clients=clients, aggregator=rule))
    server = Server(np.zeros(parameters, dtype=np.float32), config, is_root=True)
    timing = Timing(round=1)
    start = time.perf_counter()
    gathered = Gathered(
        headers=headers,
        came=np.ones(rows, dtype=bool),
        verdict=server.judge(headers),
        chunks=blocks,
        sums=lambda whole: iter(()),
    )
    server.apply(gathered, Phases(timing, Liveness()), 1)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(
            RunPaths(Path(folder)),
            Checkpoint(vector=server.vector, round_=1, record=RoundRecord(round=1), state=server.state()),
            config,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{rule:<18}{timing.seconds('aggregate', 1):>8.1f} s of {seconds:>6.1f} s{peak / 1e9:>8.2f} GB", flush=True)


def main() -> None:
    """Measure one rule, or all of them, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rule")
    given = parser.parse_args()
    if given.rule:
        measure(given.rule, given.parameters, given.clients)
        return
    from fedprompt_mpi.rules import registry

    for rule in registry.aggregators:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--rule", rule], check=True)


if __name__ == "__main__":
    main()
