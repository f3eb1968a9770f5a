"""README and guides: links lead somewhere, command lines parse, and none is longer than somebody reads."""

import contextlib
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi.cli import COMMANDS
from fedprompt_mpi.commands import settings
from fedprompt_mpi.liveness.liveness import Liveness
from tests.jobs import REPOSITORY
from tests.plugins.conftest import EXAMPLES, forgotten

GUIDES = [path for folder in (".", "fedprompt_mpi", "fedprompt_mpi/*", "launch", "launch/results", "tests")
          for path in sorted(REPOSITORY.glob(f"{folder}/README.md"))]  # fmt: skip
NAMES = [str(path.relative_to(REPOSITORY)) for path in GUIDES]
PLACEHOLDERS = {"METHOD": "soft", "WIRE": "int8", "RECIPE": "sst2-soft.toml", "N": "3", "FILE.toml": "recipes"}
PROGRAM = "python -m fedprompt_mpi"


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(guide: Path) -> set[str]:
    return {_anchor(line.lstrip("#")) for line in guide.read_text().splitlines() if line.startswith("#")}


def _commands(guide: Path) -> list[str]:
    """Return the command lines of the program in a guide, in code blocks and in the text."""
    text, *fenced = re.split(r"^```", guide.read_text().replace("\\\n", " "), flags=re.MULTILINE)
    lines = [line for block in fenced[::2] for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", "".join([text, *fenced[1::2]]))
    found = [line.replace("\n", " ") for line in (*lines, *inline) if PROGRAM in line]
    return [line.split(PROGRAM, 1)[1].strip() for line in found]


def test_there_are_seventeen() -> None:
    assert len(GUIDES) == 17
    assert sum(len(_commands(guide)) for guide in GUIDES) >= 20


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_links_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", guide.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (guide.parent / path).resolve() if path else guide
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_named_files_exist(guide: Path) -> None:
    for name in re.findall(r"`((?:tests|launch|fedprompt_mpi)/[\w/.-]+\.\w+)`", guide.read_text()):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_they_are_short(guide: Path) -> None:
    assert guide.stat().st_size <= (12_000 if guide.parent == REPOSITORY else 16_000)


class _ParsedError(Exception):
    """The flags are right."""


@pytest.mark.parametrize(
    ("guide", "line"), [(name, line) for guide, name in zip(GUIDES, NAMES, strict=True) for line in _commands(guide)]
)
def test_command_lines_parse(guide: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = shlex.split(line)
    words = [re.sub(r"[A-Z][A-Z.a-z]*$", lambda m: PLACEHOLDERS.get(m[0], m[0]), word) for word in words]
    command = words[0] if words and not words[0].startswith("-") else "run"
    assert command in COMMANDS
    if not words or words[0] in ("--help", "--version") or words[1:] == ["--help"]:
        return
    monkeypatch.chdir(REPOSITORY)
    if command == "run":
        if "--plugin" in words:
            plugin = words[words.index("--plugin") + 1]
            (tmp_path / plugin).write_text(EXAMPLES[plugin])
            monkeypatch.chdir(tmp_path)
        with forgotten(), contextlib.suppress(settings.PrintedText):
            settings.parse_settings([word for word in words if word != "run"])
        return
    module, parse = importlib.import_module(f"fedprompt_mpi.commands.{command}"), settings.parse

    def stop_after(parser: Any, arguments: list[str]) -> Any:
        parse(parser, arguments)
        raise _ParsedError

    monkeypatch.setattr(module, "parse", stop_after)
    with pytest.raises(_ParsedError):
        module.main(words[1:], Liveness())
