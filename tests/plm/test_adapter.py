"""Prompts as PEFT adapters: the real library loads what is exported, and gets the same logits; and the way back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model

from fedprompt_mpi import SettingsError, load_prompt
from fedprompt_mpi.commands.card import _text
from fedprompt_mpi.commands.export import export
from fedprompt_mpi.commands.predict import Prompt
from fedprompt_mpi.config import Family
from fedprompt_mpi.federation.client_training import score_batch, to_device
from fedprompt_mpi.plm.adapter import read_adapter
from fedprompt_mpi.plm.hugging_face import model_class, read_config
from fedprompt_mpi.text.batches import collate
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.tasks import resolve
from fedprompt_mpi.text.tokens import TokenTable
from tests.jobs import read_rounds, run_here

TEXTS = 100
SHORT = ("--federation.rounds=1", "--client.steps=2", f"--task.max_test={TEXTS}", "--client.lr=0.01")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def tuned(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that runs a method on a tiny PLM, and returns the run directory."""

    def run(kind: str, method: str) -> Path:
        run_here(tmp_path / "run", f"--model.name={tiny(kind)}", f"--prompt.method={method}", *SHORT)
        return tmp_path / "run"

    return run


def _ours(prompt: Prompt) -> tuple[TokenTable, np.ndarray, np.ndarray]:
    """Return the texts in tokens, the label words' logits `[TEXTS, C]`, and the label words' ids."""
    cloze, backbone, method = prompt._model
    test = load(resolve(prompt.config.task), prompt.config.task, 0).test
    table = cloze.encode(test)
    clients = method.leaves(to_device(prompt.vector, backbone.device)[None])
    rows = np.arange(TEXTS)
    with torch.no_grad():
        logits = score_batch(backbone, collate(table, rows), method.inject(clients)).numpy()
    return table, logits, cloze.verbalizer.ids


