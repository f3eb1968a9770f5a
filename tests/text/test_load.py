"""Every file format gives the same examples, and whatever is wrong with a file is one message that names it."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.load import Loaded, load
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


def _loaded(data: Path, **settings: object) -> Loaded:
    config = TaskConfig(**{"name": "sst2", "data": str(data), **settings})  # pyright: ignore[reportArgumentType]
    return load(resolve(config), config, 0)


def _load(data: Path, **settings: object) -> tuple[Examples, Examples]:
    loaded = _loaded(data, **settings)
    return loaded.train, loaded.test


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
    first = load(task, config, 0)
    assert (len(first.train), len(first.test)) == (50, 7)
    assert list(load(task, config, 0).train.texts) == list(first.train.texts)
    assert list(load(task, config, 1).train.texts) != list(first.train.texts)


def test_held_out_text_of_the_embedded_tasks_is_new() -> None:
    for name in ("embedded", "embedded-topic", "embedded-spam"):
        config = TaskConfig(name=name)
        loaded = load(resolve(config), config, 0)
        assert len(set(loaded.test.texts) - set(loaded.train.texts)) > 0.99 * len(loaded.test)
        assert np.bincount(loaded.test.labels).min() > 50


MANY = [(f"{'good' if i % 2 else 'bad'} film {i}", i % 2) for i in range(40)]


def _separated(file: Path, rows: Sequence[Sequence[object]], separator: str = ",", encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding=encoding) as opened:
        csv.writer(opened, delimiter=separator).writerows(rows)
    return file


@pytest.mark.parametrize(
    ("name", "separator"),
    [("train.csv", ","), ("train.csv", ";"), ("train.csv", "\t"), ("train.tsv", "\t"), ("training.txt", "\t")],
)
def test_separators_are_found_out(name: str, separator: str, tmp_path: Path) -> None:
    _separated(tmp_path / name, [("text", "label"), *MANY], separator)
    _separated(tmp_path / "validation.csv", [("text", "label"), *MANY[:4]], separator)
    train, dev = _load(tmp_path)
    assert (list(train.texts), train.labels.tolist()) == tuple(map(list, zip(*MANY, strict=True)))
    assert len(dev) == 4


def test_quotes_are_letters_between_tabs(tmp_path: Path) -> None:
    rows = ['"great" it said\t1', 'an open " quote\t0', '"in ""quotes"" as a whole"\t1', '"\t0']
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\nx\t1\n")
    assert _load(tmp_path)[0].texts == ['"great" it said', 'an open " quote', 'in "quotes" as a whole', '"']


def test_one_file_without_a_header_is_split_by_the_seed(tmp_path: Path) -> None:
    file = _separated(tmp_path / "messages", [(["ham", "spam"][label], text) for text, label in MANY], "\t")
    for place in (file, tmp_path):  # the file, or the folder that has it alone
        settings = {"columns": ["label", "text"], "labels": ["ham", "spam"]}
        loaded = _loaded(place, **settings)
        assert sorted([*loaded.train.texts, *loaded.test.texts]) == sorted(text for text, _ in MANY)
        assert np.bincount(loaded.test.labels).tolist() == [4, 4]  # a fifth of each class
        assert loaded.notes == (
            "task.data has one table: 8 of its 40 examples, of each class 20%, are kept for evaluation "
            "(drawn by the seed)",
        )
    with pytest.raises(SettingsError, match=r"has no such split"):
        _load(file, **settings, eval_split="dev")
    with pytest.raises(SettingsError, match=r"name all columns by task\.columns"):
        _load(file)
    _separated(file, [("label", "text"), *((["ham", "spam"][label], text) for text, label in MANY)], "\t")
    with pytest.raises(SettingsError, match="its first line is a header"):
        _load(file, **settings)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    text = "服务很好" if encoding != "latin-1" else "un café"
    for name in ("train.csv", "dev.csv"):
        _separated(tmp_path / name, [("text", "label"), (text, 1), ("dull", 0)], encoding=encoding)
    assert _load(tmp_path, encoding=encoding)[0].texts[0] == text
    suggested = "utf-16" if encoding == "utf-16" else "cp1252"
    with pytest.raises(SettingsError, match=f"it is no utf-8 .*--task.encoding {suggested}"):
        _load(tmp_path)


def test_an_encoding_that_there_is_not() -> None:
    for name in ("klingon", "rot13", "zlib"):
        with pytest.raises(SettingsError, match=r"task\.encoding is"):
            TaskConfig(encoding=name)


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz", ".csv.zst", ".tsv.zst", ".jsonl.zst"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in MANY]
    if "jsonl" not in suffix:
        separator = "\t" if "tsv" in suffix else ","
        lines = [f"text{separator}label", *(f"{text}{separator}{label}" for text, label in MANY)]
    content = ("\n".join(lines) + "\n").encode()
    for split in ("train", "test"):
        how = "zstd" if suffix.endswith("zst") else "gzip"
        with pa.output_stream(str(tmp_path / (split + suffix)), compression=how) as stream:
            stream.write(content)
    assert list(_load(tmp_path)[0].texts) == [text for text, _ in MANY]


def test_a_clone_of_a_hub_data_set_and_what_save_to_disk_writes(tmp_path: Path) -> None:
    """With names of classes: integers stand for them, in the order of the settings."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = [{"text": text, "label": label} for text, label in MANY]
    both = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows, features=features) for split in ("train", "validation")}
    )
    both.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "clone" / "data").mkdir(parents=True)
    for number in range(2):
        shard = both["train"].shard(2, number, contiguous=True)
        shard.to_parquet(str(tmp_path / "clone" / "data" / f"train-{number:05}-of-00002.parquet"))
    both["validation"].to_parquet(str(tmp_path / "clone" / "data" / "validation-00000-of-00001.parquet"))
    both["train"].save_to_disk(str(tmp_path / "alone"))
    for place in ("saved", "clone"):
        train, dev = _load(tmp_path / place)
        assert list(train.texts) == [text for text, _ in MANY]
        assert train.labels.tolist() == [label for _, label in MANY]
        assert len(dev) == 40
        turned, _ = _load(tmp_path / place, labels=["pos", "neg"])
        assert turned.labels.tolist() == [1 - label for _, label in MANY]
    assert len(_load(tmp_path / "alone")[0]) == 32
    (tmp_path / "clone" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(SettingsError, match="1 of the 2 shards"):
        _load(tmp_path / "clone")


LABELS: dict[str, tuple[list[object], list[object]]] = {
    "words": (["Negative", "Positive"], ["Negative", "Positive"]),
    "from one": ([1, 2], [1, 2]),
    "zero and four": ([0, 4], [0, 4]),
    "booleans": ([False, True], [False, True]),
    "numbers as text": (["0", "4"], [0, 4]),
    "fractions": ([-0.5, 0.5], [-0.5, 0.5]),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("case", LABELS)
def test_labels_have_names(case: str, suffix: str, tmp_path: Path) -> None:
    """The values of the column, in the order of the classes, whatever their type and the format."""
    values, listed = LABELS[case]
    rows = [(text, values[label], "u") for text, label in MANY]
    for split in ("train", "dev"):
        _write(tmp_path, suffix, split, rows)
    train, _ = _load(tmp_path, labels=listed)
    assert train.labels.tolist() == [label for _, label in MANY]
    turned, _ = _load(tmp_path, labels=listed[::-1])
    assert turned.labels.tolist() == [1 - label for _, label in MANY]
    if case != "booleans" or suffix == ".csv":
        with pytest.raises(SettingsError, match=r"values in the order of the classes, as --task\.labels"):
            _load(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_may_be_a_word_or_a_number_is_refused(suffix: str, tmp_path: Path) -> None:
    """Label words "1", "0" swapped the classes between a CSV file and JSON lines."""
    for split in ("train", "dev"):
        _write(tmp_path, suffix, split, [(text, str(label), "u") for text, label in MANY])
    with pytest.raises(SettingsError, match=r"list the column's values .* by task\.labels"):
        _load(tmp_path, label_words=["1", "0"])
    train, _ = _load(tmp_path, label_words=["1", "0"], labels=[1, 0])
    assert train.labels.tolist() == [1 - label for _, label in MANY]
    assert _load(tmp_path, label_words=["0", "1"])[0].labels.tolist() == [label for _, label in MANY]


def test_hidden_labels_are_named(tmp_path: Path) -> None:
    _write(tmp_path, ".csv")
    _write(tmp_path, ".csv", "dev")
    _write(tmp_path, ".csv", "test", [("x", -1, "u"), ("y", -1, "u")])
    with pytest.raises(SettingsError, match=r"hides its labels .all are -1.*--task\.eval_split dev"):
        _load(tmp_path)
    assert len(_load(tmp_path, eval_split="dev")[1]) == 4


def test_a_class_that_max_train_loses_is_named(tmp_path: Path) -> None:
    rows = [("x", 0, "u"), *(("y", 1, "u") for _ in range(200))]
    for split in ("train", "dev"):
        _write(tmp_path, ".csv", split, rows)
    loaded = _loaded(tmp_path, max_train=3)
    assert loaded.notes == ("task.max_train 3 leaves no example of 1 class (terrible)",)


def test_a_folder_without_splits_is_told_what_it_has(tmp_path: Path) -> None:
    for name in ("reviews.csv", "more.csv", "LICENSE"):
        (tmp_path / name).write_text("text,label\n")
    with pytest.raises(
        SettingsError, match=r"needs a train file .*train\.csv.* but has LICENSE, more\.csv, reviews\.csv"
    ):
        _load(tmp_path)
    with pytest.raises(SettingsError, match="no such folder or file"):
        _load(tmp_path / "nothing.csv")


WRONG = {
    "a missing column": (lambda f: None, {"text": "words"}, "task.text is 'words'.*text, label, user"),
    "a missing user column": (lambda f: None, {"user": "who"}, "task.user is 'who'"),
    "a label without a word": (
        lambda f: _write(f, ".csv", "train", [*ROWS, ("x", 2, "u")]),
        {},
        "row 5 of the train data.*label '2'.*no label word.*3 different values .\"0\", \"1\", \"2\"",
    ),
    "a label between classes": (lambda f: _write(f, ".jsonl", "train", [*ROWS, ("x", 0.9, "u")]), {}, "label '0.9'"),
    "an empty text": (
        lambda f: _write(f, ".csv", "train", [*ROWS, (" ", 1, "u")]),
        {},
        "row 5.*nothing in column 'text'",
    ),
    "a list for a text": (
        lambda f: _write(f, ".jsonl", "train", [*ROWS, (["a", "film"], 1, "u")]),  # pyright: ignore[reportArgumentType]
        {},
        "row 5 has a list in column 'text'",
    ),
    "a text that is missing": (
        lambda f: _write(f, ".jsonl", "train", [*ROWS, (None, 1, "u")]),  # pyright: ignore[reportArgumentType]
        {},
        "row 5 of the train data.*nothing in column 'text'",
    ),
    "a label that is missing": (lambda f: _write(f, ".csv", "train", [("x", "", "u")]), {}, "row 1.*has no label"),
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
