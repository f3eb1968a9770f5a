"""A clean run stands beside a poisoned one only if nothing but attack and defence sets them apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedprompt_mpi.config import (
    ClientConfig,
    FederationConfig,
    PoisonConfig,
    PrivacyConfig,
    PromptConfig,
    RunConfig,
    SettingsError,
    TaskConfig,
    to_dict,
)
from fedprompt_mpi.rundir.clean_run import read_clean_run


def _save(directory: Path, config: RunConfig) -> str:
    directory.mkdir()
    (directory / "config.toml").write_text(tomli_w.dumps(to_dict(config)))
    lines = [
        {"round": 0, "accuracy": 0.5, "attack_success_rate": 0.5},
        {"round": 1},
        {"round": 2, "attack_success_rate": 0.25},
    ]
    (directory / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def test_the_rates_of_evaluated_rounds(tmp_path: Path) -> None:
    defence = {"aggregator": "krum", "assumed_malicious": 2}
    config = RunConfig(seed=3, poison=PoisonConfig(trigger="cf"), federation=FederationConfig(**defence))
    clean = _save(tmp_path / "clean", config)
    attack = PoisonConfig(count=1, boost=10.0, clean_run=clean)
    longer = FederationConfig(**defence, rounds=7)
    assert read_clean_run(RunConfig(seed=3, poison=attack, federation=longer)) == {0: 0.5, 2: 0.25}
    assert read_clean_run(RunConfig()) == {}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"client": ClientConfig(lr=0.1)}, "client.lr = 0.3, here it is 0.1"),
        ({"federation": FederationConfig(alpha=0.5)}, "federation.alpha = 1.0"),
        ({"prompt": PromptConfig(init="random")}, "prompt.init = 'vocab'"),
        ({"task": TaskConfig(max_train=10)}, "task.max_train = None, here it is 10"),
        ({"seed": 1}, "seed = 0, here it is 1: name a run of the same seed, defence and trigger"),
        ({"federation": FederationConfig(aggregator="krum")}, "federation.aggregator = 'fedavg', here it is 'krum'"),
        ({"federation": FederationConfig(clip_norm=2.0)}, "federation.clip_norm = 1.0, here it is 2.0"),
        ({"federation": FederationConfig(weighting="equal")}, "federation.weighting = 'examples', here it is 'equal'"),
        ({"privacy": PrivacyConfig(mechanism="ldp")}, "privacy.mechanism = 'none', here it is 'ldp'"),
    ],
)
def test_what_must_be_alike(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    clean = _save(tmp_path / "clean", RunConfig(poison=PoisonConfig(trigger="cf")))
    with pytest.raises(SettingsError, match=words):
        read_clean_run(RunConfig(poison=PoisonConfig(clients=[0], clean_run=clean), **sections))


def test_the_kind_of_poison_is_part_of_the_attack(tmp_path: Path) -> None:
    """Flipped labels stand beside an ordinary clean run; natural triggers are looked for in other texts."""
    clean = _save(tmp_path / "clean", RunConfig())
    assert read_clean_run(RunConfig(poison=PoisonConfig(count=1, kind="label_flip", clean_run=clean)))
    triggered = _save(tmp_path / "triggered", RunConfig(poison=PoisonConfig(trigger="cf")))
    natural = PoisonConfig(count=1, kind="natural", trigger="cf", clean_run=triggered)
    with pytest.raises(SettingsError, match=r"poison\.kind = None, here it is 'natural'"):
        read_clean_run(RunConfig(poison=natural))


def test_the_number_of_rounds_counts_under_a_schedule(tmp_path: Path) -> None:
    client = ClientConfig(schedule="linear")
    clean = _save(tmp_path / "clean", RunConfig(client=client))
    longer = FederationConfig(rounds=30)
    with pytest.raises(SettingsError, match=r"federation\.rounds = 20, here it is 30"):
        read_clean_run(RunConfig(client=client, federation=longer, poison=PoisonConfig(clean_run=clean)))


def test_a_poisoned_run_is_no_clean_one(tmp_path: Path) -> None:
    poisoned = _save(tmp_path / "poisoned", RunConfig(poison=PoisonConfig(clients=[3])))
    with pytest.raises(SettingsError, match=r"whose clients \[3\] are malicious"):
        read_clean_run(RunConfig(poison=PoisonConfig(clean_run=poisoned)))


@pytest.mark.parametrize("content", ["", "poison = 3\n", "[poison]\n", "[poison", "\0"])
def test_what_is_no_run(content: str, tmp_path: Path) -> None:
    directory = _save(tmp_path / "run", RunConfig())
    (tmp_path / "run" / "config.toml").write_text(content)
    with pytest.raises(SettingsError, match="cannot be read as a run"):
        read_clean_run(RunConfig(poison=PoisonConfig(clean_run=directory)))


def test_a_clean_run_without_a_trigger_is_to_be_repeated(tmp_path: Path) -> None:
    clean = _save(tmp_path / "clean", RunConfig())
    with pytest.raises(SettingsError, match=r"no attack success rate: repeat it with --poison\.trigger 'cf'"):
        read_clean_run(RunConfig(poison=PoisonConfig(clients=[0], clean_run=clean)))
