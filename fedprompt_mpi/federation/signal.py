"""The backdoor's share in what the server adds to the global vector: its signal-to-noise ratio, round by round.

The signal is the part of the aggregated step along the direction in which the backdoor grows fastest, minus the
gradient of the loss on triggered test texts labelled with the target; the noise is the rest of the step. Where poisoned
clients' updates agree and honest ones cancel out along that direction, the ratio rises, although no single update
stands out.

Inspired by Zhao et al., Revisiting Backdoor Threat in Federated Instruction Tuning from a Signal Aggregation
Perspective, 2026, arXiv:2602.15671, whose own definition was not at hand.

Legend: P parameters, M triggered test texts.
"""

import math

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.aggregator_base import TINY
from fedprompt_mpi.text.batches import collate, evaluation_batches


def backdoor_direction(setup: Setup, vector: Vector) -> np.ndarray:
    """Return the unit vector `[P]` float64 along which the backdoor grows fastest, the same on every rank.

    Each rank takes the gradient on its shard of the triggered texts; zeros if the gradient is.
    """
    channel, table, device = setup.channel, setup.corpus.triggered, setup.backbone.device
    total = np.zeros(setup.method.layout.size)
    if setup.shard is not None:
        vectors = to_device(vector, device)[None].clone()
        (leaves,) = setup.method.leaves(vectors)
        index, shards = setup.shard
        size = setup.config.client.batch_size  # as much as training has in a pass
        batches = [
            rows[at : at + size] for rows in evaluation_batches(table.lengths, 0) for at in range(0, len(rows), size)
        ]
        for rows in batches[index::shards]:
            batch = collate(table, rows)
            logits = score_batch(setup.backbone, batch, setup.method.inject([leaves]))
            labels = to_device(batch.labels, device)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            channel.phases.liveness.step()
        flat = torch.zeros_like(vectors[0])
        for name, view in setup.method.layout.views(flat).items():
            gradient = leaves[name].grad
            if gradient is not None:
                view.copy_(gradient)
        total -= to_host(flat)
    total = channel.sum(total)
    return total / max(float(np.sqrt(np.einsum("i,i", total, total))), TINY)


def backdoor_snr(direction: np.ndarray, step: np.ndarray) -> float | None:
    """Return the ratio of a step's power along the backdoor's direction to that of the rest, in decibels.

    Args:
        direction: `[P]`, of `backdoor_direction` at the vector before the step.
        step: `[P]`, what the server added to it.

    Returns:
        None for a step away from the backdoor, or with nothing else in it.
    """
    along = float(np.einsum("i,i", direction, step, dtype=np.float64))
    rest = float(np.einsum("i,i", step, step, dtype=np.float64)) - along**2
    return 10 * math.log10(along**2 / rest) if along > 0 and rest > 0 else None
