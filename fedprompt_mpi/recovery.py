"""Recovery: the ranks that remain after a rank failure continue from the last round done.

It works under a launcher that allows it (Open MPI with ULFM). The remaining ranks shrink the channel, agree, and
continue as if the run had been resumed on fewer ranks, which gives the same bits. Nothing is loaded again.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from fedprompt_mpi.federation.federation import Federation
from fedprompt_mpi.federation.prepare import run_on_all_ranks, shard_of
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rundir.checkpoint import Checkpoint, InMemoryCheckpoint
from fedprompt_mpi.rundir.records import RankFailure, Summary


def run_with_recovery(
    setup: Setup, checkpoint: Checkpoint, rounds: Callable[[Federation], Summary | None]
) -> Summary | None:
    """Run the rounds; when a rank is lost, continue without it.

    Args:
        setup: from `prepare`.
        checkpoint: the state to start from.
        rounds: runs all rounds that are left.

    Returns:
        The summary on rank 0.
    """
    channel, memory = setup.channel, None
    if setup.is_root and channel.placement.mpi.survives:
        memory = InMemoryCheckpoint(setup.config, setup.paths, checkpoint)
    failures: list[RankFailure] = []
    ranks = channel.placement.original_ranks
    while True:
        try:
            if len(ranks) != channel.size:
                checkpoint, failure = _last_state(ranks, setup, checkpoint, memory)
                shard = shard_of(channel, on_gpu=setup.backbone.device.type == "cuda")
                setup = dataclasses.replace(setup, shard=shard)
                failures.append(failure)
                ranks = channel.placement.original_ranks
            return _run(setup, checkpoint, failures, memory, rounds)
        except Exception as error:
            if not channel.recover(error):
                raise


def _run(
    setup: Setup,
    checkpoint: Checkpoint,
    failures: list[RankFailure],
    memory: InMemoryCheckpoint | None,
    rounds: Callable[[Federation], Summary | None],
) -> Summary | None:
    federation = Federation(setup, checkpoint, failures)
    federation.memory = memory
    try:
        return rounds(federation)
    finally:
        federation.close()


def _last_state(
    before: np.ndarray, setup: Setup, checkpoint: Checkpoint, memory: InMemoryCheckpoint | None
) -> tuple[Checkpoint, RankFailure]:
    """Return the state after the last round done, and the failure; every remaining rank calls this.

    Args:
        before: `[R]` int64, the original numbers of the ranks before the failure.
        setup: of this rank.
        checkpoint: any; its content is valid on rank 0 alone.
        memory: on rank 0.

    Raises:
        SettingsError: on every rank, if the saved checkpoints are damaged.
    """
    channel, start = setup.channel, time.perf_counter()
    timing = channel.phases.timing
    if memory is not None:
        checkpoint = run_on_all_ranks(channel, memory.latest)
    else:
        run_on_all_ranks(channel, lambda: None)
    told = np.array([checkpoint.round_, timing.received])
    channel.tell(told)
    done, received = told.tolist()
    timing.take_back(received)
    timing.forget_after(done)
    lost = np.setdiff1d(before, channel.placement.original_ranks).tolist()
    failure = RankFailure(ranks=lost, round=timing.round, line=done, seconds=time.perf_counter() - start)
    return dataclasses.replace(checkpoint, round_=done), failure
