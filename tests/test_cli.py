"""Commands: all are shown, unknown and ignored flags are refused, and what is not parallel is printed once."""

import contextlib
from pathlib import Path

import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.cli import COMMANDS, USAGE, dispatch
from fedprompt_mpi.commands.settings import PrintedText
from fedprompt_mpi.liveness.liveness import Liveness
from tests.jobs import launch, run_here


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "run"
    run_here(directory, "--federation.rounds=1", "--client.steps=1")
    return directory


@pytest.mark.parametrize("asks", ["--help", "-h", "help"])
def test_the_help_names_every_command(asks: str, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch([asks], Liveness())
    shown = capsys.readouterr().out
    assert shown == USAGE
    first_words = [line.split(" ")[0] for line in shown.splitlines()]
    assert set(COMMANDS) - {"help"} <= set(first_words)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "help"])
def test_every_command_is_a_file_that_can_be_guessed(command: str) -> None:
    import fedprompt_mpi

    assert (Path(fedprompt_mpi.__file__).parent / "commands" / f"{command}.py").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--federation.aggregator krumm", "federation.aggregator is 'krumm': choose one of bulyan"),
        ("--federation.aggregator krum --federation.assumed_malicious 9", "for which krum needs 21 clients"),
        ("--task.name nosuch", "task.name is 'nosuch', which is not a known task"),
        ("--poison.attack nosuch", "poison.attack is 'nosuch': choose one of against_trimmed_mean"),
        ("--prompt.method nosuch", "prompt.method"),
    ],
)
def test_settings_are_checked_before_they_are_printed(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match=words.replace(".", r"\.")):
        dispatch(["--print_config", *flags.split()], Liveness())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nosuch", "there is no command 'nosuch'"),
        ("help run", "help takes no arguments, but there is 'run'"),
        ("--version --quiet", "--version takes no arguments, but there is '--quiet'"),
        ("run --nosuch.flag 1", "nosuch.flag"),
        ("bench --watch", "unrecognized arguments: --watch"),
        ("doctor --model embedded", "unrecognized arguments: --model embedded"),
        ("cost --warmup 1", "unrecognized arguments: --warmup"),
        ("sweep RUN --watch", "unrecognized arguments: --watch"),
        ("export RUN a b", "unrecognized arguments: b"),
        ("predict RUN --text fine --dir a", "unrecognized arguments: --dir a"),
        ("report RUN --dir a", "--dir is for the page of several runs"),
        ("report --watch RUN RUN", "--watch is for one run, but 2 are named"),
        ("report RUN --warmup -1", "--warmup is -1: give a number of rounds from 0"),
    ],
)
def test_unknown_and_ignored_flags_are_refused(line: str, words: str, directory: Path) -> None:
    arguments = [str(directory) if word == "RUN" else word for word in line.split()]
    with pytest.raises(SettingsError) as caught:
        dispatch(arguments, Liveness())
    assert words in str(caught.value)


def test_a_warm_up_of_several_experiments_is_refused(directory: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "other", "--federation.rounds=1", "--client.steps=1", "--client.lr=0.5")
    with pytest.raises(SettingsError, match="--warmup is 1, but the runs are 2 different experiments"):
        dispatch(
            ["report", str(directory), str(tmp_path / "other"), "--warmup=1", f"--dir={tmp_path / 'page'}"], Liveness()
        )
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [("cost", "bytes"), ("--help", "usage:"), ("run --help", "--federation.rounds"), ("--version", "fedprompt_mpi ")],
)
def test_what_is_not_parallel_is_printed_once(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(PrintedText):
        dispatch(command.split(), Liveness())
    alone = capsys.readouterr().out
    assert words in alone
    job = launch(3, "-m", "fedprompt_mpi", *command.split())
    assert (job.status, job.out, job.err) == (0, alone, ""), job


def test_a_sweep_under_mpirun_is_refused_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    finished = launch(3, "-m", "fedprompt_mpi", "sweep", str(recipe), f"--runs={tmp_path / 'runs'}")
    assert finished.status == 2, finished
    assert finished.err.count("sweep starts the ranks of its runs itself") == 1
    assert not (tmp_path / "runs").exists()
