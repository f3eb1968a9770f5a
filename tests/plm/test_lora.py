"""LoRA and BitFit: as many parameters, the same logits and the same files as PEFT; several clients in one pass."""

import contextlib
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch.utils.checkpoint import checkpoint

from fedprompt_mpi import SettingsError, load_prompt
from fedprompt_mpi.commands.export import export
from fedprompt_mpi.config import LoRAConfig, PromptConfig
from fedprompt_mpi.plm.adapting import Adapting
from fedprompt_mpi.plm.hugging_face import geometry_of, model_class, read_config
from fedprompt_mpi.plm.late_imports import on_meta
from fedprompt_mpi.plm.lora import targets_of
from fedprompt_mpi.plm.methods import make_method
from tests.jobs import read_rounds, run_here
from tests.plm.test_adapter import SHORT, _ours, _theirs
from tests.tiny import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
Tiny = Callable[[str], Path]
TARGETS = {"albert": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}
"""Of model types for which PEFT has no default."""
FREEZE_A = ("--prompt.method=lora", "--prompt.lora.aggregation=freeze_a")


def _small(model_type: str) -> Any:
    """Return a model of a type on the meta device, with two layers."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    return on_meta(lambda: model_class(config).from_config(config))


@pytest.mark.parametrize("model_type", sorted(PEFT_DEFAULTS))
def test_the_default_targets_are_pefts(model_type: str) -> None:
    """For every type that PEFT has a default for, transformers a model, and we support."""
    named = PEFT_DEFAULTS[model_type]
    model = None
    with contextlib.suppress(Exception):
        model = _small(model_type)
    if model is None or not isinstance(named, list) or model_type in ("blip-2", "llama4", "t5gemma"):
        pytest.skip("no language model of this type in transformers, or a pattern")
    ends = {name.rpartition(".")[2] for name in targets_of(model, None)}
    assert ends == {name for name in named if any(module.endswith(name) for module, _ in model.named_modules())}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_parameters_as_peft(kind: str, rank: int, tiny: Tiny) -> None:
    model = model_class(read_config(str(tiny(kind)))).from_pretrained(tiny(kind))
    method = make_method(
        PromptConfig(method="lora", lora=LoRAConfig(rank=rank)), geometry_of(model.config, model), model
    )
    theirs: Any = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS.get(kind)))
    assert method.layout.size == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [*((kind, TARGETS.get(kind)) for kind in KINDS), ("bert", ["key", "dense"]), ("t5", ["k", "wo"])],
)
def test_there_and_back_with_the_same_logits(kind: str, targets: list[str] | None, tiny: Tiny, tmp_path: Path) -> None:
    """PEFT's weights give PEFT's logits here; and what a run exports gives its logits in PEFT."""
    base = model_class(read_config(str(tiny(kind)))).from_pretrained(tiny(kind)).eval()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    saved = get_peft_model(base, config).eval()
    saved.save_pretrained(str(tmp_path / "peft"))
    flags = [f"--model.name={tiny(kind)}", "--prompt.method=lora", "--prompt.lora.rank=3", "--prompt.lora.alpha=5"]
    flags += ["--federation.rounds=0", "--task.max_test=100", f"--prompt.init={tmp_path / 'peft'}"]
    flags += [] if targets is None else [f"--prompt.lora.targets={json.dumps(targets)}"]
    run_here(tmp_path / "run", *flags)
    prompt = load_prompt(tmp_path / "run")
    table, ours, label_ids = _ours(prompt)
    backbone = prompt._model[1]
    theirs = _theirs(saved, backbone.family, table, 0, backbone._decoder_ids)[:, label_ids].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with saved.disable_adapter():
        plain = _theirs(saved, backbone.family, table, 0, backbone._decoder_ids)[:, label_ids].numpy()
    assert np.abs(ours - plain).max() > 1e-3
    base = model_class(read_config(str(tiny(kind)))).from_pretrained(tiny(kind)).eval()
    loaded = PeftModel.from_pretrained(base, str(export(tmp_path / "run", tmp_path / "adapter"))).eval()
    again = _theirs(loaded, backbone.family, table, 0, backbone._decoder_ids)[:, label_ids].numpy()
    np.testing.assert_allclose(again, theirs, atol=1e-5)


def test_a_frozen_a_is_not_sent_but_exported(tiny: Tiny, tmp_path: Path) -> None:
    """The vector is B alone; what is exported has the logits of a run's own model in PEFT."""
    flags = [f"--model.name={tiny('bert')}", *FREEZE_A, *SHORT, "--client.lr=0.1"]
    for seed in (0, 1):
        run_here(tmp_path / str(seed), *flags, f"--seed={seed}")
    prompts = [load_prompt(tmp_path / str(seed)) for seed in (0, 1)]
    prompt, named = prompts[0], prompts[0].named
    for name, values in prompts[1].named.items():
        assert np.array_equal(values, named[name]) == name.endswith("lora_A")
    assert prompt.vector.size == sum(values.size for name, values in named.items() if name.endswith("lora_B"))
    table, ours, label_ids = _ours(prompt)
    base = model_class(read_config(str(tiny("bert")))).from_pretrained(tiny("bert")).eval()
    loaded = PeftModel.from_pretrained(base, str(export(tmp_path / "0", tmp_path / "adapter"))).eval()
    theirs = _theirs(loaded, "masked", table, 0, torch.zeros(0))[:, label_ids].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(SettingsError, match="A is drawn, not read"):
        run_here(tmp_path / "again", *flags, f"--prompt.init={tmp_path / 'adapter'}")
    both = [flag for flag in flags if "freeze_a" not in flag]  # of half the rank A and B have as many parameters
    with pytest.raises(SettingsError, match=r"lora_A as \(8, 32\), but method lora .* as \(4, 32\)"):
        run_here(tmp_path / "again", *both, "--prompt.lora.rank=4", f"--prompt.init={tmp_path / '0'}")
    keys = '--prompt.lora.targets=["key"]'  # half as many matrices, of A and B
    with pytest.raises(SettingsError, match=r"self\.key\.lora_A as nothing, but"):
        run_here(tmp_path / "again", *both, keys, f"--prompt.init={tmp_path / '0'}")


