"""Whatever stands in a file of settings, reading it ends in settings or in one message."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict

GOOD = tomli_w.dumps(to_dict(RunConfig()))
SECTIONS = {field.name: sorted(to_dict(RunConfig()).get(field.name) or {}) for field in dataclasses.fields(RunConfig)
            if dataclasses.is_dataclass(field.default_factory)}  # fmt: skip
VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.text(max_size=20), st.lists(st.integers() | st.text(max_size=5)),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), st.datetimes(),
)  # fmt: skip
fuzz: Callable[..., Any] = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _read(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    message = "fine"
    try:
        assert isinstance(parse_settings([f"--config={file}"]), RunConfig)
    except SettingsError as error:
        message = str(error)
    assert "\n" not in message
    assert 0 < len(message) < 1000


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    _read(tmp_path / "any.toml", content)


@fuzz
@given(at=st.integers(0, len(GOOD)), cut=st.integers(0, 30), put=st.text(max_size=10))
def test_a_good_file_with_a_part_replaced(at: int, cut: int, put: str, tmp_path: Path) -> None:
    _read(tmp_path / "damaged.toml", (GOOD[:at] + put + GOOD[at + cut :]).encode(errors="surrogatepass"))


@fuzz
@given(data=st.data(), section=st.sampled_from(sorted(SECTIONS)), value=VALUES)
def test_any_value_of_any_setting(data: st.DataObject, section: str, value: Any, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(SECTIONS[section]) if SECTIONS[section] else st.text(max_size=5))
    try:
        text = tomli_w.dumps({section: {name: value}})
    except UnicodeEncodeError:
        return  # no TOML at all
    _read(tmp_path / "value.toml", text.encode(errors="surrogatepass"))


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    assert parse_settings([f"--config={tmp_path / 'good.toml'}"]) == RunConfig()


@pytest.mark.parametrize("depth", [50, 5000])
def test_deep_nesting(depth: int, tmp_path: Path) -> None:
    _read(tmp_path / "deep.toml", b"[federation]\nrounds = " + b"[" * depth + b"]" * depth)
