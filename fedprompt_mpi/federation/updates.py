"""An update of a client: its header, how updates reach rank 0, and how the global vector reaches the clients.

Legend: R ranks, K updates of the round, k of them on this rank, P length of a vector.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from fedprompt_mpi.comm.channel import Channel, Chunks
from fedprompt_mpi.comm.codec import Codec
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.comm.exact_sum import unit_of
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.rules.aggregator_base import LARGEST_NORM
from fedprompt_mpi.rundir.records import OwnRates

HEADER = np.dtype(
    [
        ("client", "<i4"),
        ("num_examples", "<i8"),
        ("loss", "<f8"),
        ("norm", "<f8"),
        ("largest", "<f8"),
        ("train_s", "<f8"),
        ("asked_to_stop", "?"),
        ("given_up", "?"),
    ]
)
"""The header of an update: `norm` and `largest` are the delta's Euclidean and maximum norm; `given_up` means that there
is no update, since its rank was asked to stop."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalUpdates:
    """The updates that one rank has trained in a round."""

    cohort: Cohort
    headers: np.ndarray
    """`[k]` of dtype `HEADER`, in client order."""
    deltas: Vector
    """`[k, P]` float32, local minus global."""
    own_rates: list[OwnRates]
    """The rates of every client's own prompt, of all ranks; [] if they are not evaluated."""


class Verdict(NamedTuple):
    """What all ranks have to know of a round's updates."""

    given_up: bool
    """A rank has given the round up."""
    asked_to_stop: bool
    diverged: bool
    """No update of an honest client is finite."""
    aggregated: bool
    """There are enough updates for the rule."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A round's updates at rank 0. The vectors travel while the chunks are asked for, by every rank, in one way."""

    headers: np.ndarray
    """`[K]` of dtype `HEADER`, in client order, on rank 0; elsewhere this rank's own."""
    verdict: Verdict
    chunks: Chunks
    """Chunks of all clients' deltas `[K, chunk]` float32."""
    sums: Callable[[np.ndarray | None], Chunks]
    """Weights `[K]` float64 (None but on rank 0) -> chunks of sum s_k delta_k `[chunk]` float64; see `exact_sum`."""


def gather(channel: Channel, updates: LocalUpdates, codec: Codec, judge: Callable[[np.ndarray], Verdict]) -> Gathered:
    """Gather the headers at rank 0, tell all ranks what follows from them, and return how to get at the deltas.

    Args:
        channel: between the ranks.
        updates: of this rank.
        codec: how deltas travel.
        judge: all headers `[K]` -> the verdict; called on rank 0.
    """
    counts, deltas = updates.cohort.counts, updates.deltas
    told = np.zeros(len(Verdict._fields), dtype=np.int64)
    with _waiting(channel):
        headers = channel.consult(updates.headers, counts, judge, told)

    def sums(weights: np.ndarray | None) -> Chunks:
        first = 1 + int(counts[: channel.rank].sum())
        factors = np.zeros(1 + int(counts.sum()))
        if weights is not None:
            factors[0], factors[1:] = unit_of(weights, headers["largest"]), weights
        with _waiting(channel):
            channel.tell(factors)
        return channel.reduce(deltas, factors[first : first + len(deltas)], factors[0])

    verdict = Verdict(*map(bool, told))
    return Gathered(headers=headers, verdict=verdict, chunks=channel.gather(deltas, counts, codec), sums=sums)


def announce(channel: Channel, size: int, fingerprint: int) -> bool:
    """Tell all ranks which vector rank 0 is about to broadcast; return True if rank 0 was asked to stop.

    Args:
        channel: between the ranks.
        size: P.
        fingerprint: of the layout of the vector, the same on every rank.

    Raises:
        RuntimeError: if rank 0's vector has another layout than this rank's.
    """
    progress, stop = channel.progress, channel.phases.liveness.stop
    header = np.array([size, fingerprint, progress.is_watched, stop.requested], dtype=np.int64)
    with _waiting(channel):
        channel.tell(header)
    if header[:2].tolist() != [size, fingerprint]:
        raise RuntimeError(
            f"rank 0 sends a vector of {header[0]} parameters (layout {header[1]}), "
            f"but rank {channel.rank} has {size} (layout {fingerprint})"
        )
    progress.is_watched = bool(header[2])
    return bool(header[3])


def _waiting(channel: Channel) -> AbstractContextManager[None]:
    return channel.phases.time("wait") if channel.size > 1 else nullcontext()


def is_finite(headers: np.ndarray) -> np.ndarray:
    """Return which updates of a round are finite `[K]` bool, from their norms and losses.

    An update with a norm beyond `LARGEST_NORM` is not: its square, or a sum of such, would overflow.
    """
    return np.isfinite(headers["loss"]) & (headers["norm"] <= LARGEST_NORM)
