"""Vectors on a device: the transport waits for the device before it reads them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt_mpi.comm.device import contiguous, is_on_host, synchronise


class _OnGPU:
    """Looks like a tensor of the second GPU: this machine may have none."""

    is_cuda, device = True, "cuda:1"


def test_it_waits_for_the_device_that_has_the_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronise(_OnGPU())
    assert waited == ["cuda:1"]
    synchronise(np.zeros(1))
    synchronise(torch.zeros(1))
    assert waited == ["cuda:1"]


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_a_block_of_columns_becomes_contiguous(make: Callable[[int], Any]) -> None:
    block = contiguous(make(6).reshape(2, 3)[:, 1:])
    assert is_on_host(block) is (make is np.arange)
    assert np.asarray(block).flags.c_contiguous
    assert np.asarray(block).tolist() == [[1, 2], [4, 5]]
