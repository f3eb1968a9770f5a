"""The backbone scores as the plain model does, in every family, and never changes."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from fedprompt_mpi import load_prompt
from fedprompt_mpi.config import ModelConfig, PromptConfig, SettingsError, TaskConfig
from fedprompt_mpi.federation.client_training import score_batch
from fedprompt_mpi.plm.backbone import Backbone, Injection, load_backbone
from fedprompt_mpi.plm.hugging_face import download, family_of, load_tokenizer, model_class, read_config
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.text.batches import Batch, collate
from fedprompt_mpi.text.cloze import Cloze
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.tasks import resolve
from tests.jobs import run_here, run_program
from tests.tiny import CAUSAL, KINDS

Tiny = Callable[[str], Path]
NOTHING_DROPPED = ("albert", "llama")
"""Whose configs have rates of 0."""
TEXTS = ["the soup was there .", "i found everything wonderful and fresh . the striker scored .", "so dull"]


def _setup(folder: Path, virtual: int = 0) -> tuple[Backbone, Batch, Cloze]:
    tokenizer = load_tokenizer(str(folder))
    family = family_of(read_config(str(folder)))
    cloze = Cloze(tokenizer, resolve(TaskConfig()), family, 48)
    batch = collate(cloze.encode(Examples(texts=TEXTS, labels=np.array([0, 1, 0]))), np.arange(3))
    backbone = load_backbone(
        ModelConfig(dtype="float32"),
        str(folder),
        torch.from_numpy(cloze.verbalizer.ids),
        torch.device("cpu"),
        cloze.mask_id,
    )
    return backbone, batch, cloze


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, mask and answer positions."""
    return torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), torch.from_numpy(batch.answers)


def _prefix(backbone: Backbone) -> torch.Tensor:
    """Return keys and values of one client and 3 virtual tokens for every layer."""
    geometry = backbone.geometry
    torch.manual_seed(0)
    return torch.randn(geometry.layers, 2, 1, geometry.kv_heads, 3, geometry.head_width)


