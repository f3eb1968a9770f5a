"""What stands on a terminal in the end, and meanwhile: every line, whole, and always something that is going on."""

import contextlib
import io
import re
import sys
import time
from pathlib import Path

import pytest

from fedprompt_mpi.config import RunConfig, from_dict
from fedprompt_mpi.rundir import screen
from fedprompt_mpi.rundir.console import Console, TimeLeft
from fedprompt_mpi.rundir.records import RoundRecord, Seconds
from tests.jobs import SMALL, command_of, launch, variables_of
from tests.terminal import Terminal

FLAGS = (*SMALL, "--federation.rounds=3", "--client.steps=15", "--poison.clients=[0]", "--output.report=true")


def _joined(lines: list[str]) -> str:
    """Return lines without white space, since a terminal breaks what is too long; times and folder are masked.

    What is said because it takes long is left out.
    """
    kept = [line for line in lines if not line.endswith("...") and not line.startswith("importing PyTorch")]
    text = "".join("".join(kept).split())
    return re.sub(r"\d+\.\d+(s|ms|us)", "TIME", re.sub(r"/tmp/\S*?/(terminal|plain)", "RUN", text))


@pytest.mark.parametrize(("ranks", "columns"), [(1, 120), (3, 80)])
def test_every_line_is_whole_in_the_end(ranks: int, columns: int, tmp_path: Path) -> None:
    """The screen has the lines that a file has, in their order."""
    arguments = ("-m", "fedprompt_mpi", *FLAGS)
    plain = launch(ranks, *arguments, f"--output.dir={tmp_path / 'plain'}")
    terminal = Terminal(columns)
    command = command_of(ranks, *arguments, f"--output.dir={tmp_path / 'terminal'}")
    assert terminal.run(command, variables_of(), deadline_s=60) == 0
    assert _joined(terminal.lines()) == _joined(plain.out.splitlines())
    at_bottom = [lines[-1] for _, lines in terminal.seen]
    assert any(re.match(r"round 2/3  \[.*]  step \d+/15  \d+ s left$", line) for line in at_bottom), at_bottom
    assert any(line.startswith("round 2/3, evaluating") for line in at_bottom)
    assert max(map(len, at_bottom)) < columns


def test_the_first_line_comes_at_once_and_an_error_stands_alone(tmp_path: Path) -> None:
    terminal = Terminal(100)
    command = command_of(3, "-m", "fedprompt_mpi", "--task.name=sst2", f"--task.data={tmp_path / 'nowhere'}")
    assert terminal.run(command, variables_of(), deadline_s=60) == 2
    assert terminal.seen[0][1] == ["fedprompt_mpi starts on 3 ranks"]
    lines = " ".join(line for line in terminal.lines() if not line.startswith("importing PyTorch"))
    assert re.match(r"fedprompt_mpi starts on 3 ranks fedprompt_mpi: error: task.data is .* no such folder or", lines)
    if "prterun" not in lines:  # Open MPI's launcher has words of its own about any other status than 0
        assert lines.endswith("folder or file")


def test_names_of_others_steer_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(screen, "terminal_of", lambda _: "/dev/null")
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(screen, "wait_until_read", lambda _: None)
    monkeypatch.setattr(written, "fileno", lambda: 1, raising=False)
    with screen.LiveScreen() as shown:
        shown.say("a class \x1b[2J named so")
        shown.stage("loading \x1b]0;title\x07", 3)
        shown.advance(1, "{of} \x1b[31m")
    text = written.getvalue().replace(screen.UP_AND_CLEAR, "").replace(screen.UP_AND_DOWN, "")
    assert "\x1b" not in text and "\x07" not in text
    assert "a class \\x1b[2J named so" in text


def _record(round_: int, total: float, evaluate: float = 0.0) -> RoundRecord:
    return RoundRecord(
        round=round_, accuracy=0.5 if evaluate else None, seconds=Seconds(total=total, evaluate=evaluate)
    )


def test_the_time_left_is_that_of_training_and_evaluation() -> None:
    config: RunConfig = from_dict({"federation": {"rounds": 10}, "output": {"evaluate_every": 5}})
    left = TimeLeft(config)
    left.note(_record(0, 3.0, 3.0))
    assert left.estimate(1, 0.5) is None
    left.note(_record(1, 2.0))
    assert left.estimate(2, 0.0) == pytest.approx(9 * 2 + 2 * 3)  # rounds 2 to 10; evaluated after 5 and 10
    assert left.estimate(10, 0.5) == pytest.approx(0.5 * 2 + 3)


def test_another_standard_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls `run` may have put something in its place; nothing may go wrong at the end."""
    monkeypatch.setattr(screen, "terminal_of", lambda _: "/dev/null")
    with contextlib.redirect_stdout(io.StringIO()) as caught, screen.LiveScreen() as shown:
        assert not shown.has_bar
        shown.say("a line")
    assert caught.getvalue() == "a line\n"


def test_a_warning_stands_whole_above_the_bar(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra: mlflow")
    terminal = Terminal(80)
    flags = [*SMALL, f"--output.dir={tmp_path / 'run'}", '--output.track=["mlflow"]']
    variables = variables_of({"MLFLOW_TRACKING_URI": "nonsense://x"})
    assert terminal.run(command_of(2, "-m", "fedprompt_mpi", *flags), variables, deadline_s=60) == 0
    text = "\n".join(terminal.lines())
    (warning,) = re.findall(r"^fedprompt_mpi: warning: no more goes to mlflow \(.*", text, re.MULTILINE)
    joined = "".join(text[text.index(warning) :].splitlines()[:8])
    assert re.match(r".*?nonsense.*?\)", joined), text
    assert not re.search(r"^(waiting for|trying the|starting MPI)", text, re.MULTILINE), text


def test_what_is_over_is_not_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain output tells a stage that takes long; the evaluation before training is none once its line is there."""
    monkeypatch.setattr(screen, "EVERY_S", 0.05)
    with screen.LiveScreen() as shown:
        console = Console(shown, RunConfig())
        console.start_evaluation(0, 10)
        console.say_round(_record(0, 1.0, 1.0))
        time.sleep(0.3)
    assert "..." not in capsys.readouterr().out.replace("starting MPI ...", "")
