"""The attacks of an audit, in runs of the embedded model: they succeed where they must, and fail where they must."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi import SettingsError, load_prompt
from fedprompt_mpi.federation import auditor, rank_training
from fedprompt_mpi.federation.rank_training import steps_of
from fedprompt_mpi.federation.setup import Setup
from tests.jobs import find_mpirun, read_rounds, run_here, run_program

AUDIT = (
    "--task.max_train=400", "--task.max_test=200", "--federation.rounds=1", "--client.batched=1",
    "--privacy.audit_texts=50", "--privacy.audit_words=20", "--privacy.shadow_clients=10", "--output.evaluate_every=9",
)  # fmt: skip
ONE = ("--client.steps=1", "--client.batch_size=1")
FULL = ("--prompt.method=full", "--client.lr=5e-5")


def _attacks(*names: str) -> str:
    return f"--privacy.audit={json.dumps(names)}"


def _audit(directory: Path, *flags: str) -> dict[str, Any]:
    """Return audit.json of a run, its figures by view, attack, statistic and name."""
    run_here(directory, *AUDIT, *flags)
    record = json.loads((directory / "audit.json").read_text())
    record["by"] = {
        (leak["view"], leak["attack"], leak["by"], name): figure
        for leak in record["leaks"]
        for name, figure in leak["figures"].items()
    }
    return record


def _holds(figure: dict[str, Any], value: float) -> bool:
    return figure["low"] <= value <= figure["high"]


def test_a_whole_model_gives_all_words_of_one_step_of_one_text(tmp_path: Path) -> None:
    found = _audit(tmp_path / "run", *FULL, *ONE, _attacks("tokens", "labels", "membership"))["by"]
    for name in ("recall", "precision"):
        assert found["server", "tokens", "rows that moved", name]["value"] == 1
    assert found["server", "labels", "gradients of classes", "recall"]["value"] == 1
    assert found["server", "membership", "calibrated inner product", "auc"]["value"] > 0.95
    assert found["server", "membership", "likelihood ratio", "auc"]["value"] > 0.95


def test_a_prompt_tells_the_label_and_the_text_of_one_step_of_one_text(tmp_path: Path) -> None:
    many = ("--privacy.audit_texts=100", "--privacy.shadow_clients=24")
    found = _audit(tmp_path / "run", *ONE, *many, _attacks("labels", "membership"))["by"]
    assert found["server", "labels", "gradients of classes", "recall"]["value"] == 1
    member = found["server", "membership", "calibrated inner product", "auc"]
    assert member["value"] > 0.8 and not _holds(member, 0.5)


@pytest.mark.parametrize("method", ["soft", "lora", "prefix"])
def test_loud_noise_takes_every_attack_to_chance(method: str, tmp_path: Path) -> None:
    noise = ("--privacy.mechanism=ldp", "--privacy.laplace_scale=1000")
    record = _audit(
        tmp_path / "run", *ONE, *noise, f"--prompt.method={method}", _attacks("tokens", "labels", "membership")
    )
    auc = {key: figure for key, figure in record["by"].items() if key[-1] == "auc" and key[0] == "server"}
    assert len(auc) == 5
    for key, figure in auc.items():
        assert _holds(figure, figure["chance"]), (key, figure)
    labels = record["by"]["server", "labels", "gradients of classes", "recall"]
    assert _holds(labels, labels["chance"])


def test_texts_that_were_never_used_are_no_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attacks, told that each upload was trained on the texts of the next client."""
    whole = "--client.steps=1", "--client.batch_size=4"

    def of_the_next(setup: Setup, client: int, round_: int) -> list[np.ndarray]:
        return steps_of(setup, (client + 1) % setup.config.federation.clients, round_)

    monkeypatch.setattr(auditor, "steps_of", of_the_next)
    found = _audit(tmp_path / "run", *whole, _attacks("membership", "labels"))["by"]
    for by in ("inner product", "calibrated inner product", "loss", "likelihood ratio"):
        assert _holds(found["server", "membership", by, "auc"], 0.5), by


def test_the_audit_changes_nothing(tmp_path: Path) -> None:
    _audit(tmp_path / "audited", _attacks("tokens", "labels", "membership"))
    run_here(tmp_path / "plain", *AUDIT)
    assert load_prompt(tmp_path / "audited").vector.tobytes() == load_prompt(tmp_path / "plain").vector.tobytes()
    assert read_rounds(tmp_path / "audited")[1]["cohort"] == read_rounds(tmp_path / "plain")[1]["cohort"]


