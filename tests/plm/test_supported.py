"""Every model type of transformers works with a method as the plain model does, or is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.plm import examine, supported
from fedprompt_mpi.plm.hugging_face import read_config
from fedprompt_mpi.rules import registry


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    caplog.set_level("CRITICAL")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", examine.model_types())
def test_a_model_type_is_as_the_table_says(model_type: str) -> None:
    """Made anew by `python -m launch.make_supported`; a type that a newer transformers brings is missing here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = examine.examine_type(model_type)
    finally:
        torch.set_num_threads(threads)
    table = supported._table()
    if table["transformers"] != supported._version():
        pytest.skip(f"the table is of transformers {table['transformers']}: {found}")
    known = table["types"][model_type]
    assert {method for method, reason in found.items() if reason} == set(known), (found, known)


def test_the_guide_has_the_table() -> None:
    types = supported._table()["types"]
    whole = {name: {method: found.get(method, "") for method in registry.methods} for name, found in types.items()}
    guide = (Path(supported.__file__).parent / "README.md").read_text()
    assert supported.format_table(whole) in guide
    assert f"All {len(types)} model types" in guide


def test_the_families_that_people_use_work() -> None:
    types = supported._table()["types"]
    for name in (
        "bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "camembert", "modernbert", "gpt2",
        "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "opt", "t5", "mt5",
    ):  # fmt: skip
        assert set(types[name]) <= {"bitfit"}, (name, types[name])
        assert "no biases" in types[name].get("bitfit", "no biases")
    for name in ("mpnet", "deberta-v2", "bloom", "gemma2"):
        assert set(types[name]) - {"bitfit"} == {"prefix"}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "llama"])
def test_a_model_that_is_in_order(kind: str, tiny: Callable[[str], Path]) -> None:
    expected = dict.fromkeys(registry.methods, "")
    if kind in ("t5", "llama"):
        expected["bitfit"] = f"a {kind} model has no biases, which prompt.method bitfit trains"
    assert examine.examine(read_config(str(tiny(kind)))) == expected


def test_a_trial_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Path]) -> None:
    """Wrong logits, wrong positions of virtual tokens, and gradients that do not arrive."""
    config = read_config(str(tiny("gpt2")))
    right = examine.Backbone._logits

    def spoiled(self: examine.Backbone, embeddings: torch.Tensor, mask: torch.Tensor, *rest: object) -> torch.Tensor:
        if mask.shape[1] > max(examine.LENGTHS):  # virtual tokens, at the wrong end
            embeddings = embeddings.roll(-examine.V, dims=1)
        return right(self, embeddings, mask, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(examine.Backbone, "_logits", spoiled)
    found = examine.examine(config)
    assert "logits with virtual tokens are not those of the plain model" in found["soft"]
    assert found["full"] == ""
    monkeypatch.setattr(examine.Backbone, "_logits", lambda self, *a: right(self, *a).detach().requires_grad_())
    assert "gradients do not reach" in examine.examine(config)["soft"]
    monkeypatch.setattr(examine.Backbone, "_logits", lambda self, *a: 1.001 * right(self, *a))
    assert "the label words' logits are not those of the plain model" in examine.examine(config)["prefix"]


def test_who_is_not_supported_is_refused_by_name() -> None:
    from transformers import BloomConfig

    supported.check_supported(BloomConfig(), "soft", "mine")
    words = r"prompt\.method prefix .* model\.name 'mine', of type bloom: .*take prompt\.method soft or p_tuning"
    with pytest.raises(SettingsError, match=words):
        supported.check_supported(BloomConfig(), "prefix", "mine")
