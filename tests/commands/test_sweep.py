"""Sweeps run what is missing; and the paper's recipes are what their small table says."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi.comm.placement import own_processors
from fedprompt_mpi.commands.report import runs_in
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.commands.sweep import axis, recipe_flags, shared_cores
from fedprompt_mpi.config import SettingsError
from tests.jobs import REPOSITORY, SMALL, Finished, launch, read_rounds

PAPER = REPOSITORY / "launch" / "recipes" / "paper"


def _sweep(root: Path, *arguments: str) -> Finished:
    recipes = [str(root / "one.toml"), str(root / "two.toml")]
    flags = [f"--runs={root / 'runs'}", *SMALL, "--federation.rounds=1"]
    return launch(1, "-m", "fedprompt_mpi", "sweep", *recipes, *flags, *arguments)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Return a folder with two recipes."""
    (tmp_path / "one.toml").write_text("[client]\nlr = 0.2\n")
    (tmp_path / "two.toml").write_text("[prompt]\nnum_virtual_tokens = 3\n")
    return tmp_path


def test_what_is_done_is_skipped_and_what_was_cut_goes_on(recipes: Path) -> None:
    first = _sweep(recipes)
    assert first.status == 0, first
    begun, one, begun_too, two = [line.split(": ")[1] for line in first.out.splitlines()]
    assert (begun, begun_too) == ("begins", "begins")
    assert re.fullmatch(r"accuracy \d+\.\d\d %, \d+\.\d s; \d+ s left for all", one), one
    assert re.fullmatch(r"accuracy \d+\.\d\d %, \d+\.\d s", two), two
    before = (recipes / "runs" / "one" / "rounds.jsonl").read_bytes()
    (recipes / "runs" / "two" / "summary.json").unlink()
    second = _sweep(recipes)
    done, goes_on, _ = [line.split(": ")[1] for line in second.out.splitlines()]
    assert (done.split(",")[0], goes_on) == ("is done", "continues")
    assert (recipes / "runs" / "one" / "rounds.jsonl").read_bytes() == before
    assert (recipes / "runs" / "two" / "summary.json").exists()

    third = _sweep(recipes, "--federation.rounds=2")
    assert third.status == 2
    assert "one is done with other settings (federation.rounds)" in third.err