def test_under_secure_aggregation_the_server_sees_the_sum_before_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of the server hides the step from clients, and from itself nothing; shadows have the same noise."""
    lengths: dict[str, tuple[float, float]] = {}
    look = auditor.Auditor._look

    def watch(self: auditor.Auditor, target: auditor.Target) -> None:
        both = target.uploads, target.all_shadows.deltas
        lengths[target.view] = tuple(float(np.linalg.norm(of, axis=1).mean()) for of in both)  # pyright: ignore
        look(self, target)

    monkeypatch.setattr(auditor.Auditor, "_look", watch)
    record = _audit(
        tmp_path / "run", "--privacy.secure_aggregation=true", "--federation.update_bound=50", *ONE,
        "--federation.noise_std=100", _attacks("labels"),
    )  # fmt: skip
    assert {seen["client"] for seen in record["observations"]} == {None}
    assert max(lengths["server"]) < 50 < 4000 < min(lengths["client"])


def test_the_truth_is_what_clients_train_on_after_the_example_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[tuple[int, int], list[int]] = {}
    audited: dict[tuple[int, int], list[int]] = {}
    make, look = rank_training.make_jobs, auditor.Auditor._look

    def watch_jobs(setup: Setup, cohort: Any, round_: int, attacks: Any) -> Any:
        jobs = make(setup, cohort, round_, attacks)
        trained.update({(round_, job.client): sorted(np.concatenate(job.steps).tolist()) for job in jobs})
        return jobs

    def watch_look(self: auditor.Auditor, target: auditor.Target) -> None:
        for client, rows in zip(target.clients, target.rows, strict=True):
            if client is not None:
                audited[target.round, client] = sorted(rows.tolist())
        look(self, target)

    monkeypatch.setattr(rank_training, "make_jobs", watch_jobs)
    monkeypatch.setattr(auditor.Auditor, "_look", watch_look)
    _audit(
        tmp_path / "run", "--federation.rounds=2", "--federation.clients=4", "--federation.filter_round=2",
        "--poison.clients=[0]", "--poison.rate=0.5", "--privacy.audit_rounds=2", _attacks("labels"),
    )  # fmt: skip
    assert len(audited) == 8 and audited == trained


def test_a_client_that_vanished_is_no_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[int]] = {}
    look = auditor.Auditor._look

    def watch(self: auditor.Auditor, target: auditor.Target) -> None:
        rows[target.view] = [len(own) for own in target.rows]
        look(self, target)

    monkeypatch.setattr(auditor.Auditor, "_look", watch)
    _audit(tmp_path / "run", *ONE, "--federation.dropout=0.4", _attacks("labels"))
    came = 10 - len(read_rounds(tmp_path / "run")[1]["vanished"])
    assert 0 < came < 10
    assert rows == {"server": [1] * came, "client": [came]}


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun")
def test_the_same_figures_on_any_number_of_ranks(tmp_path: Path) -> None:
    several = ("--client.steps=4", "--client.batch_size=8")
    assert run_program(3, tmp_path / "ranks", *AUDIT, *several, _attacks("labels", "membership")).status == 0
    alone = _audit(tmp_path / "alone", *several, _attacks("labels", "membership"))
    ranks = json.loads((tmp_path / "ranks" / "audit.json").read_text())
    key = ("attack", "by", "view", "client")
    theirs = {tuple(seen[name] for name in key): seen for seen in ranks["observations"]}
    assert len(theirs) == len(alone["observations"])
    for seen in alone["observations"]:
        other = theirs[tuple(seen[name] for name in key)]
        np.testing.assert_allclose(seen["scores"], other["scores"], rtol=1e-3, atol=1e-4)


def test_a_split_of_few_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the evaluation split needs 20 texts, but it has 12"):
        run_here(tmp_path / "run", *AUDIT, "--task.max_test=12", _attacks("labels"))


def test_a_stopped_audit_goes_on(tmp_path: Path) -> None:
    """Rounds that were attacked are kept, and those that follow are attacked."""
    flags = ("--federation.rounds=2", "--privacy.audit_rounds=2", *ONE, _attacks("labels"))
    whole = _audit(tmp_path / "whole", *flags)
    run_here(tmp_path / "parts", *AUDIT, *flags, "--federation.rounds=1")
    parts = _audit(tmp_path / "parts", *flags, "--output.resume=true")
    assert parts["observations"] == whole["observations"]
    assert parts["rounds"] == whole["rounds"] == [1, 2]