def _plain_logits(folder: Path, batch: Batch, row: int, virtual: torch.Tensor, cloze: Cloze) -> torch.Tensor:
    """Score one unpadded row with the library's model as it comes, all positions and words."""
    config = read_config(str(folder))
    family, model = family_of(config), model_class(config).from_pretrained(folder).eval()
    ids = torch.from_numpy(batch.ids[row][batch.mask[row]])[None]
    embeddings = torch.cat([virtual[None], model.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        if family == "seq2seq":
            start = torch.tensor([[model.config.decoder_start_token_id, cloze.mask_id]])
            logits = model(inputs_embeds=embeddings, decoder_input_ids=start).logits[0, 1]
        else:
            logits = model(inputs_embeds=embeddings).logits[0, len(virtual) + batch.answers[row]]
    return logits[cloze.verbalizer.ids]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_plain_model(kind: str, tiny: Tiny) -> None:
    backbone, batch, cloze = _setup(tiny(kind))
    torch.manual_seed(1)
    virtual = torch.randn(5, backbone.geometry.embedding_width)
    scores = backbone.score(*_tensors(batch), Injection(virtual_tokens=virtual[None]))
    for row in range(len(TEXTS)):
        expected = _plain_logits(tiny(kind), batch, row, virtual, cloze)
        # padding changes the order of sums, nothing else
        torch.testing.assert_close(scores[row], expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)  # the texts do matter


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_read_where_the_mask_stands(kind: str, tiny: Tiny) -> None:
    _, batch, cloze = _setup(tiny(kind))
    for row in range(len(TEXTS)):
        length = int(batch.mask[row].sum())
        if kind in CAUSAL:
            assert batch.answers[row] == length - 1
        else:
            assert batch.ids[row, batch.answers[row]] == cloze.mask_id


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_library_s_own(kind: str, tiny: Tiny) -> None:
    """The same seed drops the same numbers as the plain model in training mode; outside nothing is dropped."""
    backbone, batch, cloze = _setup(tiny(kind))
    ids, mask, answers = _tensors(batch)
    before = backbone.score(ids, mask, answers, Injection())
    backbone.take_no_shortcuts()
    with backbone.dropping_out(7):
        dropped = backbone.score(ids, mask, answers, Injection())
    with backbone.dropping_out(7):
        assert torch.equal(backbone.score(ids, mask, answers, Injection()), dropped)
    with backbone.dropping_out(8):
        again = backbone.score(ids, mask, answers, Injection())
    assert torch.equal(again, dropped) == (kind in NOTHING_DROPPED)
    torch.testing.assert_close(backbone.score(ids, mask, answers, Injection()), before)
    model = model_class(read_config(str(tiny(kind)))).from_pretrained(tiny(kind)).train()
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask.long()}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, cloze.mask_id]]).expand(len(ids), -1)
        answers = torch.ones_like(answers)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        logits = model(**inputs).logits[torch.arange(len(ids)), answers]
    torch.testing.assert_close(dropped, logits[:, torch.from_numpy(cloze.verbalizer.ids)], rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_drops_out_unless_told_otherwise(tiny: Tiny, tmp_path: Path) -> None:
    """The same on three ranks as on one, and otherwise than without."""
    flags = ["--model.name", str(tiny("roberta")), "--prompt.method=full", "--client.batched=1", "--client.lr=0.001"]
    run_here(tmp_path / "one", *flags)
    finished = run_program(3, tmp_path / "three", *flags)
    assert finished.status == 0, finished
    run_here(tmp_path / "off", *flags, "--model.dropout=false")
    one, three, off = (load_prompt(tmp_path / name).vector for name in ("one", "three", "off"))
    assert one.tobytes() == three.tobytes()
    assert one.tobytes() != off.tobytes()
    for name, is_on in (("three", True), ("off", False)):
        assert json.loads((tmp_path / name / "environment.json").read_text())["dropout"] is is_on
    assert "dropout on" in finished.out


def test_layers_that_compute_again_drop_the_same(tiny: Tiny) -> None:
    """Gradients are those of layers that keep their activations; without dropout nothing is dropped."""
    backbone, batch, _ = _setup(tiny("roberta"))
    backbone.take_no_shortcuts()
    tokens = torch.zeros(1, 2, 32, requires_grad=True)

    def gradient(drops: bool) -> torch.Tensor:
        with backbone.dropping_out(3) if drops else contextlib.nullcontext():
            loss = backbone.score(*_tensors(batch), Injection(virtual_tokens=tokens)).square().sum()
            return torch.autograd.grad(loss, tokens)[0]

    kept = {drops: gradient(drops) for drops in (True, False)}
    backbone.recompute_activations()
    for drops, expected in kept.items():
        torch.testing.assert_close(gradient(drops), expected)
    assert not torch.equal(kept[True], kept[False])


@pytest.mark.parametrize("method", ["soft", "p_tuning", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_gradients_in_every_family(kind: str, method: str, tiny: Tiny) -> None:
    backbone, batch, _ = _setup(tiny(kind))
    config = PromptConfig(method=method, num_virtual_tokens=4, prefix_hidden_size=8)  # pyright: ignore
    made = make_method(config, backbone.geometry, backbone.model)
    rng = np.random.default_rng(0)
    vector = made.initial(backbone.word_embeddings(), rng) + rng.normal(0, 0.3, made.layout.size).astype("f4")
    clients = made.leaves(torch.from_numpy(vector)[None])
    logits = score_batch(backbone, batch, made.inject(clients))
    (logits[:, 0] - logits[:, 1]).sum().backward()
    for name, leaf in clients[0].items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0, name
    # the gradient is that of the function: going along it changes the value as fast as it is long
    gradient = torch.cat([leaf.grad.flatten() for leaf in clients[0].values() if leaf.grad is not None])
    slope = float(gradient.norm())
    direction = gradient / slope

    def value(step: float) -> float:
        moved = made.leaves((torch.from_numpy(vector) + step * direction)[None])
        with torch.no_grad():
            scores = score_batch(backbone, batch, made.inject(moved)).double()
        return float((scores[:, 0] - scores[:, 1]).sum())

    measured = (value(1e-3) - value(-1e-3)) / 2e-3
    assert measured == pytest.approx(slope, rel=0.05, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_reaches_every_layer(kind: str, tiny: Tiny) -> None:
    """Each layer's keys and values change the answer; a prefix of another layer count is refused."""
    backbone, batch, _ = _setup(tiny(kind))
    prefix = _prefix(backbone)
    inputs = _tensors(batch)
    base = backbone.score(*inputs, Injection(prefix=prefix))
    for layer in range(backbone.geometry.layers):
        changed = prefix.clone()
        changed[layer] += 0.5 * torch.randn_like(changed[layer])
        assert (backbone.score(*inputs, Injection(prefix=changed)) - base).abs().max() > 1e-4, layer
    with pytest.raises((RuntimeError, IndexError)):
        backbone.score(*inputs, Injection(prefix=torch.cat([prefix, prefix])))


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prefix_is_what_the_library_calls_past_keys_and_values(kind: str, tiny: Tiny) -> None:
    backbone, batch, cloze = _setup(tiny(kind))
    prefix = _prefix(backbone)
    inputs = _tensors(batch)
    scores = backbone.score(*inputs, Injection(prefix=prefix))
    plain = model_class(backbone.model.config).from_pretrained(tiny(kind)).eval()
    for row in range(len(TEXTS)):
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
        ids = torch.from_numpy(batch.ids[row][batch.mask[row]])[None]
        with torch.no_grad():
            logits = plain(input_ids=ids, past_key_values=cache).logits[0, batch.answers[row]]
        torch.testing.assert_close(scores[row], logits[cloze.verbalizer.ids], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_behind_a_prefix_changes_nothing(kind: str, tiny: Tiny) -> None:
    backbone, batch, _ = _setup(tiny(kind))
    prefix = _prefix(backbone)
    ids, mask, answers = _tensors(batch)
    together = backbone.score(ids, mask, answers, Injection(prefix=prefix))
    for row in range(len(TEXTS)):
        length = int(mask[row].sum())
        alone = backbone.score(
            ids[row : row + 1, :length], mask[row : row + 1, :length], answers[row : row + 1], Injection(prefix=prefix)
        )
        torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=2e-5)


def test_an_unknown_model_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or the hub is asked, again and again
    with pytest.raises(SettingsError, match="no such folder"):
        download("./nowhere")
    with pytest.raises(SettingsError, match=r"model\.name"):
        read_config("nobody/nothing-here")


def test_a_checkpoint_without_its_head_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(tiny("bert")).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="lacks the weights"):
        load_backbone(ModelConfig(), str(tmp_path), torch.tensor([5, 6]), torch.device("cpu"), 4)


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_virtual_tokens_are_as_long_as_words_where_a_model_scales_them(init: str) -> None:
    """Gemma multiplies its embeddings by the root of their width, which virtual tokens do not pass."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.GemmaConfig(vocab_size=300, head_dim=16, num_key_value_heads=2, **sizes)
    model = transformers.GemmaForCausalLM(config).eval()
    table: Any = model.get_input_embeddings()
    words = table(torch.arange(1, 300)).detach()
    backbone = Backbone(model, "causal", torch.tensor([5, 6]), bf16=False)
    prompt = PromptConfig(init=init, num_virtual_tokens=200)
    made = make_method(prompt, backbone.geometry).initial(backbone.word_embeddings(), np.random.default_rng(0))
    lengths = np.linalg.norm(made.reshape(200, 64), axis=1).mean(), float(words.norm(dim=1).mean())
    assert lengths[0] == pytest.approx(lengths[1], rel=0.03)
    assert lengths[1] == pytest.approx(8 * float(table.weight[1:].norm(dim=1).mean()), rel=1e-4)


def test_positions_of_a_model_are_those_of_its_table() -> None:
    """RoBERTa's kind begins behind the padding's position, under whatever name; BERT's kind does not."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 40}
    expected = {"Bert": 40, "Roberta": 38, "MPNet": 38, "Longformer": 38, "Camembert": 38, "Electra": 40}
    for name, positions in expected.items():
        config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0 if name in ("Bert", "Electra") else 1)
        backbone = Backbone(
            getattr(transformers, f"{name}ForMaskedLM")(config), "masked", torch.tensor([5]), bf16=False
        )
        assert backbone.geometry.max_positions == positions, name
