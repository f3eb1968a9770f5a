"""The help says in words what a setting may be."""

import re
from typing import Any, Literal

import pytest

from fedprompt_mpi.commands.help_text import in_words
from fedprompt_mpi.commands.settings import PrintedText, parse_settings, setting_names


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "whole number"),
        (str | None, "text"),
        (list[int] | Literal["all"], "list of whole numbers or all"),
        (int | Literal["auto"], "whole number or auto"),
        (list[str | list[str]] | None, "list of texts or lists of texts"),
        (list[str | int | bool], "list of texts, whole numbers or true or false values"),
    ],
)
def test_types_are_words(kind: Any, words: str) -> None:
    assert in_words(kind) == words


def test_every_setting_has_a_line_of_its_own_without_types_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PrintedText):
        parse_settings(["--help"])
    printed = capsys.readouterr().out
    found = re.findall(r"^  --([\w.]+)", printed, re.MULTILINE)
    assert set(found) - {"config"} == setting_names()
    assert not re.search(r"Union|Literal|Optional|null,|\bstr\b|\bint\b|\w\+ |default: \)", printed)
    assert printed.startswith(
        "usage: fedprompt_mpi run [--config FILE.toml] [--plugin FILE.py] [--section.setting VALUE ...]\n"
    )
