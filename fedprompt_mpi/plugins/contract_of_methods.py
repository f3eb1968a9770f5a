"""The contract of methods, on the model inside the package.

Legend: K clients, P parameters.
"""

import numpy as np
import torch

from fedprompt_mpi import seeds
from fedprompt_mpi.config import ModelConfig, TaskConfig
from fedprompt_mpi.plm import hugging_face
from fedprompt_mpi.plm.backbone import Backbone, Injection, load_backbone
from fedprompt_mpi.plm.method_base import Method
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.plugins.contract_base import expect, expect_same, settings
from fedprompt_mpi.text.batches import Batch, collate
from fedprompt_mpi.text.cloze import Cloze
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.tasks import resolve

TEXTS = 6
"""Of each of two clients."""
TOLERANCE = 1e-5


def _prepared(name: str) -> tuple[Backbone, Method, np.ndarray, Batch]:
    """Return the embedded model, a method for it, its untrained vector `[P]`, and a batch of two clients' texts."""
    folder, task = hugging_face.download("embedded"), resolve(TaskConfig())
    family = hugging_face.family_of(hugging_face.read_config(folder))
    cloze = Cloze(hugging_face.load_tokenizer(folder), task, family, 48)
    ids = torch.from_numpy(cloze.verbalizer.ids)
    backbone = load_backbone(ModelConfig(dtype="float32"), folder, ids, torch.device("cpu"), cloze.mask_id)
    method = make_method(settings("prompt", method=name).prompt, backbone.geometry, backbone.model)
    table = cloze.encode(load(task, TaskConfig(), seed=0).train.take(np.arange(2 * TEXTS)))
    return backbone, method, _initial(backbone, method), collate(table, np.arange(2 * TEXTS))


def _initial(backbone: Backbone, method: Method) -> np.ndarray:
    return method.initial(backbone.word_embeddings(), seeds.generator(0, "initial vector"))


def _scores(backbone: Backbone, method: Method, vectors: np.ndarray, batch: Batch) -> torch.Tensor:
    """Return the logits of a batch, whose rows are dealt to K vectors `[K, P]` in turn."""
    clients = method.leaves(torch.from_numpy(vectors))
    owners = torch.arange(len(batch.labels)) % len(vectors) if len(vectors) > 1 else None
    return _ask(backbone, method.inject(clients), batch, owners)


def _ask(backbone: Backbone, injection: Injection, batch: Batch, owners: torch.Tensor | None = None) -> torch.Tensor:
    ids, mask, answers = map(torch.from_numpy, (batch.ids, batch.mask, batch.answers))
    return backbone.score(ids, mask, answers, injection, owners)


def gradients(name: str) -> str:
    """A method starts at finite numbers that depend on the seed alone, and its loss has a gradient."""
    backbone, method, vector, batch = _prepared(name)
    right = vector.shape == (method.layout.size,) and vector.dtype == np.float32
    expect(right, f"initial returns {vector.dtype} {vector.shape}, not float32 [{method.layout.size}]")
    expect(np.isfinite(vector).all(), f"{int((~np.isfinite(vector)).sum())} of the first numbers are not finite")
    expect_same(_initial(backbone, method), vector, "the first numbers of the same seed")
    (client,) = method.leaves(torch.from_numpy(vector[None]))
    scores = _ask(backbone, method.inject([client]), batch)
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(batch.labels))
    loss.backward()
    found = {name: part.grad for name, part in client.items() if part.grad is not None}
    wrong = [name for name, gradient in found.items() if not gradient.isfinite().all()]
    expect(not wrong, f"gradients that are not finite: {', '.join(wrong)}; loss {loss.item():.4g}")
    moved = sum(bool(gradient.any()) for gradient in found.values())
    return expect(moved, f"P = {method.layout.size:,}; gradients of {moved} of {len(client)} parameters at the start")


def one_by_one(name: str) -> str:
    """Clients in one pass get the same logits as one by one."""
    backbone, method, vector, batch = _prepared(name)
    if not method.shares_passes:
        return "states that clients do not share a pass"
    noise = np.random.default_rng(0).standard_normal((2, method.layout.size)).astype(np.float32)
    vectors = vector + 0.01 * noise
    with torch.no_grad():
        both = _scores(backbone, method, vectors, batch).numpy()
        alone = [_scores(backbone, method, vectors[k : k + 1], batch).numpy()[k::2] for k in range(2)]
    apart = float(np.abs(both[0::2] - _swapped(backbone, method, vectors, batch)).max())
    expect(apart > 0, "two clients with different parameters get the same logits")
    return expect_same(np.concatenate([both[0::2], both[1::2]]), np.concatenate(alone), "logits", TOLERANCE)


def _swapped(backbone: Backbone, method: Method, vectors: np.ndarray, batch: Batch) -> np.ndarray:
    """Return the logits of the first client's texts under the second one's parameters."""
    with torch.no_grad():
        return _scores(backbone, method, vectors[1:], batch).numpy()[0::2]
