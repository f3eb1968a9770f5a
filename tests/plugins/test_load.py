"""Plug-ins are loaded when they are named, from where they are named; what is wrong with one is told."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi import load_prompt, run
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import SettingsError, from_dict, from_record, to_dict
from fedprompt_mpi.federation.prepare import check_same
from fedprompt_mpi.plugins.load import hashes, load_plugins, loaded, place_of
from tests.jobs import SMALL, find_mpirun, launch, read_rounds, run_here, run_program
from tests.plugins.conftest import EXAMPLES, forgotten

Write = Callable[..., str]
HEAD = "from fedprompt_mpi.plugins import Aggregator, aggregators, setting\n"
RULE = '@aggregators.register("mine")\nclass Mine(Aggregator):\n    pass\n'


def _with_option(option: str, name: str = "mine") -> str:
    """Return a plug-in whose rule has an option."""
    options = f"import dataclasses\n{HEAD}@dataclasses.dataclass\nclass Options:\n    {option}\n"
    return options + RULE.replace('"mine"', f'"{name}", options=Options')


WRONG = {
    "a typing error": ("def f(:\n", r"wrong\.py, line 1: SyntaxError"),
    "its own end": ("import sys\nsys.exit(4)\n", r"wrong\.py, line 2: SystemExit: 4"),
    "a default of another type": (
        _with_option("a: int = setting('abc')"),
        r"a default of aggregator mine: federation\.mine\.a is 'abc'",
    ),
    "a default out of bounds": (
        _with_option("a: int = setting(1, at_least=2)"),
        r"a default of aggregator mine: federation\.mine\.a is 1: give",
    ),
    "an exception": ("\n1 / 0\n", r"wrong\.py, line 2: ZeroDivisionError"),
    "nothing": ("x = 1\n", "registers nothing"),
    "no such name": (HEAD + "from fedprompt_mpi.plugins import aggregator\n", "line 2: ImportError"),
    "a name that is built in": (HEAD + RULE.replace("mine", "krum"), "two of the name 'krum'"),
    "no name": (HEAD + RULE.replace("mine", "My rule"), "'My rule' is no name"),
    "no class": (HEAD + 'aggregators.register("mine")(len)\n', "is no class derived from Aggregator"),
    "another kind": (HEAD + '@aggregators.register("mine")\nclass Mine:\n    pass\n', "is no class derived from"),
    "options that are none": (HEAD + RULE.replace('"mine"', '"mine", options=int'), "int, which are no dataclass"),
    "an option that is not made by setting": (
        _with_option("a: int = 1"),
        r"option a, which is not made by setting",
    ),
    "an option of a setting's name": (
        _with_option("a: int = setting(1)", "rounds"),
        r"federation\.rounds, which is taken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_plugin_that_is_wrong_is_told(what: str, write: Write) -> None:
    source, message = WRONG[what]
    with pytest.raises(SettingsError, match=message):
        parse_settings([f"--plugin={write('wrong.py', source)}"])
    assert not loaded()


@pytest.mark.parametrize("name", ["nowhere.py", "no_such_module_here", "no.such.module"])
def test_one_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(name)):
        parse_settings(["--plugin", name])


def test_two_of_one_name(write: Write) -> None:
    first, second = write("first.py", HEAD + RULE), write("second.py", HEAD + RULE)
    with pytest.raises(SettingsError, match=r"second.py.*two of the name 'mine' for federation.aggregator"):
        parse_settings([f"--plugin={first}", f"--plugin={second}"])


def test_one_file_by_several_names_is_loaded_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Path(write("equal_power.py"))
    monkeypatch.chdir(plugin.parent)
    for name in ("equal_power.py", "./equal_power.py", str(plugin), f"../{plugin.parent.name}/equal_power.py"):
        load_plugins([name])
    assert len(loaded()) == 1


def test_two_files_of_one_name_have_a_hash_each(write: Write, tmp_path: Path) -> None:
    load_plugins([write("mine.py", HEAD + RULE)])
    (tmp_path / "other").mkdir()
    load_plugins([write("other/mine.py", HEAD + RULE.replace("mine", "yours"))])
    assert set(hashes()) == {"mine.py (aggregator mine)", "mine.py (aggregator yours)"}


def test_a_plugin_that_was_imported_is_named_in_the_run(write: Write, tmp_path: Path) -> None:
    """As in Python: the run has it in its settings, and can be read without it."""
    load_plugins([write("equal_power.py")])
    run(from_dict({**to_dict(parse_settings([*SMALL, f"--output.dir={tmp_path / 'run'}"])), "plugin": []}))
    assert "equal_power.py" in (tmp_path / "run" / "config.toml").read_text()
    with forgotten():
        pass
    assert load_prompt(tmp_path / "run").config.plugin == ["equal_power.py"]


def test_a_stranger_is_a_name(tmp_path: Path) -> None:
    """What a run names need not be here, but it is no text of any kind: it would stand in cards and pages."""
    tables: dict[str, Any] = {**to_dict(parse_settings(["--output.dir=x"])), "plugin": ["x.py"]}
    tables["federation"]["aggregator"] = "their_rule"
    assert from_record(tables).federation.aggregator == "their_rule"
    tables["federation"]["aggregator"] = "<script>"
    with pytest.raises(SettingsError, match="choose one of"):
        from_record(tables)


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun")
@pytest.mark.parametrize("what", ["'other' if rank else 'mine'", "'mine' if not rank else sys.exit(3)"])
def test_a_rank_whose_file_does_other_things_ends_all(what: str, write: Write, tmp_path: Path) -> None:
    """Ranks that cannot parse their settings tell those that can, which wait for them."""
    source = "import sys\nfrom fedprompt_mpi.start.launcher import read_launch\nrank = read_launch().rank\n" + HEAD
    source += RULE.replace('"mine"', what)
    done = run_program(3, tmp_path / "run", f"--plugin={write('mine.py', source)}", "--federation.aggregator=mine")
    assert done.status == 2, done
    assert done.err.count("fedprompt_mpi: error") == 1
    assert "rank 1 on" in done.err


def test_sweep_passes_it_on(write: Write, tmp_path: Path) -> None:
    flags = [f"--plugin={write('equal_power.py')}", "--federation.equal_power.power=[0.0, 1.0]"]
    settings = [f"{flag}" for flag in SMALL] + ["--federation.aggregator=equal_power"]
    done = launch(1, "-m", "fedprompt_mpi", "sweep", *flags, *settings, f"--runs={tmp_path}")
    assert done.status == 0, done
    assert sorted(path.name for path in tmp_path.glob("*/summary.json")) == ["summary.json"] * 2


def test_its_options_are_settings(write: Write, tmp_path: Path) -> None:
    """In flags and files, with types, bounds and defaults; names are checked, and those of plug-ins listed."""
    plugin = write("equal_power.py")
    file = tmp_path / "settings.toml"
    file.write_text(
        f'plugin = ["{plugin}"]\n[federation]\naggregator = "equal_power"\n[federation.equal_power]\npower = 0.25\n'
    )
    config = parse_settings([f"--config={file}"])
    assert to_dict(config)["federation"]["equal_power"] == {"power": 0.25}
    flag = "--federation.equal_power.power"
    assert to_dict(parse_settings([f"--config={file}", f"{flag}=1"]))["federation"]["equal_power"] == {"power": 1.0}
    assert parse_settings([f"--plugin={plugin}"]).plugin == [plugin]
    assert from_dict(to_dict(config)) == config
    for flags, message in (
        ([f"{flag}=2"], r"federation.equal_power.power is 2.0: give a finite number"),
        ([f"{flag}=much"], "power"),
        (["--federation.equal_power.strength=1"], "there is no setting"),
        (["--federation.aggregator=equal_powers"], r"choose one of bulyan, .*equal_power, fedavg"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_settings([f"--config={file}", *flags])


def test_help_has_its_options(write: Write) -> None:
    shown = launch(1, "-m", "fedprompt_mpi", f"--plugin={write('equal_power.py')}", "--help")
    assert shown.status == 0, shown
    assert "--federation.equal_power.power" in shown.out
    assert "Power of the number of examples" in shown.out


def test_nothing_is_loaded_that_nobody_names(write: Write, tmp_path: Path) -> None:
    """A run's directory names a plug-in; reports and predictions do not load it, and resuming without it is refused."""
    plugin, directory = write("equal_power.py"), tmp_path / "run"
    run_here(directory, f"--plugin={plugin}", "--federation.aggregator=equal_power")
    (recorded,) = json.loads((directory / "environment.json").read_text())["plugins"]
    assert recorded == {
        "name": "equal_power.py",
        "sha256": hashlib.sha256(EXAMPLES["equal_power.py"].encode()).hexdigest(),
        "registers": ["aggregator equal_power"],
    }
    program = (
        "import sys\nfrom fedprompt_mpi import load_prompt\nfrom fedprompt_mpi.report.page import write_report\n"
        f"write_report(__import__('pathlib').Path({str(directory)!r}))\n"
        f"print(load_prompt({str(directory)!r}).predict(['a gripping film'])[0].label)\n"
        "assert not any('fedprompt_plugin' in name for name in sys.modules)\n"
    )
    done = launch(1, "-c", program)
    assert done.status == 0, done
    assert "equal_power" in (directory / "report.html").read_text()


