"""Every file format gives the same examples, and whatever is wrong with a file is one message that names it."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.tasks import resolve

ROWS = [('so, "fresh"', 1, "u1"), ("NA", 0, "u2"), ("dull", 0, "u1"), ("null", 1, "u3")]


def _write(folder: Path, suffix: str, split: str = "train", rows: Sequence[tuple[str, object, str]] = ROWS) -> None:
    path = folder / (split + suffix)
    if suffix in (".csv", ".csv.gz"):
        quoted = ['"' + text.replace('"', '""') + f'",{label},{user}' for text, label, user in rows]
        content = "\n".join(["text,label,user", *quoted]) + "\n"
        path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": y, "user": u}) + "\n" for t, y, u in rows))
    else:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns = {name: [row[i] for row in rows] for i, name in enumerate(("text", "label", "user"))}
        parquet.write_table(arrow.table(columns), path)


def _load(folder: Path, **settings: object):
    config = TaskConfig(**{"name": "sst2", "data": str(folder), **settings})  # pyright: ignore[reportArgumentType]
    return load(resolve(config), config, 0)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    _write(tmp_path, suffix)
    _write(tmp_path, suffix, "dev", ROWS[:2])
    train, dev = _load(tmp_path, user="user")
    assert list(train.texts) == ['so, "fresh"', "NA", "dull", "null"]
    np.testing.assert_array_equal(train.labels, [1, 0, 0, 1])
    assert list(train.users or []) == ["u1", "u2", "u1", "u3"]
    assert len(dev) == 2


def test_a_known_task_s_users_may_be_missing(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text("text,label\nso bad,0\nso good,1\n")
    train, _ = _load(tmp_path, name="imdb")
    assert train.users is None
    with pytest.raises(SettingsError, match=r"task\.user is 'user'"):
        _load(tmp_path, name="imdb", user="user")


def test_test_goes_before_dev_unless_told(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("dev", ROWS[:2]), ("test", ROWS[:3])):
        _write(tmp_path, ".csv", split, rows)
    assert len(_load(tmp_path)[1]) == 3
    assert len(_load(tmp_path, eval_split="dev")[1]) == 2


def test_labels_may_be_words(tmp_path: Path) -> None:
    _write(tmp_path, ".csv", "train", [("a", "great", "u"), ("b", "terrible", "u")])
    _write(tmp_path, ".csv", "dev", [("a", "great", "u")])
    np.testing.assert_array_equal(_load(tmp_path)[0].labels, [1, 0])


def test_max_train_is_a_choice_of_the_seed(tmp_path: Path) -> None:
    config = TaskConfig(max_train=50, max_test=7)
    task = resolve(config)
    first, test = load(task, config, 0)
    assert (len(first), len(test)) == (50, 7)
    assert list(load(task, config, 0)[0].texts) == list(first.texts)
    assert list(load(task, config, 1)[0].texts) != list(first.texts)


def test_held_out_text_of_the_embedded_tasks_is_new() -> None:
    for name in ("embedded", "embedded-topic", "embedded-spam"):
        config = TaskConfig(name=name)
        train, test = load(resolve(config), config, 0)
        assert len(set(test.texts) - set(train.texts)) > 0.99 * len(test)
        assert np.bincount(test.labels).min() > 50


WRONG = {
    "a missing column": (lambda f: None, {"text": "words"}, "task.text is 'words'.*text, label, user"),
    "a missing user column": (lambda f: None, {"user": "who"}, "task.user is 'who'"),
    "a label without a word": (
        lambda f: _write(f, ".csv", "train", [*ROWS, ("x", 2, "u")]),
        {},
        "row 5 of the train data.*label 2.*no label word",
    ),
    "a label between classes": (lambda f: _write(f, ".jsonl", "train", [*ROWS, ("x", 0.9, "u")]), {}, "label 0.9"),
    "a text that is missing": (
        lambda f: _write(f, ".jsonl", "train", [*ROWS, (None, 1, "u")]),  # pyright: ignore[reportArgumentType]
        {},
        "row 5 of the train data.*nothing in column 'text'",
    ),
    "a label that is no number": (lambda f: _write(f, ".csv", "train", [("x", "", "u")]), {}, "no label word"),
    "an empty class": (
        lambda f: _write(f, ".csv", "train", [("x", 1, "u"), ("y", 1, "u")]),
        {},
        "no example of class 0 .terrible.",
    ),
    "an empty file": (lambda f: (f / "train.csv").write_text(""), {}, "train.csv cannot be read"),
    "a header alone": (lambda f: (f / "train.csv").write_text("text,label\n"), {}, "no examples|cannot be read"),
    "no train file": (lambda f: (f / "train.csv").unlink(), {}, "needs a train file"),
    "no test file": (lambda f: None, {"eval_split": "test"}, "test file"),
    "broken quoting": (lambda f: (f / "train.csv").write_text('text,label\n"a,1\nb,0\n'), {}, "cannot be read"),
    "bytes that are no text": (
        lambda f: (f / "train.csv").write_bytes(b"text,label\n\xff\xfe\x80,1\n"),
        {},
        "train.csv cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_one_message(case: str, tmp_path: Path) -> None:
    _write(tmp_path, ".csv")
    _write(tmp_path, ".csv", "dev")
    spoil, settings, message = WRONG[case]
    spoil(tmp_path)
    if (tmp_path / "train.jsonl").exists():
        (tmp_path / "train.csv").unlink()
    with pytest.raises(SettingsError, match=f"(?s){message}") as caught:
        _load(tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sst2"}, "task.data is not given"),
        ({"name": "mine"}, "not a known task"),
        ({"name": "embedded", "data": "x"}, "makes its own text"),
        ({"name": "sst2", "data": "x", "template": "{text} is"}, "0 {mask}"),
        ({"name": "sst2", "data": "x", "template": "{text} {mask} {who}"}, "{who}"),
        ({"name": "sst2", "data": "x", "template": "{text} {text_b} {mask}"}, "task.text_b"),
        ({"name": "sst2", "data": "x", "label_words": ["good"]}, "two or more"),
    ],
)
def test_wrong_tasks(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("{", r"\{").replace("}", r"\}")):
        resolve(TaskConfig(**settings))  # pyright: ignore[reportArgumentType]
