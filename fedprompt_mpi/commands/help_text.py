"""The help of the command line, with types in words: "list of whole numbers, or all" for list[int] | Literal["all"]."""

import argparse
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
SEVERAL = {bool: "true or false values", int: "whole numbers", float: "numbers", str: "texts"}


class PlainHelp(jsonargparse.DefaultHelpFormatter):
    """Formats help, with types in words."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        kind = getattr(action, "_typehint", action.type)
        if kind is None or get_origin(kind) is Literal or str(action.metavar).startswith("{"):  # choices are in front
            return None
        return in_words(kind)

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action).replace("default: null", "default: not set").replace("(type: ", "(")
        return text.replace(", default: )", ")").replace(" (default: )", "")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        strings = action.option_strings
        action.option_strings = [name for name in strings if not name.endswith("+")]  # no flag of this program
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = strings


def in_words(kind: Any) -> str:
    """Return a type hint of a setting in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {_several(parts[0])}"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _several(kind: Any) -> str:
    """Return a type hint of the members of a list in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", ".join(map(_several, parts[:-1])) + f" or {_several(parts[-1])}"
    if origin is list:
        return f"lists of {_several(parts[0])}"
    return SEVERAL.get(kind, in_words(kind))


def show_names(parser: Any, names: Mapping[str, Iterable[str]]) -> None:
    """Show what a setting may name in front of its help, those of plug-ins included.

    Args:
        parser: of the settings.
        names: dotted setting -> names that it accepts.
    """
    for action in parser._actions:
        if action.dest in names:
            action.metavar = "{" + ",".join(sorted(names[action.dest])) + "}"


def without_sections(parser: Any, sections: set[str]) -> None:
    """Leave the flags out of the help that jsonargparse adds for a whole section: they are no settings."""
    for action in parser._actions:
        if action.dest in sections:
            action.help = argparse.SUPPRESS
