"""Flags and TOML files -> checked settings, and the parsers of all commands."""

import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import (
    LoRAAggregation,
    LoRAConfig,
    PromptConfig,
    RunConfig,
    SettingsError,
    check_names,
    declared,
    from_dict,
    run_config,
    to_dict,
)
from fedprompt_mpi.files import read_toml
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rules.setting import OwnFileError, typed
from fedprompt_mpi.text.tasks import check_name

TYPE_NAMES = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "text",
    "list": "list in JSON, such as [0, 3]",
    "NoneType": "nothing",
}


class PrintedText(Exception):  # noqa: N818 - nothing went wrong
    """The command line asked for a text (help, settings), which has been printed."""


def parse_settings(arguments: Sequence[str]) -> RunConfig:
    """Turn flags and TOML files into checked settings.

    Files are read here, not by the flags' parser, and only names of settings reach it: its own keywords, such as
    `class_path`, which imports, mean nothing in a file or in a flag.

    Raises:
        SettingsError: naming the setting, the value and the remedy.
        PrintedText: if only a text was asked for.
    """
    rest, files, plugins = _take_out(arguments)
    tables = [_read_config(file) for file in files]
    plugins = [*(name for table in tables for name in _plugins_of(table)), *plugins]
    load_plugins(plugins)
    merged: dict[str, Any] = {}
    for table in tables:
        check_names(table)
        _merge(merged, table)
    _merge(merged, _parse_flags(_known_flags(rest)))
    if plugins:
        merged["plugin"] = list(dict.fromkeys(plugins))
    config = from_dict(merged)
    check_name(config.task)
    if "--print_config" in arguments:
        import tomli_w

        print(tomli_w.dumps(to_dict(config)), end="")
        raise PrintedText
    return config


def _take_out(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the other arguments, the names of the files of settings, and the plug-ins."""
    others: list[str] = []
    named: dict[str, list[str]] = {"--config": [], "--plugin": []}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in named:
            named[name].append(value if equals else next(rest, ""))
        else:
            others.append(argument)
    return others, named["--config"], named["--plugin"]


def _plugins_of(table: dict[str, Any]) -> list[str]:
    """Return the plug-ins that a file of settings names.

    Raises:
        SettingsError: if they are no list of texts.
    """
    try:
        return typed(list[str], table.get("plugin", []), "plugin")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _known_flags(arguments: Sequence[str]) -> list[str]:
    """Return the flags that set something, and their values.

    Raises:
        SettingsError: for a flag that is no setting.
    """
    flags, known = [], setting_names()
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.removeprefix("--") in known or argument in ("-h", "--help") or not argument.startswith("--"):
            flags.append(argument)
        elif argument != "--print_config":
            raise SettingsError(f"there is no setting {name!r}: run --help lists all of them")
    return flags


def setting_names() -> set[str]:
    """Return the dotted name of every setting."""
    return {name for name, field in declared() if not dataclasses.is_dataclass(field.default_factory)}


def _parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the settings that are given as flags, as nested tables; environment variables are none."""
    parser = _settings_parser(with_docstrings=not {"-h", "--help"}.isdisjoint(flags))
    return parse(parser, flags, defaults=False).as_dict()


def _settings_parser(*, with_docstrings: bool) -> Any:
    import jsonargparse

    from fedprompt_mpi.commands.help_text import PlainHelp, show_names, without_sections

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=with_docstrings)  # which takes time
    parser = jsonargparse.ArgumentParser(
        prog="fedprompt_mpi run",
        usage="fedprompt_mpi run [--config FILE.toml] [--plugin FILE.py] [--section.setting VALUE ...]",
        formatter_class=PlainHelp,
        parser_mode="toml",
        exit_on_error=False,
        allow_abbrev=False,
        description="Federated prompt tuning over MPI. Every setting is a flag and a TOML key of the same name.",
    )
    parser.add_argument("--config", help="TOML file of settings; flags override it")
    parser.add_class_arguments(run_config(), as_group=False)
    if with_docstrings:
        show_names(parser, {name: field.metadata["names"] for name, field in declared() if field.metadata.get("names")})
        without_sections(parser, {name for name, _ in declared()} - setting_names())
    return parser


