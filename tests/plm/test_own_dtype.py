"""Frozen weights stay in the checkpoint's dtype, with the numbers of a float32 copy; less memory, the same steps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprompt_mpi.config import ModelConfig, RunConfig, SettingsError, from_dict
from fedprompt_mpi.plm.backbone import Backbone, Injection, load_backbone
from fedprompt_mpi.plm.hugging_face import read_config
from fedprompt_mpi.rundir.prompt import read_prompt
from tests.jobs import run_here
from tests.tiny import KINDS

LABELS = torch.tensor([11, 12, 13])


def _saved(folder: Path, kind: str, tiny: Callable[[str], Path], dtype: torch.dtype) -> Path:
    """Save a tiny model in a dtype."""
    import transformers

    from fedprompt_mpi.plm.hugging_face import model_class

    model = model_class(read_config(str(tiny(kind)))).from_pretrained(tiny(kind), dtype=dtype)
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny(kind) / name).read_bytes())
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    return folder


def _scores(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, 60, (3, 15), generator=torch.Generator().manual_seed(0))
    width = backbone.geometry.embedding_width
    virtual = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.ones(3, 15, dtype=torch.bool)
    scores = backbone.score(ids, mask, torch.tensor([3, 9, 14]), Injection(virtual_tokens=virtual))
    (gradient,) = torch.autograd.grad(scores.square().sum(), [virtual])
    return scores.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_what_they_are_and_numbers_too(
    kind: str, dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """In float32 arithmetic: as a model whose weights were all converted to float32."""
    folder = str(_saved(tmp_path / kind, kind, tiny, dtype))
    config, device = ModelConfig(dtype="float32"), torch.device("cpu")
    kept = load_backbone(config, folder, LABELS, device, 4)
    whole = load_backbone(config, folder, LABELS, device, 4)
    whole.model.float()
    size = sum(p.numel() for p in kept.model.parameters())
    small = sum(p.numel() for p in kept.model.parameters() if p.dtype == dtype)
    assert small > 0.7 * size  # T5's second matrix and tables of positions are float32
    for ours, theirs in zip(_scores(kept), _scores(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_full_fine_tuning_of_such_a_checkpoint_is_in_float32(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", "bert", tiny, torch.bfloat16)
    flags = (f"--model.name={folder}", "--prompt.method=full", "--model.dtype=float32", "--federation.rounds=1")
    run_here(tmp_path / "run", *flags, "--client.lr=0.01")
    vector = read_prompt(tmp_path / "run")[0]["vector"]
    rounded = torch.from_numpy(vector.copy()).bfloat16().float().numpy()
    assert (vector != rounded).mean() > 0.5


@pytest.mark.parametrize("parts", [2, 3, 32, 1000])
def test_accumulated_steps_are_one_large_batch(parts: int, tmp_path: Path) -> None:
    flags = ("--client.optimizer=sgd", "--client.batch_size=8", "--federation.clients=3")
    run_here(tmp_path / "one", *flags)
    run_here(tmp_path / "parts", *flags, f"--client.accumulate={parts}")
    one, other = (read_prompt(tmp_path / name)[0]["vector"] for name in ("one", "parts"))
    np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "electra"])
def test_activations_computed_again_are_the_same(kind: str, tiny: Callable[[str], Path]) -> None:
    folder = str(tiny(kind))
    config, device = ModelConfig(dtype="float32"), torch.device("cpu")
    plain = load_backbone(config, folder, LABELS, device, 4)
    again = load_backbone(ModelConfig(dtype="float32", checkpoint_activations=True), folder, LABELS, device, 4)
    calls = []
    layer = next(module for module in again.model.modules() if getattr(module, "gradient_checkpointing", False) is True)
    inside = next(module for module in layer.modules() if getattr(module, "weight", None) is not None)
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(_scores(again), _scores(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2, "forward, and again in the backward pass"


def test_a_prefix_is_not_computed_again() -> None:
    settings = {"model": {"checkpoint_activations": True}, "prompt": {"method": "prefix"}}
    with pytest.raises(SettingsError, match=r"model\.checkpoint_activations is true but prompt\.method is prefix"):
        from_dict(settings)
    assert isinstance(from_dict({"model": {"checkpoint_activations": True}}), RunConfig)