def test_a_changed_one_does_not_continue_a_run(write: Write, tmp_path: Path) -> None:
    """The message has both hashes."""
    plugin, directory = write("equal_power.py"), tmp_path / "run"
    flags = (f"--plugin={plugin}", "--federation.aggregator=equal_power")
    assert run_program(1, directory, *flags).status == 0
    changed = EXAMPLES["equal_power.py"].replace("**self", "** self")
    Path(plugin).write_text(changed)
    again = (*flags, "--federation.rounds=3", "--output.resume=true")
    refused = run_program(1, directory, *again)
    assert refused.status == 2, refused
    for source in (EXAMPLES["equal_power.py"], changed):
        assert hashlib.sha256(source.encode()).hexdigest() in refused.err
    assert run_program(1, directory, *again, "--output.other_versions=true").status == 0
    assert len(read_rounds(directory)) == 4


def test_another_file_on_a_rank() -> None:
    same = json.dumps({"a.py": "ab" * 32}).encode()
    check_same([same, same])
    check_same([])
    for other in (json.dumps({"a.py": "cd" * 32}).encode(), b"{}", json.dumps({"b.py": "ab" * 32}).encode()):
        with pytest.raises(SettingsError, match=r"plugin a.py is another file on rank 1 .* than on rank 0"):
            check_same([same, other])


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun")
def test_a_rank_without_the_file_says_so_for_all(write: Write, tmp_path: Path) -> None:
    """Rank 1 sees no such file: one message that names it, on all ranks the status 2."""
    plugin = write("equal_power.py")
    program = (
        "import os, sys\nfrom fedprompt_mpi.start.launcher import read_launch\n"
        f"if read_launch().rank == 1:\n    sys.argv = [a.replace({plugin!r}, {plugin + 'x.py'!r}) for a in sys.argv]\n"
        "from fedprompt_mpi.cli import main\nmain()\n"
    )
    starter = tmp_path / "starter.py"
    starter.write_text(program)
    done = launch(3, str(starter), "run", *SMALL, f"--plugin={plugin}", f"--output.dir={tmp_path / 'run'}")
    assert done.status == 2, done
    assert done.err.count("fedprompt_mpi: error") == 1
    assert "rank 1 on" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun")
