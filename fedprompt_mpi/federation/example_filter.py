"""The example filter: clients leave out examples that the server, from the centroids of their gradients, calls poison.

A client computes the gradient of the virtual tokens for each of its examples and sorts these into groups, whose
centroids and sizes go to the server. Of a label without an opposite one, the server says which groups are odd. Of one
that has an opposite label, all clients find the kinds of texts together, and count them. A client leaves out what is
nearer to the poison than to the rest of that label. See `rules.example_groups` and `rules.example_kinds`. Clients that
attack their update do not obey.

Legend: P parameters, N rows of the training table.
"""

import time
from typing import Any

import numpy as np

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.example_gradients import sort_examples
from fedprompt_mpi.federation.example_verdicts import Traffic, judge_groups, judge_kinds, part_in_two
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.example_groups import label_cosines, opposite_labels
from fedprompt_mpi.rundir.filtered import FilterRecord, LeftOut


def filter_examples(setup: Setup, vector: Vector, round_: int) -> tuple[np.ndarray, FilterRecord | None]:
    """Find the examples that are left out from a round on; every rank calls this.

    Args:
        setup: of this rank.
        vector: `[P]` float32, the global vector before the round.
        round_: from 1.

    Returns:
        Which rows of the training table are left out `[N]` bool, the same on every rank; the record, on rank 0.

    Raises:
        FilterGivenUp: on every rank, if one was asked to stop.
    """
    channel, corpus, start = setup.channel, setup.corpus, time.perf_counter()
    traffic = Traffic(setup.config.federation.clients)
    own, sums = sort_examples(setup, vector)
    cosines = label_cosines(sums)
    opposite = opposite_labels(cosines)
    traffic.add_sum(sums)
    groups, records = judge_groups(setup, own, opposite, traffic)
    if any(opposite.values()):
        records += judge_kinds(setup, own, opposite, groups, traffic)
    part_in_two(setup, own, traffic)
    left_out, disobedient = np.zeros(len(corpus.train)), attacking_clients(setup.config)
    for part in own:
        if part.client not in disobedient:
            left_out[part.rows] = part.is_odd
    for client in {part.client for part in own}:  # one of which nothing would be left goes on with what it has
        rows = corpus.client_rows(client)
        left_out[rows] *= not left_out[rows].all()
    with channel.phases.timing.mute():  # who left out what is for the records: no rank needs it of another's clients
        everyone = channel.sum(left_out) > 0
    if not setup.is_root:
        return everyone, None
    restarts = setup.config.federation.filter_restart and bool(everyone.any())
    record = FilterRecord(
        round=round_,
        label_cosines=cosines.tolist(),
        groups=records,
        bytes_up=traffic.up,
        bytes_down=traffic.down + (traffic.clients * 4 * setup.method.layout.size if restarts else 0),
        seconds=time.perf_counter() - start,
        restarted=restarts,
        **_score(setup, everyone),
    )
    return everyone, record


def rows_left_out(setup: Setup, record: FilterRecord | None) -> np.ndarray:
    """Return which rows of the training table a record says are left out `[N]` bool.

    Raises:
        ValueError: if it names a client or an example that there is not, or all examples of a client.
    """
    corpus, found = setup.corpus, np.zeros(len(setup.corpus.train), dtype=bool)
    for part in record.left_out if record is not None else []:
        if not 0 <= part.client < setup.config.federation.clients:
            raise ValueError(f"left_out names client {part.client}")
        rows, places = corpus.client_rows(part.client), np.array(part.examples, dtype=np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(rows)):
            raise ValueError(f"left_out names examples that client {part.client} does not have")
        found[rows[places]] = True
        if found[rows].all():
            raise ValueError(f"left_out names all examples of client {part.client}")
    return found


def _score(setup: Setup, left_out: np.ndarray) -> dict[str, Any]:
    """Return who leaves out which examples, and how well that fits the truth."""
    corpus, clients = setup.corpus, setup.config.federation.clients
    by_client = [np.flatnonzero(left_out[corpus.client_rows(client)]) for client in range(clients)]
    trained = np.concatenate([corpus.client_rows(client) for client in range(clients)])
    poison, chosen = corpus.is_poison[trained], left_out[trained]
    found = int((poison & chosen).sum())
    return {
        "examples": len(trained),
        "poisoned": int(poison.sum()),
        "recall": found / int(poison.sum()) if poison.any() else None,
        "precision": found / int(chosen.sum()) if chosen.any() else None,
        "f1": 2 * found / int(poison.sum() + chosen.sum()) if poison.any() else None,
        "left_out": [
            LeftOut(client=client, examples=places.tolist()) for client, places in enumerate(by_client) if len(places)
        ],
    }
