"""A tuned prompt in use: the README's lines of Python, and the command."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi import SettingsError, load_prompt
from fedprompt_mpi.commands.answers import read_texts
from fedprompt_mpi.commands.predict import main as predict
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.tasks import resolve
from tests.jobs import REPOSITORY, launch, read_rounds, run_here

PAIRS = ["--task.name=rte", '--task.label_words=["normal","spam"]']


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that has learned its task."""
    directory = tmp_path_factory.mktemp("tuned") / "run"
    run_here(directory, "--federation.rounds=6", "--client.steps=10", "--task.max_test=60")
    return directory


def test_it_answers_as_the_evaluation_did(tuned: Path) -> None:
    prompt = load_prompt(tuned)
    test = load(resolve(prompt.config.task), prompt.config.task, prompt.config.seed).test
    answers = prompt.predict(test.texts)
    right = np.mean([answer.label for answer in answers] == test.labels)
    assert right == pytest.approx(read_rounds(tuned)[-1]["accuracy"])
    assert right > 0.9
    for answer in answers:
        assert sum(answer.probabilities) == pytest.approx(1)
        assert answer.probability == max(answer.probabilities) == answer.probabilities[answer.label]
        assert answer.word == ("terrible", "great")[answer.label]


def test_the_order_of_texts_does_not_matter(tuned: Path) -> None:
    texts = ["the film was fine", "a long message about music and sports and more of the same", "film"]
    forth, back = load_prompt(tuned).predict(texts), load_prompt(tuned).predict(texts[::-1])
    np.testing.assert_allclose(
        [a.probabilities for a in forth], [a.probabilities for a in back[::-1]], atol=1e-6
    )  # batches are padded otherwise
    assert load_prompt(tuned).predict([]) == []


def test_the_lines_of_the_readme(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(from fedprompt_mpi import load_prompt\n.*?)```", README, flags=re.DOTALL)
    lines = block.replace('"runs/sst2"', repr(str(tuned)))
    exec(compile(lines, "README.md", "exec"), {})
    assert re.fullmatch(r"(terrible|great) 0\.\d+\n", capsys.readouterr().out)


README = (REPOSITORY / "README.md").read_text()


def test_the_command(tuned: Path) -> None:
    finished = launch(1, "-m", "fedprompt_mpi", "predict", str(tuned), "--text=the film was fine")
    assert finished.status == 0, finished
    (answer,) = load_prompt(tuned).predict(["the film was fine"])
    assert finished.out == f"{answer.label} {answer.word} {answer.probability:.4f}\n"


def test_several_texts_a_file_and_the_standard_input(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer a text, in their order, as a table or lines; accuracy where labels are there."""
    texts = ["the film was fine", "a dull film", "music, and sports"]
    expected = load_prompt(tuned).predict(texts)
    run = lambda *flags: predict([str(tuned), *flags], Liveness())  # noqa: E731
    run(*(f"--text={text}" for text in texts))
    assert capsys.readouterr().out.splitlines() == [f"{a.label} {a.name} {a.probability:.4f}" for a in expected]

    labels = ["great", "terrible", "great"]
    rows = list(zip(texts, labels, strict=True))
    (tmp_path / "in.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    run(f"--file={tmp_path / 'in.csv'}", f"--out={tmp_path / 'out.jsonl'}")
    right = sum(a.name == label for a, label in zip(expected, labels, strict=True))
    assert f"accuracy {right / 3:.2%} of 3 texts (95 % interval " in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["class"], row["label"]) for row in found] == [(a.label, a.name) for a in expected]
    np.testing.assert_allclose([row["probabilities"]["great"] for row in found], [a.probabilities[1] for a in expected])

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    run("--file=-", f"--out={tmp_path / 'out.csv'}")
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == [a.name for a in expected]
    np.testing.assert_allclose(
        [float(row["probability of terrible"]) for row in table], [a.probabilities[0] for a in expected], atol=1e-6
    )


def test_lines_end_at_line_ends_alone_and_hidden_labels_are_left_out(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\u2028film\r\ntwo\x0cfilms\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.txt"), load_prompt(tuned).config).texts == ["one\u2028film", "two\x0cfilms"]
    (tmp_path / "hidden.csv").write_text("text,label\na film,-1\nmusic,-1\n")
    predict([str(tuned), f"--file={tmp_path / 'hidden.csv'}"], Liveness())
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and "accuracy" not in told.out
    assert "labels that are not the task's" in told.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --text, or --file"),
        (["--text=a", "--file=-"], "give either --text, or --file"),
        (["--text=a", "--text_b=b", "--text_b=c"], "there are 1 --text and 2 --text_b"),
        (["--text=a", "--out=x.xlsx"], "must end with .csv or .jsonl"),
        (["--file=nowhere.csv"], "no such file"),
        (["--file=EMPTY"], "row 2 of .* has no text"),
        (["--file=OTHER"], "has no column 'text', but body"),
    ],
)
def test_what_cannot_be_predicted_is_one_message(flags: list[str], words: str, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\nthree\n")
    (tmp_path / "other.csv").write_text("body,label\na,1\n")
    places = {"EMPTY": str(tmp_path / "lines.txt"), "OTHER": str(tmp_path / "other.csv")}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    with pytest.raises(SettingsError, match=words):
        predict([str(tuned), *flags], Liveness())


def test_pairs_and_single_texts_are_told_apart(tuned: Path) -> None:
    with pytest.raises(SettingsError, match="asks about one text"):
        load_prompt(tuned).predict(["one"], ["two"])


def test_what_is_no_run_is_refused(tmp_path: Path, tuned: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read as a prompt"):
        load_prompt(tmp_path)
    (tmp_path / "prompt.safetensors").write_bytes((tuned / "prompt.safetensors").read_bytes())
    with pytest.raises(SettingsError, match=r"there is no .*config\.toml"):
        load_prompt(tmp_path).predict(["one"])


@pytest.mark.parametrize("method", ["p_tuning", "prefix", "full"])
def test_every_method_predicts(method: str, tmp_path: Path) -> None:
    flags = [f"--prompt.method={method}", "--client.lr=0.0001", "--federation.rounds=1", "--client.steps=1"]
    run_here(tmp_path / "run", *flags)
    prompt = load_prompt(tmp_path / "run")
    test = load(resolve(prompt.config.task), prompt.config.task, prompt.config.seed).test
    right = np.mean([answer.label for answer in prompt.predict(test.texts[:24])] == test.labels[:24])
    assert right == pytest.approx(read_rounds(tmp_path / "run")[-1]["accuracy"])