def test_what_goes_wrong_in_one_is_told_with_its_line(write: Write, tmp_path: Path) -> None:
    source = HEAD + RULE.replace("pass", "def weights(self, updates):\n        return updates.nothing")
    done = run_program(3, tmp_path / "run", f"--plugin={write('rule.py', source)}", "--federation.aggregator=mine")
    assert done.status == 3, done
    assert "failed in plugin rule.py, line 5 (AttributeError" in done.err


def test_place_of_an_exception_elsewhere() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        int(1 / len([]))
    assert place_of(raised.value) == ""


def test_a_method_and_a_task_of_a_plugin_are_used_again(write: Write, tmp_path: Path) -> None:
    """Predicting with a run of them needs them; without, one message says so."""
    method, task = write("low_rank.py"), write("three.py")
    directory = tmp_path / "run"
    run_here(
        directory, f"--plugin={method}", f"--plugin={task}", "--prompt.method=low_rank", "--prompt.low_rank.rank=3",
        "--task.name=weather", "--output.metrics=[\"error_rate\"]", "--federation.partition=sorted_by_label",
    )  # fmt: skip
    last = read_rounds(directory)[-1]
    assert last["metrics"]["error_rate"] == pytest.approx(1 - last["accuracy"])
    flags = ["predict", str(directory), "--text", "sun warm clear sun"]
    assert launch(1, "-m", "fedprompt_mpi", *flags, f"--plugin={method}", f"--plugin={task}").status == 0
    refused = launch(1, "-m", "fedprompt_mpi", *flags)
    assert refused.status == 2, refused
    assert "name its plug-in" in refused.err or "weather" in refused.err


def test_a_wheel_that_announces_plugins(tmp_path: Path) -> None:
    """Built, installed beside this environment, and found by its name only once that is named."""
    package = tmp_path / "source" / "my_rules"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(EXAMPLES["equal_power.py"] + "\n\n" + EXAMPLES["same_value.py"])
    (tmp_path / "source" / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "my-rules"\nversion = "1.0"\n'
        '[project.entry-points."fedprompt_mpi.plugins"]\nmine = "my_rules.rules"\n'
        '[tool.setuptools]\npackages = ["my_rules"]\n'
    )
    install = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(install), str(wheel)], check=True, timeout=120)
    environment = {"PYTHONPATH": f"{install}:{Path(__file__).parents[2]}"}
    flags = ["--plugin=mine", "--federation.aggregator=equal_power"]
    flags += ["--poison.attack=same_value", "--poison.clients=[1]"]
    done = run_program(2, tmp_path / "run", *flags, environment=environment)
    assert done.status == 0, done
    (recorded,) = json.loads((tmp_path / "run" / "environment.json").read_text())["plugins"]
    assert (recorded["name"], recorded["registers"]) == ("my_rules", ["aggregator equal_power", "attack same_value"])
    unnamed = run_program(1, tmp_path / "other", *flags[1:], environment=environment)
    assert unnamed.status == 2
    assert "federation.aggregator is 'equal_power'" in unnamed.err
