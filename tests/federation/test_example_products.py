"""Inner products of single examples' gradients: those of autograd, one example after the other."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.federation.client_training import score_batch
from fedprompt_mpi.federation.example_products import ExampleProducts
from fedprompt_mpi.federation.prepare import prepare
from fedprompt_mpi.rundir.lock import DirectoryLock
from fedprompt_mpi.text.batches import collate
from fedprompt_mpi.text.tasks import resolve
from tests.jobs import SMALL


@pytest.mark.parametrize("method", ["soft", "p_tuning", "prefix", "lora", "bitfit", "full"])
def test_products_are_those_of_one_example_at_a_time(method: str, tmp_path: Path) -> None:
    config = parse_settings([*SMALL, f"--prompt.method={method}", f"--output.dir={tmp_path / 'run'}"])
    lock = DirectoryLock()
    setup, checkpoint = prepare(config, resolve(config.task), LocalChannel(), lock, time.perf_counter())
    rng, rows = np.random.default_rng(0), np.array([3, 50, 7, 20])
    vector = checkpoint.vector + rng.normal(0, 0.01, len(checkpoint.vector)).astype(np.float32)
    directions = rng.standard_normal((3, len(vector))).astype(np.float32)
    ours = ExampleProducts(setup, vector, directions).of(setup.corpus.train, rows)
    for row, found in zip(rows, ours, strict=True):
        (leaves,) = setup.method.leaves(torch.from_numpy(vector)[None].clone())
        batch = collate(setup.corpus.train, np.array([row]))
        logits = score_batch(setup.backbone, batch, setup.method.inject([leaves]))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
        parts = torch.autograd.grad(loss, [leaves[name] for name in setup.method.layout.names], allow_unused=True)
        views = [setup.method.layout.views(torch.from_numpy(direction)) for direction in directions]
        of_each = [
            (name, part) for name, part in zip(setup.method.layout.names, parts, strict=True) if part is not None
        ]
        expected = [sum(float((part * of[name]).sum()) for name, part in of_each) for of in views]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())
    lock.release()
