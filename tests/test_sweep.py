"""Sweeps run what is missing; and the paper's recipes are what their small table says."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi.cli import parse_settings
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
    assert first.status == 0, first.err
    assert [line.split(": ")[1] for line in first.out.splitlines()] == ["begins", "begins"]
    before = (recipes / "runs" / "one" / "rounds.jsonl").read_bytes()
    (recipes / "runs" / "two" / "summary.json").unlink()
    second = _sweep(recipes)
    assert [line.split(": ")[1] for line in second.out.splitlines()] == ["is done", "goes on"]
    assert (recipes / "runs" / "one" / "rounds.jsonl").read_bytes() == before
    assert (recipes / "runs" / "two" / "summary.json").exists()


def test_seeds_and_a_launcher(recipes: Path) -> None:
    finished = _sweep(recipes, "--seeds=[3, 4]", "--launch=env THIS=that")
    assert finished.status == 0, finished.err
    names = sorted(path.name for path in (recipes / "runs").iterdir() if path.is_dir())
    assert names == ["one-seed3", "one-seed4", "two-seed3", "two-seed4"]
    seeds = {name: tomllib.loads((recipes / "runs" / name / "config.toml").read_text())["seed"] for name in names}
    assert seeds == {"one-seed3": 3, "one-seed4": 4, "two-seed3": 3, "two-seed4": 4}


def test_a_failure_does_not_keep_the_others_from_running(recipes: Path) -> None:
    (recipes / "one.toml").write_text("[client]\nlr = -1.0\n")
    finished = _sweep(recipes)
    assert finished.status == 2
    assert "one: exit status 2, see" in finished.out
    assert "client.lr is -1.0" in (recipes / "runs" / "one.log").read_text()
    assert len(read_rounds(recipes / "runs" / "two")) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/one.toml", "b/one.toml"], "two recipes are named 'one'"),
        (["nowhere.toml"], "cannot be read as a recipe"),
        (["one.toml", "--client.lr", "0.1"], "--section.setting=VALUE"),
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
    assert len(cells) == 8 * 3 * 2 * 2 + (3 + 3 + 1) + 3 + 3 + 3


@pytest.mark.parametrize(
    "name", ["sst2-bert-iid-clean", "rte-t5-quantity-poisoned", "sst2-t5-prefix", "sst2-roberta-ldp"]
)
def test_they_are_settings(name: str) -> None:
    config = parse_settings([f"--config={PAPER / name}.toml"])
    assert config.federation.clients == 10
    assert bool(config.poison.clients) == name.endswith("poisoned")
