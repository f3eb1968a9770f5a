"""The longest texts once through model and method, before a run directory is claimed.

Whatever a model cannot do, its code says in its own words, and late: this makes one message of it, in time.
"""

import numpy as np
import torch

from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.federation.client_training import score_batch
from fedprompt_mpi.files import NO_MEMORY
from fedprompt_mpi.plm.backbone import Backbone
from fedprompt_mpi.plm.hugging_face import first_line
from fedprompt_mpi.plm.method_base import Method
from fedprompt_mpi.text.batches import Batch, collate
from fedprompt_mpi.text.corpus import Corpus

ROWS = 2
"""Texts of the batch: the longest ones."""


def try_longest(config: RunConfig, backbone: Backbone, method: Method, corpus: Corpus) -> None:
    """Send the longest texts forward and backward.

    Raises:
        SettingsError: naming model, method and cause, if that fails for another reason than the machine's memory.
    """
    table = max((corpus.train, corpus.test, corpus.triggered), key=lambda table: int(table.lengths.max(initial=0)))
    batch = collate(table, np.argsort(table.lengths, kind="stable")[-ROWS:])
    try:
        _step(backbone, method, batch)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's code
        if any(words in str(error) for words in NO_MEMORY):
            raise
        raise SettingsError(
            f"model.name is {config.model.name!r}, which fails with prompt.method {config.prompt.method} on texts of "
            f"{batch.ids.shape[1]} tokens ({type(error).__name__}: {first_line(error)[:200]}): use a shorter "
            "model.max_length, another method or another model"
        ) from error


def _step(backbone: Backbone, method: Method, batch: Batch) -> None:
    if method.trains_model:
        backbone.model.requires_grad_()
        clients = [dict(backbone.model.named_parameters())]
    else:
        clients = method.leaves(torch.zeros(1, method.layout.size, device=backbone.device))
    try:
        loss = score_batch(backbone, batch, method.inject(clients)).sum()
        torch.autograd.grad(loss, list(clients[0].values()), allow_unused=True)
    finally:
        if method.trains_model:
            backbone.model.requires_grad_(False)