def test_a_client_of_a_smaller_rank_trains_its_own_rows_alone(tiny: Tiny) -> None:
    config = PromptConfig(method="lora", lora=LoRAConfig(rank=4, ranks=[1, 4]))
    model = model_class(read_config(str(tiny("bert")))).from_pretrained(tiny("bert"))
    method = make_method(config, geometry_of(model.config, model), model)
    vectors = torch.ones(3, method.layout.size)
    method.restrict(vectors, [2, 5, 4])
    for client, rank in zip(vectors, (1, 4, 1), strict=True):
        for name, values in method.layout.views(client).items():
            own, others = values.split([rank, 4 - rank], dim=0 if name.endswith("lora_A") else 1)
            assert own.all()
            assert not others.any()
    (client, _, _) = method.leaves(vectors)
    for a, b in method.inject([client]).low_rank.values():
        (b @ a).square().sum().backward()
    for name, values in client.items():
        assert values.grad is not None
        own, others = values.grad.split([1, 3], dim=0 if name.endswith("lora_A") else 1)
        assert own.all()
        assert not others.any()


def test_a_resumed_run_of_products_is_the_same(tmp_path: Path) -> None:
    flags = ["--prompt.method=lora", "--prompt.lora.rank=2", "--prompt.lora.aggregation=product", *SHORT]
    for name, parts in (("whole", [2]), ("parts", [1, 2])):
        for rounds in parts:
            resume = [f"--output.resume={'true' if rounds > parts[0] else 'false'}"]
            rounds_file = tmp_path / name / "rounds.jsonl"
            before = rounds_file.read_text().splitlines()[0] if rounds_file.exists() else ""
            run_here(tmp_path / name, *flags, *resume, f"--federation.rounds={rounds}", "--client.schedule=constant")
            assert rounds_file.read_text().startswith(before)  # with its times: it has not begun anew
    whole, parts = (load_prompt(tmp_path / name).vector for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)


def test_a_run_averages_products(tmp_path: Path) -> None:
    """The factors of the result are balanced, averaged ones are not; rounds and summary say how far off it is."""
    gaps = {}
    for how in ("factors", "product"):
        flags = ["--prompt.method=lora", "--prompt.lora.rank=2", f"--prompt.lora.aggregation={how}", "--client.lr=0.01"]
        summary = run_here(tmp_path / how, *flags, *SHORT)
        named = load_prompt(tmp_path / how).named
        pairs = [(named[name], named[name[:-1] + "B"]) for name in named if name.endswith("lora_A")]
        gaps[how] = max(float(np.abs(a @ a.T - b.T @ b).max()) for a, b in pairs)
        errors = [line["lora_error"] for line in read_rounds(tmp_path / how)]
        assert errors[0] is None
        assert summary["lora_error"] == pytest.approx(np.mean(errors[1:]))
        assert 0 < summary["lora_error"] < 1
    assert gaps["product"] < 1e-5 < 1e-3 < gaps["factors"]
    run_here(tmp_path / "unmeasured", "--prompt.method=lora", *SHORT, "--output.lora_error=false")
    assert [line["lora_error"] for line in read_rounds(tmp_path / "unmeasured")] == [None] * 2


