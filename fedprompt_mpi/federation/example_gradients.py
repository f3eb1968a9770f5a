"""The gradients of single examples, by which the example filter tells them apart.

Legend: n examples of a client, V virtual tokens, D their width, P parameters, F low frequencies.
"""

import math

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.rank_training import clients_per_pass
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.example_groups import corner, low_frequencies
from fedprompt_mpi.text.batches import collate


class FilterGivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This process was asked to stop, and gives the filter up."""


def example_gradients(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the gradient of each example's loss by the virtual tokens `[n, V, D]` float32.

    The examples go through the PLM in one pass, as if each were a client of its own.

    Args:
        setup: PLM, method, data.
        vector: `[P]` float32, where the gradient is taken.
        rows: `[n]` int64 of the training table.
    """
    method, device = setup.method, setup.backbone.device
    shared = method.layout.views(to_device(vector, device))
    own = shared["virtual_tokens"].detach().repeat(len(rows), 1, 1).requires_grad_()
    clients = [{**shared, "virtual_tokens": tokens} for tokens in own]
    batch = collate(setup.corpus.train, rows)
    logits = score_batch(setup.backbone, batch, method, clients, torch.arange(len(rows)).to(device))
    torch.nn.functional.cross_entropy(logits, to_device(batch.labels, device), reduction="sum").backward()
    assert own.grad is not None
    return to_host(own.grad)


def features_of(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the low frequencies of a client's gradients `[n, F]`, in passes as large as those of training.

    Raises:
        FilterGivenUp: if this process was asked to stop.
    """
    client, liveness = setup.config.client, setup.channel.phases.liveness
    at_once = max(1, clients_per_pass(setup) * client.batch_size // client.accumulate)
    order = np.argsort(setup.corpus.train.lengths[rows], kind="stable")
    features = np.empty((len(rows), num_frequencies(setup)), dtype=np.float32)
    for places in (order[at : at + at_once] for at in range(0, len(order), at_once)):
        gradients = example_gradients(setup, vector, rows[places])
        features[places] = low_frequencies(gradients, setup.config.federation.filter_share)
        liveness.step()
        if liveness.stop.requested:
            raise FilterGivenUp
    return features


def num_frequencies(setup: Setup) -> int:
    """Return F."""
    shape = setup.config.prompt.num_virtual_tokens, setup.backbone.geometry.embedding_width
    return math.prod(corner(*shape, setup.config.federation.filter_share))