def _read_config(name: str) -> dict[str, Any]:
    """Return the tables of a TOML file, whatever they hold.

    Raises:
        SettingsError: if there is no such file, or it is no TOML.
    """
    try:
        return read_toml(Path(name))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise OwnFileError(f"--config is {name!r}, but there is no such file: name a TOML file of settings") from error
    except (OSError, ValueError) as error:
        raise OwnFileError(f"--config is {name!r}, which cannot be read as TOML: {error}") from error


def _merge(tables: dict[str, Any], others: dict[str, Any]) -> None:
    """Put settings into nested tables, over those that are there."""
    for name, value in others.items():
        if isinstance(value, dict):
            _merge(tables.setdefault(name, {}), value)
        else:
            tables[name] = value


def command_parser(command: str, description: str) -> Any:
    """Return a parser for the flags of a command other than run."""
    import jsonargparse

    from fedprompt_mpi.commands.help_text import PlainHelp

    return jsonargparse.ArgumentParser(
        prog=f"fedprompt_mpi {command}",
        exit_on_error=False,
        allow_abbrev=False,
        description=description,
        formatter_class=PlainHelp,
    )


def parse(parser: Any, arguments: Sequence[str], *, defaults: bool = True) -> Any:
    """Parse the flags of a command; with the defaults of those that are not given, if asked for.

    Raises:
        SettingsError: naming the flag.
        PrintedText: if only the help was asked for.
    """
    import jsonargparse

    try:
        return parser.parse_args(list(arguments), defaults=defaults, env=False)
    except SystemExit as end:
        raise PrintedText from end
    except SettingsError:
        raise
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(one_line(str(error))) from error


def one_line(message: str) -> str:
    """Put a parser's indented message into one line, with plain names of types."""
    joined = " ".join(line.strip() for line in message.splitlines() if line.strip())
    several = re.fullmatch(
        r"(.*?): Does not validate against any of the Union .*? Errors: (.*) Given value: (.*)", joined
    )
    if several:
        kinds = re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[[^]]*\]|[^-.]+)", several[2])
        joined = f"{several[1]}: expecting {' or '.join(dict.fromkeys(kinds))}, got {several[3]}"
    for python, plain in TYPE_NAMES.items():
        joined = joined.replace(f"<class '{python}'>", plain)
    joined = re.sub(r"typing\.Literal\[('[^',]*')\]", r"\1", joined)  # a single choice needs no list
    joined = re.sub(r"Expected an? (.*)\. Got value: ", r"expecting \1, got ", joined)
    return joined.replace("typing.Literal", "one of ").replace("Parser key ", "setting ")


def add_plugins(parser: Any) -> None:
    """Add the flag of the plug-ins."""
    parser.add_argument("--plugin", action="append", default=[], help="load this file or module; may be given again")


def add_sizes(parser: Any) -> None:
    """Add the flags of a model and of the sizes of its prompt."""
    add_model(parser)
    parser.add_argument("--num_virtual_tokens", type=int, default=20, help="length of the prompt in tokens")
    parser.add_argument("--prefix_hidden_size", type=int, default=512, help="width of the prefix method's perceptron")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank of the method lora")
    ways = typing.get_args(LoRAAggregation)
    parser.add_argument("--lora_aggregation", choices=ways, default="factors", help="with freeze_a B alone is sent")


def add_model(parser: Any) -> None:
    """Add the name of a model, with or without its flag."""
    parser.add_argument("name", nargs="?", help="of the model: hub id, folder, config file, or embedded")
    parser.add_argument("--model", help="the same")


def model_of(parsed: Any) -> str:
    """Return the name of the model from the flags of `add_model`.

    Raises:
        SettingsError: if there are two.
    """
    if parsed.name is not None and parsed.model is not None:
        raise SettingsError(f"there are two models, {parsed.name!r} and --model {parsed.model!r}: name one")
    return parsed.name or parsed.model or "embedded"


def prompt_of(parsed: Any) -> PromptConfig:
    """Return the sizes of the prompt from the flags of `add_sizes`."""
    sizes = {"num_virtual_tokens": parsed.num_virtual_tokens, "prefix_hidden_size": parsed.prefix_hidden_size}
    return PromptConfig(**sizes, lora=LoRAConfig(rank=parsed.lora_rank, aggregation=parsed.lora_aggregation))