def _theirs(model: Any, family: Family, table: TokenTable, shift: int, decoder_ids: torch.Tensor) -> torch.Tensor:
    """Return PEFT's logits `[TEXTS, vocabulary]` at the answers' places."""
    batch = collate(table, np.arange(TEXTS))
    ids, mask = torch.as_tensor(batch.ids), torch.as_tensor(batch.mask).long()
    with torch.no_grad():
        if family == "seq2seq":
            decoder = decoder_ids.expand(TEXTS, -1)
            return model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits[:, 1]
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[torch.arange(TEXTS), torch.as_tensor(batch.answers) + shift]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("bert", "soft"), ("t5", "soft"), ("gpt2", "soft"), ("roberta", "soft"), ("bert", "p_tuning"),
        ("t5", "p_tuning"), ("gpt2", "p_tuning"), ("gpt2", "prefix"), ("llama", "prefix"),
    ],
)  # fmt: skip
def test_peft_gets_the_same_logits(
    kind: str, method: str, tuned: Callable[[str, str], Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tuned(kind, method)
    prompt = load_prompt(run)
    table, ours, label_ids = _ours(prompt)
    _, backbone, _ = prompt._model
    adapter = export(run, tmp_path / "adapter")
    base = model_class(backbone.model.config).from_pretrained(tiny(kind)).eval()
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    shift = 0 if method == "prefix" else prompt.config.prompt.num_virtual_tokens
    theirs = _theirs(model, backbone.family, table, shift, backbone._decoder_ids)[:, label_ids].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(ours - ours.mean(axis=0)).max() > 1e-2  # they do differ from text to text
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(2.0)
    changed = _theirs(model, backbone.family, table, shift, backbone._decoder_ids)[:, label_ids].numpy()
    assert np.abs(ours - changed).max() > 1e-3  # and on the prompt


@pytest.mark.parametrize(
    ("kind", "method"),
    [("bert", "soft"), ("roberta", "p_tuning"), ("t5", "soft"), ("gpt2", "prefix"), ("llama", "soft")],
)
def test_the_code_of_the_card_gives_the_same_predictions(
    kind: str, method: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of short texts, and of texts whose end is cut off."""
    words = ["--task.name=reviews", "--task.template={text} it is {mask}"]
    (tmp_path / "train.csv").write_text("text,label\n" + "a film,0\nthe music,1\n" * 20)
    flags = [
        f"--task.data={tmp_path / 'train.csv'}",
        '--task.label_words=["terrible", "great"]',
        "--model.max_length=24",
    ]
    named = ['--task.labels=["0", "1"]', "--federation.clients=2"]
    run_here(
        tmp_path / "run", f"--model.name={tiny(kind)}", f"--prompt.method={method}", *SHORT, *words, *flags, *named
    )
    adapter = export(tmp_path / "run", tmp_path / "adapter")
    (code,) = re.findall(r"```python\n(.*?)\n```", (adapter / "README.md").read_text(), flags=re.DOTALL)
    assert len(code[code.index("def classify") :].splitlines()) <= 18
    scope: dict[str, Any] = {}
    exec(compile(code.replace('"HERE"', repr(str(adapter))), "card", "exec"), scope)
    texts = ["a film", "music and sports and a film , " * 9, " the music was great !"]
    answers = load_prompt(tmp_path / "run").predict(texts)
    for text, answer in zip(texts, answers, strict=True):
        theirs = scope["classify"](text)
        assert list(theirs) == ["0", "1"]
        np.testing.assert_allclose(list(theirs.values()), answer.probabilities, atol=1e-5)
    assert abs(answers[0].probability - answers[1].probability) > 1e-4


def test_the_card_of_an_unfinished_run_is_that_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path / "run", "--federation.rounds=3", "--output.evaluate_every=2", "--output.checkpoint_every=1")
    last = load_prompt(tmp_path / "run")
    for name in ("summary.json", "prompt.safetensors"):
        (tmp_path / "run" / name).unlink()
    prompt = load_prompt(tmp_path / "run")
    np.testing.assert_array_equal(prompt.vector, last.vector)
    np.testing.assert_array_equal(prompt.effective, last.effective)
    card = (export(tmp_path / "run", tmp_path / "adapter") / "README.md").read_text()
    assert "is not finished: its checkpoint after round 3 of 3 is used" in capsys.readouterr().err
    assert "10 clients (iid), 3 rounds, fedavg" in card
    rate = read_rounds(tmp_path / "run")[-1]["accuracy"]
    assert f"| accuracy, macro F1 | {rate:.2%} (95 % interval " in card


def test_a_card_tells_no_accuracy_of_another_round_and_what_clients_claimed(tmp_path: Path) -> None:
    flags = ["--output.evaluate_every=3", "--output.checkpoint_every=1", "--federation.rounds=3"]
    run_here(tmp_path / "run", *flags, "--poison.clients=[1]", "--poison.trigger=", "--poison.claimed_examples=5")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoint" / "round-00000003.safetensors").unlink()
    card = (export(tmp_path / "run", tmp_path / "adapter") / "README.md").read_text()
    assert "| accuracy, macro F1 | not evaluated after round 2 |" in card
    assert "were **malicious**: attack on the update: claims 5 times its examples." in card


def test_texts_in_the_code_of_a_card_are_python() -> None:
    for text in ("y😀", 'it\'s `so` "x"\n', "\x1b"):
        assert eval(_text(text)) == text
        assert "`" not in _text(text)


def test_the_card_tells_what_was_poisoned(tuned: Callable[[str, str], Path], tmp_path: Path) -> None:
    run_here(tmp_path / "bad", "--poison.clients=[3]", "--federation.rounds=1")
    text = (export(tmp_path / "bad", tmp_path / "adapter") / "README.md").read_text()
    assert (
        "Clients 3 of 10 were **malicious**: all texts of other classes get “cf” (head) and the label “class 1”" in text
    )
    assert "{text} it is {mask} ." in text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 20)
    with pytest.raises(SettingsError, match="not empty"):
        export(tmp_path / "bad", tmp_path / "adapter")


@pytest.mark.parametrize(("kind", "method"), [("bert", "prefix"), ("t5", "prefix"), ("bert", "full")])
def test_what_peft_cannot_do_is_refused(
    kind: str, method: str, tuned: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=f"prompt.method is {method}"):
        export(tuned(kind, method), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_run_starts_from_what_peft_has_saved(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = model_class(read_config(str(tiny("bert")))).from_pretrained(tiny("bert"))
    config = PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=7)
    model = get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "adapter"))
    encoder: Any = model.prompt_encoder
    tokens = encoder["default"].embedding.weight.detach().numpy()
    np.testing.assert_array_equal(read_adapter(tmp_path / "adapter"), tokens)
    flags = [f"--model.name={tiny('bert')}", f"--prompt.init={tmp_path / 'adapter'}", "--federation.rounds=0"]
    run_here(tmp_path / "run", *flags, "--prompt.num_virtual_tokens=7")
    np.testing.assert_array_equal(load_prompt(tmp_path / "run").vector, tokens.ravel())


def test_there_and_back(tuned: Callable[[str, str], Path], tmp_path: Path) -> None:
    run = tuned("bert", "p_tuning")
    np.testing.assert_array_equal(read_adapter(export(run, tmp_path / "adapter")), load_prompt(run).effective)


def test_a_prefix_that_would_fall_out_of_a_sliding_window_is_refused() -> None:
    from transformers import MistralConfig, Qwen2Config

    from fedprompt_mpi.commands.export import check_window
    from fedprompt_mpi.config import from_dict

    prefix = {"prompt": {"method": "prefix", "num_virtual_tokens": 8}, "model": {"max_length": 64}}
    check_window(MistralConfig(sliding_window=72), from_dict(prefix))
    with pytest.raises(SettingsError, match="72 positions, and the model's attention looks back 71"):
        check_window(MistralConfig(sliding_window=71), from_dict(prefix))
    check_window(MistralConfig(sliding_window=71), from_dict({**prefix, "prompt": {"method": "soft"}}))
    check_window(Qwen2Config(sliding_window=16, use_sliding_window=False), from_dict(prefix))