def test_lists_of_values_are_a_grid_and_the_folder_can_be_reported(tmp_path: Path) -> None:
    axes = ['--federation.aggregator=["fedavg", "median"]', "--poison.clients=[[], [0]]"]
    flags = [*SMALL, "--federation.rounds=1", "--client.steps=1", f"--runs={tmp_path / 'runs'}", "--jobs=2"]
    finished = launch(1, "-m", "fedprompt_mpi", "sweep", *flags, *axes, environment={"OMP_NUM_THREADS": None})
    assert finished.status == 0, finished
    names = {f"default-aggregator-{rule}-clients-{who}" for rule in ("fedavg", "median") for who in ("none", "0")}
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == names
    settings = tomllib.loads((tmp_path / "runs" / "default-aggregator-median-clients-0" / "config.toml").read_text())
    assert (settings["federation"]["aggregator"], settings["poison"]["clients"]) == ("median", [0])
    (rank,) = json.loads((tmp_path / "runs" / min(names) / "environment.json").read_text())["ranks"]
    assert rank["threads"] == max(1, len(own_processors()) // 2)  # both runs at a time share the cores
    inside = sorted((tmp_path / "runs").iterdir())  # runs/*, with their logs
    assert runs_in(tmp_path / "runs") == [run for path in inside for run in runs_in(path)]
    assert {run.name for run in runs_in(tmp_path / "runs")} == names
    with pytest.raises(SettingsError, match="none is in it"):
        runs_in(tmp_path / "runs" / "default-aggregator-median-clients-0" / "checkpoint")


def test_who_gets_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would take all of them, beside others; not a run of one thread, whose bits are the same everywhere."""
    monkeypatch.setattr("fedprompt_mpi.commands.sweep.own_processors", lambda: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usual, alone = parse_settings([]), parse_settings(["--client.batched=1"])
    assert shared_cores(usual, 3) == {"OMP_NUM_THREADS": "5"}
    assert shared_cores(usual, 40) == {"OMP_NUM_THREADS": "1"}
    assert shared_cores(usual, 1) == shared_cores(alone, 3) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert shared_cores(usual, 3) == {}


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("--client.lr=[0.1, 1]", ["--client.lr=0.1", "--client.lr=1"]),
        ("--task.labels=[1, 0]", ["--task.labels=[1, 0]"]),
        ('--task.label_words=[["bad"], ["good"]]', ['--task.label_words=[["bad"], ["good"]]']),
        ("--poison.trigger=[cf", ["--poison.trigger=[cf"]),
        ('--output.track=["mlflow"]', ['--output.track=["mlflow"]']),
        ('--task.data=["a/b", "c"]', ["--task.data=a/b", "--task.data=c"]),
    ],
)
def test_what_is_an_axis(setting: str, values: list[str]) -> None:
    assert [flag for _, flag in axis(setting)] == values


def test_data_are_those_of_the_task_of_each_run(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('[task]\nname = "sst2"\n')
    assert recipe_flags(tmp_path / "one.toml", 3, "D", ["--task.name=imdb"]) == [
        f"--config={tmp_path / 'one.toml'}", "--seed=3", "--task.data=D/imdb", "--task.name=imdb",
    ]  # fmt: skip
    assert recipe_flags(tmp_path / "one.toml", None, "D", [])[-1] == "--task.data=D/sst2"
    assert recipe_flags(None, None, "D", []) == ["--task.data=D/embedded"]


def test_seeds_and_a_failure_that_keeps_no_other_from_running(recipes: Path) -> None:
    (recipes / "two.toml").unlink()
    flags = [f"--runs={recipes / 'runs'}", *SMALL, "--federation.rounds=1", "--seeds=[3, 4]", "--launch=env THIS=that"]
    (recipes / "runs" / "one-seed3").mkdir(parents=True)
    (recipes / "runs" / "one-seed3" / "somebody's").touch()
    finished = launch(1, "-m", "fedprompt_mpi", "sweep", str(recipes / "one.toml"), *flags)
    assert finished.status == 2
    assert "one-seed3: exit status 2, see" in finished.out
    assert "is no file of a run" in (recipes / "runs" / "one-seed3.log").read_text()
    assert len(read_rounds(recipes / "runs" / "one-seed4")) == 2
    assert tomllib.loads((recipes / "runs" / "one-seed4" / "config.toml").read_text())["seed"] == 4


def test_it_stops_with_the_run_under_way_which_goes_on_later(recipes: Path) -> None:
    """SIGTERM reaches the run, which saves the round that is done."""
    flags = [f"--runs={recipes / 'runs'}", *SMALL, "--federation.rounds=100000", "--output.evaluate_every=100000"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "fedprompt_mpi", "sweep", str(recipes / "one.toml"), str(recipes / "two.toml"), *flags],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (recipes / "runs" / "one" / "checkpoint").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    printed, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 75
    assert "one: exit status 75" in printed
    assert "stopped on request" in (recipes / "runs" / "one.log").read_text()
    assert not (recipes / "runs" / "two").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/one.toml", "b/one.toml"], "two recipes are named 'one'"),
        (["nowhere.toml"], "cannot be read as a recipe"),
        (["one.toml", "--client.lr", "0.1"], "--section.setting=VALUE"),
        (["one.toml", "--client.lr=-1"], "client.lr is -1"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], words: str, tmp_path: Path) -> None:
    for name in ("a/one.toml", "b/one.toml", "one.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    places = [str(tmp_path / a) if a.endswith(".toml") else a for a in arguments]
    finished = launch(1, "-m", "fedprompt_mpi", "sweep", *places)
    assert finished.status == 2
    assert words in finished.err
    assert finished.err.count("\n") == 1


def _recipes_of_the_paper() -> Any:
    spec = importlib.util.spec_from_file_location("paper", PAPER.parent / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.recipes()


def test_the_files_are_what_the_small_table_says() -> None:
    cells = _recipes_of_the_paper()
    assert {file.stem: tomllib.loads(file.read_text()) for file in PAPER.glob("*.toml")} == cells
    assert len(cells) == 8 * 3 * 2 * 2 + (3 + 3 + 1) + 2 * 3 + 3 + 4


@pytest.mark.parametrize(
    "name", ["sst2-bert-iid-clean", "rte-t5-quantity-poisoned", "sst2-t5-prefix", "sst2-roberta-ldp"]
)
def test_they_are_settings(name: str) -> None:
    config = parse_settings([f"--config={PAPER / name}.toml"])
    assert config.federation.clients == 10
    assert bool(config.poison.clients) == name.endswith("poisoned")
