"""The example filter in a run: its gradients, what it finds, that it is kept, and bad input."""

import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt_mpi import load_prompt, run
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import ClientConfig, FederationConfig, PrivacyConfig, PromptConfig, RunConfig, SettingsError
from fedprompt_mpi.federation.client_training import Job, Trainer, train
from fedprompt_mpi.federation.example_gradients import SortedExamples, example_gradients
from fedprompt_mpi.federation.example_verdicts import Traffic, part_in_two
from fedprompt_mpi.federation.federation import Federation
from fedprompt_mpi.federation.updates import LocalUpdates
from fedprompt_mpi.liveness.stop import Stopped
from fedprompt_mpi.report.page import write_report
from fedprompt_mpi.text.batches import collate
from tests.federation.test_client_training import Tiny, _setup
from tests.jobs import REPOSITORY, run_here

SPREAD = [
    f"--config={REPOSITORY / 'launch' / 'recipes' / 'backdoor-embedded.toml'}", "--poison.count=0",
    "--poison.clients=all", "--poison.rate=0.1", "--poison.trigger=cf", "--poison.position=head", "--client.steps=40",
    "--client.batch_size=8", "--client.lr=0.1", "--client.schedule=constant", "--federation.rounds=4",
    "--federation.filter_round=4", "--output.evaluate_every=4", "--output.evaluate_clients=false",
    "--output.report=false",
]  # fmt: skip
LAVISH = ["--federation.filter_cosine=0.95", "--federation.filter_counterpart=9"]
"""With these the filter leaves out what is no poison too."""
NOTHING = ["--federation.filter_cosine=-1", "--federation.filter_counterpart=0"]


@pytest.mark.parametrize("method", ["soft", "p_tuning", "prefix"])
def test_gradients_are_those_of_one_example_at_a_time(method: str, tiny: Tiny) -> None:
    """A step of SGD at a rate of 1 on one example leads against its gradient."""
    corpus, backbone, made, vector = _setup(tiny("bert"), method)
    config = RunConfig(prompt=PromptConfig(method=method, num_virtual_tokens=4, prefix_hidden_size=8))  # pyright: ignore
    setup: Any = types.SimpleNamespace(
        config=config, corpus=corpus, backbone=backbone, method=made, channel=LocalChannel()
    )
    rows = corpus.client_rows(3)[:5]
    found = example_gradients(setup, vector, rows)
    client = ClientConfig(steps=1, optimizer="sgd", lr=1.0, clip_norm=None)
    trainer = Trainer(
        backbone=backbone, method=made, config=client, make_batch=lambda chosen: collate(corpus.train, chosen)
    )
    for row, gradient in zip(rows, found, strict=True):
        (delta,) = train(trainer, vector, [Job(client=0, steps=[np.array([row])])]).deltas
        named = {name: view.numpy() for name, view in made.layout.views(torch.from_numpy(delta.copy())).items()}
        np.testing.assert_allclose(gradient, -named["virtual_tokens"], rtol=1e-4, atol=1e-6)


def test_spread_poison_is_found_and_the_backdoor_forgotten(tmp_path: Path) -> None:
    """The whole story on the embedded PLM: without the filter the ASR is at 100 % (launch/results/README.md)."""
    summary = run(parse_settings([*SPREAD, f"--output.dir={tmp_path / 'run'}"]))
    record = json.loads((tmp_path / "run" / "filtered.json").read_text())
    assert record["poisoned"] == 100 and record["examples"] == 2100
    assert record["recall"] >= 0.9 and sum(len(part["examples"]) for part in record["left_out"]) < 300
    assert (summary["filter_recall"], summary["filter_precision"]) == (record["recall"], record["precision"])
    assert summary["attack_success_rate"] <= 0.1 and summary["accuracy"] >= 0.95
    assert "Before round 4 the example filter leaves out" in write_report(tmp_path / "run").read_text()
    frequencies = 10 * 64  # half of 20 x 128
    in_two = 5 * 10 * 2 * 2 * 8 * (frequencies + 1)  # sums of two parts of two labels, of 10 clients, five times
    sums = 10 * 2 * 8 * frequencies + in_two + 10 * 2 * 10 * 8  # of labels, of parts, how many of each client are odd
    groups, rest = divmod(record["bytes_up"] - sums, 16 + 4 * frequencies)
    assert rest == 0 and 20 <= groups <= 160 and record["bytes_down"] == groups + sums