@pytest.mark.parametrize(
    "method",
    [["lora"], ["bitfit"], ["lora", "--prompt.lora.ranks=[2, 8]", "--client.proximal=0.1"], ["lora", *FREEZE_A[1:]]],
)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_clients_in_one_pass_train_as_one_by_one(kind: str, method: list[str], tiny: Tiny, tmp_path: Path) -> None:
    vectors = []
    for batched in (1, 10):
        flags = [f"--model.name={tiny(kind)}", f"--client.batched={batched}"]
        flags += [f"--prompt.method={method[0]}", *method[1:]]
        run_here(tmp_path / str(batched), *flags, *SHORT, "--client.optimizer=sgd", "--client.lr=1")
        vectors.append(load_prompt(tmp_path / str(batched)).vector)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    first = run_here(tmp_path / "before", *flags, "--federation.rounds=0", "--task.max_test=8")
    assert first["parameters"] == len(vectors[0])
    assert np.abs(vectors[0] - load_prompt(tmp_path / "before").vector).max() > 1e-3


@pytest.mark.parametrize(("kind", "method"), [("bert", "lora"), ("gpt2", "lora"), ("t5", "lora"), ("bert", "bitfit")])
def test_activations_computed_again_are_the_same(kind: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    """A layer's second pass adds what its first one did, though the forward pass is over."""
    vectors = []
    for again in ("true", "false"):
        flags = [f"--model.name={tiny(kind)}", f"--prompt.method={method}", f"--model.checkpoint_activations={again}"]
        run_here(tmp_path / again, *flags, *SHORT, "--client.optimizer=sgd", "--client.lr=1")
        vectors.append(load_prompt(tmp_path / again).vector)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert np.isfinite(vectors[0]).all()


def test_each_second_pass_adds_what_its_own_first_one_did() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    adapting, given = Adapting(model), torch.randn(5, 4)
    factors = [(torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 3, 2, requires_grad=True)) for _ in range(2)]

    def gradients(forward: Any) -> list[torch.Tensor]:
        sums = []
        for pair in factors:  # both go forward before one is computed again
            with adapting.adding({"0": pair}, {}, None, 5):
                sums.append(forward(given).square().sum())
        return list(torch.autograd.grad(torch.stack(sums).sum(), [part for pair in factors for part in pair]))

    again = functools.partial(checkpoint, model, use_reentrant=False, context_fn=adapting.both_passes)
    for ours, theirs in zip(gradients(again), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bitfit_trains_biases_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Untrained, it is the model; its parameters are the model's own biases."""
    flags = [f"--model.name={tiny('bert')}", "--prompt.method=bitfit", "--federation.rounds=0", "--task.max_test=100"]
    run_here(tmp_path / "run", *flags)
    prompt = load_prompt(tmp_path / "run")
    model = model_class(read_config(str(tiny("bert")))).from_pretrained(tiny("bert")).eval()
    named = dict(model.named_parameters())
    for name, values in prompt.named.items():
        np.testing.assert_array_equal(values, named[name].detach().numpy())
    assert {name for name in named if name.endswith(".bias")} - set(prompt.named) == {"cls.predictions.bias"}
    table, ours, label_ids = _ours(prompt)
    theirs = _theirs(model, "masked", table, 0, torch.zeros(0))[:, label_ids].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(SettingsError, match="PEFT has nothing for biases alone"):
        export(tmp_path / "run", tmp_path / "adapter")


WRONG = {
    "a rank of 0": (["--prompt.lora.rank=0"], "prompt.lora.rank is 0"),
    "a rank above the matrix": (["--prompt.lora.rank=500"], r"prompt.lora.rank is 500, but bert\.encoder.*at most"),
    "a target that is not there": (["--prompt.lora.targets=[\"nosuch\"]"], "names 'nosuch', which the model does not"),
    "no target": (["--prompt.lora.targets=[]"], r"prompt.lora.targets is \[\]"),
    "a target that is no matrix": (["--prompt.lora.targets=[\"attention\"]"], "is no matrix"),
    "no biases": (["--prompt.method=bitfit", "--model.name={t5}"], "has no biases"),
    "the example filter": (["--federation.filter_round=1"], "prompt.method is lora: leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_message(what: str, tiny: Tiny, tmp_path: Path) -> None:
    flags, message = WRONG[what]
    named = [flag.format(t5=tiny("t5")) for flag in flags]
    with pytest.raises(SettingsError, match=message):
        run_here(tmp_path / "run", f"--model.name={tiny('bert')}", "--prompt.method=lora", *named)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_kind_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = model_class(read_config(str(tiny("bert")))).from_pretrained(tiny("bert"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["key"])).save_pretrained(str(tmp_path / "peft"))
    flags = [f"--model.name={tiny('bert')}", "--prompt.method=lora", f"--prompt.init={tmp_path / 'peft'}"]
    for more, message in (
        ([], "has r 2 and lora_alpha 8, but prompt.lora.rank is 8"),
        (["--prompt.lora.rank=2"], "is of other modules than prompt.lora.targets: it has no bert"),
        (["--prompt.method=soft"], "is a PEFT adapter of type LORA"),
    ):
        with pytest.raises(SettingsError, match=re.escape(message)):
            run_here(tmp_path / "run", *flags, *more)
