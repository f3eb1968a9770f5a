"""The PLM's weights are mapped: five ranks on a node hold one copy of a 90 MB checkpoint."""

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from tests.jobs import launch

PROGRAM = """
import ctypes, gc, sys
import numpy as np, torch
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.config import ModelConfig
from fedprompt_mpi.plm.backbone import Injection, load_backbone
from fedprompt_mpi.federation.prepare import share_bf16
torch.set_num_threads(1)

def pss():
    ctypes.CDLL(None).malloc_trim(0)  # what a step has freed is no copy of the model
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))

channel = open_channel(read_launch())
folder = channel.node_folder()
shared = folder.__enter__()

def step(folder, dtype):
    # load a model as the program does and go once through it, forward and backward; then read all of its weights
    backbone = load_backbone(ModelConfig(dtype=dtype), folder, torch.tensor([11, 12]), torch.device("cpu"), 0)
    if backbone.bf16:
        share_bf16(channel, backbone, shared / f"{len(folder)}.safetensors")
    prompt = torch.zeros(1, 20, backbone.geometry.embedding_width, requires_grad=True)
    ids, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.bool)
    backbone.score(ids, mask, torch.tensor([5, 6]), Injection(virtual_tokens=prompt)).sum().backward()
    for parameter in backbone.model.parameters():
        parameter.sum()
    return backbone

for dtype in ("float32", "bfloat16"):
    step(sys.argv[1], dtype)  # loads what belongs to the libraries: late imports, kernels and buffers for these shapes
    gc.collect()
    channel.agree(None)
    before = pss()
    channel.agree(None)
    backbone = step(sys.argv[1], dtype)
    channel.agree(None)
    grown = channel.sum(np.array([float(pss() - before)]))[0]
    channel.agree(None)
    if channel.rank == 0:
        print(f"{dtype} grown {grown:.0f}")
    del backbone
    gc.collect()  # its mapping goes, too
channel.close()
"""


def _grown(ranks: int, folder: Path) -> dict[str, float]:
    finished = launch(ranks, "-c", PROGRAM, str(folder), deadline_s=180)
    assert finished.status == 0, finished
    return {dtype: float(grown) for dtype, grown in re.findall(r"(\w+) grown (\d+)", finished.out)}


def test_five_ranks_hold_one_copy(tmp_path: Path) -> None:
    """Summed over ranks, memory hardly grows more by loading the model on 5 ranks than by loading it on 1."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    file_size = (tmp_path / "model.safetensors").stat().st_size
    assert 85e6 < file_size < 95e6
    alone, together = _grown(1, tmp_path), _grown(5, tmp_path)
    assert set(alone) == set(together) == {"float32", "bfloat16"}
    for dtype, grown in alone.items():
        print(f"{dtype}: file {file_size / 1e6:.0f} MB, 1 rank {grown / 1e6:.0f} MB, 5 {together[dtype] / 1e6:.0f} MB")
        assert grown > 0.8 * file_size  # the weights were there to be counted
        assert together[dtype] - grown <= 0.3 * file_size
