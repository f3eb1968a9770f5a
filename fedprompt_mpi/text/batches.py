"""Cut token tables into padded batches of examples of similar length.

The batches of a client depend on the seed, the round and the client only, not on its rank or on the clients that share
its pass through the model.

Legend: B rows of a batch, T its longest row in tokens, S steps of a round.
"""

import dataclasses

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import ClientConfig
from fedprompt_mpi.text.tokens import TokenTable

TOKENS_PER_EVALUATION_BATCH = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded examples."""

    ids: np.ndarray
    """`[B, T]` int64, padded with 0."""
    mask: np.ndarray
    """`[B, T]` bool, False at padding."""
    answers: np.ndarray
    """`[B]` int64: where each row's answer is read."""
    labels: np.ndarray
    """`[B]` int64."""

    def take(self, rows: np.ndarray) -> "Batch":
        """Return some of the rows, padded to the longest of them."""
        mask = self.mask[rows]
        longest = int(mask.sum(axis=1).max())
        ids = self.ids[rows, :longest]
        return Batch(ids=ids, mask=mask[:, :longest], answers=self.answers[rows], labels=self.labels[rows])


def collate(table: TokenTable, rows: np.ndarray) -> Batch:
    """Pad the examples at `rows` to the longest of them."""
    starts, lengths = table.starts[rows], table.starts[rows + 1] - table.starts[rows]
    columns = np.arange(lengths.max())
    mask = columns < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = table.ids[(starts[:, None] + columns)[mask]]
    return Batch(ids=ids, mask=mask, answers=table.answers[rows], labels=table.labels[rows])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What batches are made by: of a client's n examples."""

    lengths: np.ndarray
    """`[n]` int64, in tokens."""
    labels: np.ndarray
    """`[n]` int64."""


def local_steps(own: Own, config: ClientConfig, seed: int, round_: int, client: int) -> list[np.ndarray]:
    """Choose the examples of each of a client's steps in one round.

    The client goes through its examples in a random order, and in another one if the round is longer than one pass. The
    examples of a pass are cut into random batches, and then change places with others of their class, so that batches
    need little padding (`bucketed`); then the batches of the round are shuffled. All clients with the same number of
    steps shuffle alike, so that clients in one pass of the model have batches of similar length.

    Args:
        own: lengths and labels of the client's examples.
        config: batch size, and steps or epochs (which decide S where they are given).
        seed: the run's seed.
        round_: round number.
        client: client id.

    Returns:
        S index arrays into them.
    """
    count = len(own.lengths)
    size = min(config.batch_size, count)
    steps = config.steps if config.epochs is None else config.epochs * -(-count // size)
    rng = seeds.generator(seed, "batches", round_, client)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        left = steps - len(batches)
        drawn = rng.permutation(count)[: left * size]
        cut = np.array_split(drawn, min(left, -(-len(drawn) // size)))
        batches += bucketed(cut, own) if config.bucketing else cut
    return [batches[i] for i in seeds.generator(seed, "order of lengths", round_, steps).permutation(steps)]


def bucketed(batches: list[np.ndarray], own: Own) -> list[np.ndarray]:
    """Deal the examples of some batches out again, so that each batch holds similar lengths.

    Each batch keeps its number of examples of each class: where classes differ in length, batches cut from one order of
    all lengths would hold one class each. Within a class, the shortest examples go to the first batch, the next ones to
    the second, and so on.
    """
    if not batches:
        return []
    drawn, place = np.concatenate(batches), np.repeat(np.arange(len(batches)), list(map(len, batches)))
    dealt = np.empty_like(drawn)
    for label in np.unique(own.labels[drawn]):
        seats = np.flatnonzero(own.labels[drawn] == label)  # in the order of the batches
        members = drawn[seats]
        dealt[seats] = members[np.argsort(own.lengths[members], kind="stable")]
    return [dealt[place == number] for number in range(len(batches))]


def evaluation_batches(lengths: np.ndarray, virtual_tokens: int) -> list[np.ndarray]:
    """Cut a table into batches of about equal work, longest first; the same on every rank.

    Args:
        lengths: `[N]` int64, of its examples in tokens.
        virtual_tokens: tokens that the prompt adds to each row.

    Returns:
        Index arrays that hold every row once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        rows = max(1, TOKENS_PER_EVALUATION_BATCH // int(lengths[order[first]] + virtual_tokens))
        batches.append(order[first : first + rows])
        first += rows
    return batches
