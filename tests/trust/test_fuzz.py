"""Files of every kind with arbitrary damage, end to end: they are read, or refused by one message.

Each case is bounded in time and memory. FEDPROMPT_FUZZ=20 tries twenty times as many.
"""

import gzip
import json
import os
import resource
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fedprompt_mpi import run
from fedprompt_mpi.commands import export, predict, report
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.plm.adapter import read_adapter
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.text.read import Layout, read_table
from tests.bad_input import GOOD_CSV
from tests.jobs import SMALL, run_here
from tests.trust.attacks import parquet_of

MOST_S, MOST_BYTES = 10.0, 2**29
FACTOR = int(os.environ.get("FEDPROMPT_FUZZ", "1"))


def times(examples: int) -> settings:
    return settings(max_examples=FACTOR * examples, deadline=None, suppress_health_check=list(HealthCheck))  # pyright: ignore


ROWS = {"text": [f"film {k}" for k in range(40)], "label": [k % 2 for k in range(40)]}


def arrow_of(columns: dict[str, Any]) -> bytes:
    """Return a table as a stream of record batches."""
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


FILES = {
    "train.csv": GOOD_CSV.encode(),
    "train.csv.gz": gzip.compress(GOOD_CSV.encode()),
    "train.jsonl": "".join(f'{{"text": "film {k}", "label": {k % 2}}}\n' for k in range(40)).encode(),
    "train.parquet": parquet_of(ROWS),
    "train.tsv": GOOD_CSV.replace(",", "\t").encode(),
    "train.csv.zst": pa.Codec("zstd").compress(GOOD_CSV.encode(), asbytes=True),
    "train.arrow": arrow_of(ROWS),
}
ADAPTER = {
    "adapter_config.json": json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}).encode(),
    "adapter_model.safetensors": save({"prompt_embeddings": np.zeros((20, 128), dtype=np.float32)}),
}


