"""Checkpoints of 4 and 8 bits: the numbers of the plain model, the same bits on any number of ranks, one message."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedprompt_mpi.commands.cost import format_cost
from fedprompt_mpi.config import ModelConfig, PromptConfig, SettingsError
from fedprompt_mpi.plm.backbone import Injection, load_backbone
from fedprompt_mpi.plm.hugging_face import model_class, read_config
from fedprompt_mpi.rundir.prompt import read_prompt
from tests.jobs import SMALL, run_here, run_program
from tests.tiny import CAUSAL, KINDS

pytest.importorskip("bitsandbytes", reason="needs the extra: quantised")
pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning", "ignore::DeprecationWarning")
LABELS = torch.tensor([11, 12, 13])
BITS = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}
Quantised = Callable[..., Path]


@pytest.fixture(scope="module")
def quantised(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """Return a function that quantises a tiny model and saves it."""
    from transformers import BitsAndBytesConfig

    def saved(kind: str, bits: int, **more: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"{kind}-{bits}")
        built = model_class(read_config(str(tiny(kind))))
        asked = BitsAndBytesConfig(**BITS[bits], **more)
        built.from_pretrained(tiny(kind), quantization_config=asked, device_map={"": "cpu"}).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny(kind) / name).read_bytes())
        return folder

    return saved


@pytest.mark.parametrize(("kind", "bits"), [(kind, 4) for kind in KINDS] + [("bert", 8), ("llama", 8)])
def test_numbers_of_the_plain_model(kind: str, bits: int, quantised: Quantised) -> None:
    """Logits and gradients with virtual tokens, one text at a time, as transformers' users get them."""
    folder = str(quantised(kind, bits))
    backbone = load_backbone(ModelConfig(dtype="float32"), folder, LABELS, torch.device("cpu"), 4)
    plain: Any = model_class(read_config(folder)).from_pretrained(folder, device_map={"": "cpu"})
    for module in plain.modules():
        module.training = "bit" in type(module).__name__  # dropout is none of theirs
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 60, (1, 15), generator=random)
    ours = torch.randn(1, 4, backbone.geometry.embedding_width, generator=random).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    answer = 14 if kind in CAUSAL else 3

    mask = torch.ones_like(ids, dtype=torch.bool)
    got = backbone.score(ids, mask, torch.tensor([answer]), Injection(virtual_tokens=ours))
    words = torch.cat([theirs, plain.get_input_embeddings()(ids)], dim=1)
    inputs = {"decoder_input_ids": torch.tensor([[0, 4]])} if kind == "t5" else {}
    wanted = plain(inputs_embeds=words, **inputs).logits[:, 1 if kind == "t5" else answer + 4, LABELS]

    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), [x]) for y, x in ((got, ours), (wanted, theirs)))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    assert backbone.num_parameters == plain.num_parameters()


def test_the_same_bits_on_any_number_of_ranks(quantised: Quantised, tmp_path: Path) -> None:
    """Of three, rank 0 evaluates and the others do more."""
    flags = ("--model.name", str(quantised("llama", 4)), "--client.batched=1", "--model.dtype=float32", *SMALL)
    run_here(tmp_path / "one", *flags)
    finished = run_program(3, tmp_path / "three", *flags)
    assert finished.status == 0, finished
    one, three = (read_prompt(tmp_path / name / "prompt.safetensors")[0]["vector"] for name in ("one", "three"))
    assert one.tobytes() == three.tobytes()


def test_what_is_quantised_is_not_trained(quantised: Quantised, tmp_path: Path) -> None:
    folder = str(quantised("bert", 4))
    finished = run_program(1, tmp_path / "run", "--model.name", folder, "--prompt.method=full")
    assert finished.status == 2, finished
    assert finished.err.count("\n") == 1
    assert "its weights are quantised, and cannot be trained; take prompt.method soft" in finished.err
    assert not (tmp_path / "run").exists()
    rows = {line.split()[0]: line for line in format_cost(folder, PromptConfig()).splitlines()}
    assert "its weights are quantised" in rows["full"]
    assert rows["soft"].split()[1] == "640"


def test_a_quantised_head_is_refused(quantised: Quantised) -> None:
    folder = str(quantised("llama", 4, llm_int8_skip_modules=["q_proj"]))
    with pytest.raises(SettingsError, match="whose output embedding is quantised"):
        load_backbone(ModelConfig(), folder, LABELS, torch.device("cpu"), 4)


def test_without_its_library(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((tiny("bert") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": BITS[4]}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(SettingsError, match="pip install bitsandbytes"):
        read_config(str(tmp_path))
