"""An update of a client: its header, how updates reach rank 0, and how the global vector reaches the clients.

Legend: R ranks, K updates of the round, k of them on this rank, P length of a vector.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from fedprompt_mpi.comm.channel import Channel, Chunks
from fedprompt_mpi.comm.codec import Codec
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.comm.exact_sum import words_of
from fedprompt_mpi.config import RunConfig, SettingsError
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
PUBLIC_HEADER = np.dtype(
    [(name, HEADER[name]) for name in ("client", "num_examples", "train_s", "asked_to_stop", "given_up")]
)
"""What secure aggregation leaves of it: nothing that depends on the update."""


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


class RoundGivenUp(Exception):  # noqa: N818 - the run goes on without it
    """A round of secure aggregation has no sum; raised on every rank alike."""


def everybody_diverged(config: RunConfig, round_: int) -> SettingsError:
    """Return the error of a round in which no honest client's update is finite."""
    return SettingsError(
        f"client.lr is {config.client.lr:g}, with which every client diverged in round {round_} (no loss or update is "
        "finite): take a smaller one"
    )


class WholeSum(NamedTuple):
    """How updates are summed in whole numbers, see `exact_sum`; rank 0 tells it to all."""

    unit: float
    factors: np.ndarray
    """`[K]` float64, of each update that comes."""


class Verdict(NamedTuple):
    """What all ranks have to know of a round's updates."""

    given_up: bool
    """A rank has given the round up."""
    asked_to_stop: bool
    diverged: bool
    """No update of an honest client is finite."""
    aggregated: bool
    """There are enough updates for the rule."""
    rounded_away: bool = False
    """The bound of the updates is so large that nothing is left of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A round's updates at rank 0. The vectors travel while the chunks are asked for, by every rank, in one way."""

    headers: np.ndarray
    """`[K]` of dtype `HEADER`, in client order, on rank 0; elsewhere this rank's own."""
    came: np.ndarray
    """Which of the updates come `[K]` bool."""
    verdict: Verdict
    chunks: Chunks
    """Chunks of the deltas that come `[came, chunk]` float32."""
    sums: Callable[[WholeSum | None], Chunks]
    """How to sum the deltas that come (None but on rank 0) -> chunks of the sum in units `[chunk]` int32."""


def gather(channel: Channel, updates: LocalUpdates, codec: Codec, judge: Callable[[np.ndarray], Verdict]) -> Gathered:
    """Gather the headers at rank 0, tell all ranks what follows from them, and return how to get at the deltas.

    Args:
        channel: between the ranks.
        updates: of this rank.
        codec: how deltas travel.
        judge: the headers of updates that come -> the verdict; called on rank 0.
    """
    cohort, came = updates.cohort, updates.cohort.came
    headers, verdict = consult(channel, updates.headers, cohort, judge)
    counts, first = cohort.came_counts, int(cohort.counts[: channel.rank].sum())
    own = came[first : first + len(updates.headers)]
    deltas = updates.deltas if own.all() else updates.deltas[np.flatnonzero(own).tolist()]

    def sums(whole: WholeSum | None) -> Iterator[tuple[slice, np.ndarray]]:
        unit, factors = tell_whole_sum(channel, whole, int(counts.sum()))
        first = int(counts[: channel.rank].sum())
        words = words_of(deltas, factors[first : first + len(deltas)], unit)
        return ((chunk, total.view(np.int32)) for chunk, total in channel.reduce(words, deltas.shape[1]))

    chunks = channel.gather(deltas, counts, codec)
    return Gathered(headers=headers, came=came, verdict=verdict, chunks=chunks, sums=sums)


def consult(
    channel: Channel, headers: np.ndarray, cohort: Cohort, judge: Callable[[np.ndarray], Verdict]
) -> tuple[np.ndarray, Verdict]:
    """Gather the headers `[k]` of all ranks at rank 0, and tell all ranks what follows from those whose update comes.

    Returns:
        The headers of all ranks `[K]` on rank 0, this rank's own elsewhere; and the verdict.
    """
    told = np.zeros(len(Verdict._fields), dtype=np.int64)
    with waiting(channel):
        everyone = channel.consult(headers, cohort.counts, lambda found: judge(found[cohort.came]), told)
    return everyone, Verdict(*map(bool, told))


def tell_whole_sum(channel: Channel, whole: WholeSum | None, count: int) -> WholeSum:
    """Return on every rank how rank 0 says that a number of updates are summed; `whole` is None elsewhere."""
    told = np.zeros(1 + count)
    if whole is not None:
        told[0], told[1:] = whole
    with waiting(channel):
        channel.tell(told)
    return WholeSum(float(told[0]), told[1:])


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
    with waiting(channel):
        channel.tell(header)
    if header[:2].tolist() != [size, fingerprint]:
        raise RuntimeError(
            f"rank 0 sends a vector of {header[0]} parameters (layout {header[1]}), "
            f"but rank {channel.rank} has {size} (layout {fingerprint})"
        )
    progress.is_watched = bool(header[2])
    return bool(header[3])


def waiting(channel: Channel) -> AbstractContextManager[None]:
    """Return the context in which a rank waits for others; one process waits for nobody."""
    return channel.phases.time("wait") if channel.size > 1 else nullcontext()


def is_finite(headers: np.ndarray) -> np.ndarray:
    """Return which updates of a round are finite `[K]` bool, from their norms and losses.

    An update with a norm beyond `LARGEST_NORM` is not: its square, or a sum of such, would overflow. Of public headers
    nothing is known, and an update that is not finite does not come.
    """
    if headers.dtype == PUBLIC_HEADER:
        return np.ones(len(headers), dtype=bool)
    return np.isfinite(headers["loss"]) & (headers["norm"] <= LARGEST_NORM)