TOKENS = [b"\n", b'"', b"{", b"[", b"]", b"}", b",", b"null", b"1e999", b"-1", b"NaN", b"\0", b"9" * 30]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a content in which some bytes are others, gone, or more; or a part of it that comes twice."""
    for _ in range(draw(st.integers(1, 4))):
        at, start = (draw(st.integers(0, max(len(content) - 1, 0))) for _ in range(2))
        length = draw(st.sampled_from([0, 1, 2, 8, 64, len(content)]))
        inserted = draw(
            st.one_of(st.binary(max_size=12), st.sampled_from(TOKENS), st.just(content[start : start + 64]))
        )
        content = content[:at] + inserted + content[at + length :]
    return content


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
        st.sampled_from(["auto", "all", "soft", "krum", "inf", "nan", "", "embedded"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Hold what the process may take beyond what it has; a test has many cases, none of which may leave more behind."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_BYTES


def refused_or_fine(act: Callable[[], object]) -> None:
    """Do something: it succeeds, or one message says what is wrong; in time."""
    began, message = time.monotonic(), ""
    try:
        act()
    except SettingsError as error:
        message = str(error)
    assert len(message) < 3000 and "\n" not in message, message
    assert time.monotonic() - began < MOST_S


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_here(
        directory, "--federation.rounds=1", "--federation.filter_round=1", "--poison.clients=[3]", "--comm.warmup=0"
    )
    return directory


@times(150)
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_data_files(data: st.DataObject, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data.draw(damaged(FILES[name])))
    tracemalloc.start()
    refused_or_fine(lambda: read_table(tmp_path / name, Layout(wanted=["text", "label"])))
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


TYPES = [
    pa.string(), pa.large_string(), pa.int8(), pa.uint64(), pa.bool_(), pa.float32(), pa.binary(), pa.date32(),
    pa.null(), pa.timestamp("s"), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string()),
    pa.struct([("path", pa.string())]), pa.decimal128(5, 2), pa.map_(pa.string(), pa.int8()),
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_parquet_columns_of_every_type(kind: pa.DataType, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(parquet_of({"text": pa.nulls(6, kind), "label": [0, 1] * 3}))
    refused_or_fine(lambda: read_table(tmp_path / "train.parquet", Layout(wanted=["text", "label"])))


@times(25)
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_data_files_in_a_whole_run(data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "data").mkdir()
    (root / "data" / name).write_bytes(data.draw(damaged(FILES[name])))
    (root / "data" / "test.csv").write_text(GOOD_CSV)
    flags = [*SMALL, "--federation.rounds=0", "--task.name=sst2", f"--task.data={root / 'data'}"]
    refused_or_fine(lambda: run(parse_settings([*flags, f"--output.dir={root / 'run'}"])))
    shutil.rmtree(root)


@times(150)
@given(data=st.data())
def test_recipes(data: st.DataObject, tmp_path: Path) -> None:
    """Damaged text, and values of every type for every setting."""
    import tomli_w

    from fedprompt_mpi.commands.settings import setting_names

    names = data.draw(st.lists(st.sampled_from(sorted(setting_names())), max_size=4, unique=True))
    tables: dict[str, Any] = {}
    for name in names:
        section, _, own = name.partition(".")
        value = data.draw(VALUES)
        if own:
            tables.setdefault(section, {})[own] = value
        else:
            tables[section] = value
    try:
        text = tomli_w.dumps(_without_none(tables)).encode("utf-8", errors="replace")
    except (TypeError, ValueError):
        return
    if data.draw(st.booleans()):
        text = data.draw(damaged(text or b"seed = 1\n"))
    (tmp_path / "recipe.toml").write_bytes(text)
    refused_or_fine(lambda: parse_settings([f"--config={tmp_path / 'recipe.toml'}"]))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value if part is not None] if isinstance(value, list) else value


@times(150)
@given(data=st.data(), name=st.sampled_from(sorted(ADAPTER)))
def test_adapters(data: st.DataObject, name: str, tmp_path: Path) -> None:
    for other, content in ADAPTER.items():
        (tmp_path / other).write_bytes(data.draw(damaged(content)) if other == name else content)
    refused_or_fine(lambda: read_adapter(tmp_path))


@times(30)
@given(data=st.data())
def test_run_directories(data: st.DataObject, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One file of a run is damaged; every command that reads runs is asked."""
    root = tmp_path_factory.mktemp("fuzz")
    directory = root / "run"
    shutil.copytree(finished, directory)
    paths = RunPaths(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    damaged_file = data.draw(st.sampled_from(files))
    damaged_file.write_bytes(data.draw(damaged(damaged_file.read_bytes())))
    command = data.draw(st.sampled_from(["report", "export", "predict", "run"]))
    acts: dict[str, Callable[[], object]] = {
        "report": lambda: report.main([str(directory)], Liveness()),
        "export": lambda: export.main([str(directory), str(root / "adapter")], Liveness()),
        "predict": lambda: predict.main([str(directory), "--text=a fine film"], Liveness()),
        "run": lambda: run_here(
            directory, "--federation.rounds=1", "--federation.filter_round=1", "--output.resume=true"
        ),
    }
    refused_or_fine(acts[command])
    assert paths.directory.exists()
    shutil.rmtree(root)


RECORDS = (
    "rounds.jsonl", "summary.json", "partition.json", "filtered.json", "environment.json", "communication.json"
)  # fmt: skip


@times(150)
@given(key=st.sampled_from(RECORDS), data=st.data())
def test_values_of_every_type_in_records(key: str, data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    """A value deep in a record is another one: what reads all of them is asked."""
    from fedprompt_mpi.report.run_data import read_run

    directory = tmp_path / "run"
    if not directory.exists():
        shutil.copytree(finished, directory)
    for name in RECORDS:
        shutil.copy(finished / name, directory / name)
    lines = (finished / key).read_text().splitlines() if key == "rounds.jsonl" else [(finished / key).read_text()]
    record: Any = json.loads(lines[-1])
    place = record
    while True:
        inner = [name for name, value in place.items() if isinstance(value, dict) and value]
        if not inner or data.draw(st.booleans()):
            break
        place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
    lines[-1] = json.dumps(record)
    (directory / key).write_text("\n".join(lines) + "\n")
    refused_or_fine(lambda: read_run(directory))
