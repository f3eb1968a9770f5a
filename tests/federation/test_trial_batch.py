"""What a model cannot do with the longest texts is one message, before a run directory is there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.plm.backbone import Backbone
from fedprompt_mpi.rundir.prompt import read_prompt
from tests.jobs import run_here


@pytest.mark.parametrize("method", ["soft", "prefix", "full"])
def test_a_model_that_fails_on_long_texts(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    score = Backbone.score

    def failing(self: Backbone, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if ids.shape[1] > 20:
            raise IndexError("index out of range in self")
        return score(self, ids, *rest)

    monkeypatch.setattr(Backbone, "score", failing)
    flags = (f"--prompt.method={method}", "--client.lr=0.001")
    words = (
        rf"model.name is 'embedded', which fails with prompt.method {method} on texts of \d+ tokens \(IndexError: index"
    )
    with pytest.raises(SettingsError, match=words):
        run_here(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 4 bytes")])
def test_too_little_memory_is_not_the_model_s_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Backbone, "score", failing)
    with pytest.raises(type(error)):
        run_here(tmp_path / "run")


def test_it_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits with it and without it, also where the model itself is trained."""
    for method in ("soft", "full"):
        flags = (f"--prompt.method={method}", "--client.lr=0.001", "--federation.rounds=1")
        run_here(tmp_path / method, *flags)
        with monkeypatch.context() as patch:
            patch.setattr("fedprompt_mpi.federation.trial_batch.try_longest", lambda *_: None)
            run_here(tmp_path / f"{method}-untried", *flags)
        vectors = [read_prompt(tmp_path / name)[0]["vector"] for name in (method, f"{method}-untried")]
        assert vectors[0].tobytes() == vectors[1].tobytes()
