"""The command audit: a run again to the bit, and its attacks; what users get wrong."""

import json
import shutil
from pathlib import Path

import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.commands.audit import main
from fedprompt_mpi.liveness.liveness import Liveness
from tests.jobs import run_here

FEW = ("--texts", "20", "--shadows", "4", "--words", "10")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("audited") / "run"
    run_here(directory, "--client.batched=1", "--output.report=true")
    return directory


def test_a_run_is_repeated_and_attacked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(finished), "--attack", "labels,membership", *FEW], Liveness())
    said = capsys.readouterr().out
    before, after = said.split("the repetition is in", 1)
    assert "2 rounds again, about" in before and "texts through the model, about" in before
    assert "the repetition has the bits of the run" in after
    record = json.loads((finished / "audit.json").read_text())
    assert {leak["attack"] for leak in record["leaks"]} == {"labels", "membership"}
    page = (finished / "report.html").read_text()
    assert "What it betrays" in page and "calibrated inner product" in page
    main([str(finished), "--attack", "labels,membership", *FEW], Liveness())  # done: nothing is trained again
    assert "round 1/2" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attack", "telepathy"], "--attack is 'telepathy'"),
        (["--attack", "canary"], "privacy.mechanism is none"),
        (["--attack", "labels", "--texts", "3"], "privacy.audit_texts"),
        (["--rounds", "0"], "privacy.audit_rounds"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, finished: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        main([str(finished), *flags], Liveness())


def test_a_run_of_other_versions(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "environment.json"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(SettingsError, match=r"was made with torch 0\..* --other_versions true"):
        main([str(tmp_path / "run"), *FEW], Liveness())


def test_a_run_that_is_not_finished_or_not_there(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for run in ("run", "nothing"):
        with pytest.raises(SettingsError, match="there is no"):
            main([str(tmp_path / run), *FEW], Liveness())


def test_a_run_whose_data_are_gone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.csv").write_text("text,label\n" + "".join(f"good film {k},{k % 2}\n" for k in range(60)))
    task = ("--task.name=films", "--task.template={text} it is {mask} .", '--task.label_words=["terrible", "great"]')
    run_here(tmp_path / "run", *task, f"--task.data={data}", "--client.batched=1")
    shutil.rmtree(data)
    with pytest.raises(SettingsError, match=f"task.data is '{data}'"):
        main([str(tmp_path / "run"), *FEW], Liveness())


def test_canaries_alone_need_no_repetition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier audit has found stays."""
    run_here(tmp_path / "run", "--client.batched=1", "--privacy.mechanism=dp_fedavg", "--privacy.noise_multiplier=4",
             "--privacy.clip_norm=5")  # fmt: skip
    main([str(tmp_path / "run"), "--attack", "labels", *FEW], Liveness())
    capsys.readouterr()
    main([str(tmp_path / "run"), "--attack", "canary", "--canaries", "200"], Liveness())
    said = capsys.readouterr().out
    assert "epsilon of dp_fedavg is at least" in said and "stated" in said and "rounds again" not in said
    record = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert record["canary"]["inside"] == 100 and {leak["attack"] for leak in record["leaks"]} == {"labels"}