@pytest.mark.parametrize(("filter_round", "restart"), [(2, "true"), (3, "false"), (3, "true")])
def test_what_is_left_out_stays_out_when_a_run_goes_on(filter_round: int, restart: str, tmp_path: Path) -> None:
    """To the bit, from after round 2: the filter has done its work then, or has not and does it again."""
    flags = [*LAVISH, "--poison.clients=all", "--federation.rounds=3"]
    flags += [f"--federation.filter_round={filter_round}", f"--federation.filter_restart={restart}"]
    run_here(tmp_path / "straight", *flags)
    record = json.loads((tmp_path / "straight" / "filtered.json").read_text())
    assert record["left_out"]
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoint" / "round-00000003.safetensors").unlink()
    if filter_round == 3:
        (tmp_path / "stopped" / "filtered.json").write_text("of a job that got further")
    run_here(tmp_path / "stopped", *flags, "--output.resume=true")
    assert load_prompt(tmp_path / "stopped").vector.tobytes() == load_prompt(tmp_path / "straight").vector.tobytes()
    again = json.loads((tmp_path / "stopped" / "filtered.json").read_text())
    assert again["left_out"] == record["left_out"]


@pytest.mark.parametrize(("flags", "again"), [(LAVISH, True), (NOTHING, False)])
def test_the_prompt_begins_again(
    flags: list[str], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the vector of before round 1, if anything is left out."""
    begun, train = [], Federation.train

    def watch(federation: Federation, *round_: Any) -> LocalUpdates:
        begun.append(federation.server.vector.copy())
        return train(federation, *round_)

    monkeypatch.setattr(Federation, "train", watch)
    more = ["--federation.filter_round=2", "--federation.filter_restart=true", "--poison.clients=all"]
    run_here(tmp_path, *flags, *more)
    first, second = begun
    assert (first.tobytes() == second.tobytes()) == again
    assert json.loads((tmp_path / "filtered.json").read_text())["restarted"] == again


def test_a_stop_after_the_prompt_has_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the round that trains from the first prompt: the run goes on to the same result, though its init is gone."""
    run_here(tmp_path / "init", "--federation.rounds=1", "--seed=5")
    flags = [*LAVISH, "--poison.clients=all", "--federation.filter_round=2", "--federation.filter_restart=true"]
    flags += [f"--prompt.init={tmp_path / 'init'}", "--output.checkpoint_every=3", "--federation.rounds=3"]
    run_here(tmp_path / "straight", *flags)

    def stop(federation: Federation, cohort: Any, round_: int) -> LocalUpdates:
        if round_ == 2:
            federation.phases.liveness.stop.request()
        return train(federation, cohort, round_)

    train = Federation.train
    with monkeypatch.context() as patched:
        patched.setattr(Federation, "train", stop)
        with pytest.raises(Stopped, match="after round 1"):
            run_here(tmp_path / "stopped", *flags)
    shutil.rmtree(tmp_path / "init")
    run_here(tmp_path / "stopped", *flags, "--output.resume=true")
    assert load_prompt(tmp_path / "stopped").vector.tobytes() == load_prompt(tmp_path / "straight").vector.tobytes()
    again, straight = (json.loads((tmp_path / name / "filtered.json").read_text()) for name in ("stopped", "straight"))
    assert again["left_out"] == straight["left_out"] != []


@pytest.mark.parametrize(("apart", "grows"), [(0.0, False), (6.0, True)])
def test_what_is_odd_grows_only_to_an_edge(apart: float, grows: bool) -> None:
    """Ten clients, a tenth of whose examples lie apart from the others, or do not; the filter found most of them."""
    rng, odd_ones = np.random.default_rng(0), np.arange(200) < 20
    own = []
    for client in range(10):
        points = rng.normal(size=(200, 25)).astype(np.float32)
        points[odd_ones, 0] += apart
        own.append(
            SortedExamples(
                client=client, label=0, rows=np.zeros(0), coordinates=points, axes=np.eye(25, dtype=np.float32),
                groups=np.zeros(0), means=np.zeros(0), is_odd=np.arange(200) < 13,
            )
        )  # fmt: skip
    setup: Any = types.SimpleNamespace(
        channel=LocalChannel(), corpus=types.SimpleNamespace(label_words=["bad", "good"]),
        config=RunConfig(prompt=PromptConfig(num_virtual_tokens=10)),
        backbone=types.SimpleNamespace(geometry=types.SimpleNamespace(embedding_width=10)),
    )  # fmt: skip
    part_in_two(setup, own, Traffic(clients=10))
    found = np.stack([part.is_odd for part in own])
    if grows:
        assert found[:, odd_ones].mean() > 0.98 and found[:, ~odd_ones].mean() < 0.01
    else:
        assert (found == (np.arange(200) < 13)).all()


def test_a_record_that_names_others_examples_is_refused(tmp_path: Path) -> None:
    flags = ["--federation.filter_round=1", "--federation.rounds=1"]
    run_here(tmp_path, *flags)
    file = tmp_path / "filtered.json"
    for client, examples, message in (
        (10, [0], "left_out names client 10"),
        (1, [0, 12], "left_out names examples that client 1 does not have"),
        (1, list(range(12)), "left_out names all examples of client 1"),
        (1, [*range(6), *range(12)], "left_out names all examples of client 1"),
    ):
        record, halves = json.loads(file.read_text()), (examples[:6], examples[6:])
        file.write_text(json.dumps({**record, "left_out": [{"client": client, "examples": half} for half in halves]}))
        with pytest.raises(SettingsError, match=message):
            run_here(tmp_path, *flags, "--output.resume=true")
    file.unlink()
    with pytest.raises(SettingsError, match=r"output\.resume: there is no .*filtered\.json"):
        run_here(tmp_path, *flags, "--output.resume=true")


def test_what_it_needs() -> None:
    with pytest.raises(SettingsError, match=r"filter_round is 3 but federation\.rounds is 2: filter"):
        FederationConfig(filter_round=3, rounds=2)
    with pytest.raises(SettingsError, match=r"filter_restart is true, but federation\.filter_round is not given"):
        FederationConfig(filter_restart=True)
    with pytest.raises(SettingsError, match=r"gradients of a prompt, but prompt\.method is full"):
        RunConfig(federation=FederationConfig(filter_round=1), prompt=PromptConfig(method="full"))
    with pytest.raises(SettingsError, match=r"without noise, but privacy\.mechanism is ldp"):
        RunConfig(federation=FederationConfig(filter_round=1), privacy=PrivacyConfig(mechanism="ldp"))


def test_a_request_to_stop_gives_the_filter_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next pass; the rounds before are saved, and the run goes on from there to the same result."""
    flags = ["--federation.filter_round=2", *LAVISH, "--poison.clients=all"]
    run_here(tmp_path / "straight", *flags)
    passes = []

    def stop(setup: Any, vector: Any, rows: np.ndarray) -> np.ndarray:
        passes.append(rows)
        setup.channel.phases.liveness.stop.request()
        return example_gradients(setup, vector, rows)

    with monkeypatch.context() as patched:
        patched.setattr("fedprompt_mpi.federation.example_gradients.example_gradients", stop)
        with pytest.raises(Stopped, match="after round 1"):
            run_here(tmp_path / "stopped", *flags)
    assert len(passes) == 1 and not (tmp_path / "stopped" / "filtered.json").exists()
    run_here(tmp_path / "stopped", *flags, "--output.resume=true")
    assert load_prompt(tmp_path / "stopped").vector.tobytes() == load_prompt(tmp_path / "straight").vector.tobytes()


def test_who_attacks_does_not_obey(tmp_path: Path) -> None:
    """Clients 0 to 4 boost their updates: they keep what they are told to leave out."""
    flags = ["--federation.filter_round=2", *LAVISH, "--poison.clients=[0, 1, 2, 3, 4]"]
    for name, boost in (("plain", 1), ("boosted", 2)):
        run_here(tmp_path / name, *flags, f"--poison.boost={boost}")
    plain, boosted = (
        [part["client"] for part in json.loads((tmp_path / name / "filtered.json").read_text())["left_out"]]
        for name in ("plain", "boosted")
    )
    assert boosted and min(boosted) > 4
    assert min(plain) <= 4
