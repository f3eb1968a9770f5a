"""Flags and TOML files -> checked settings, and the parsers of all commands."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import PromptConfig, RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import read_toml
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

    Raises:
        SettingsError: naming the setting, the value and the remedy.
        PrintedText: if only a text was asked for.
    """
    import jsonargparse

    asks_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=asks_for_help)  # which takes time
    parser = jsonargparse.ArgumentParser(
        prog="fedprompt_mpi run",
        parser_mode="toml",
        exit_on_error=False,
        allow_abbrev=False,
        description="Federated prompt tuning over MPI. Every setting is a flag and a TOML key of the same name.",
    )
    parser.add_argument("--config", action="config", help="TOML file of settings; flags override it")
    parser.add_class_arguments(RunConfig, as_group=False)
    _check_config_files(arguments)
    others = [argument for argument in arguments if argument != "--print_config"]  # the parser would not check them
    config = _build(parse(parser, others))
    check_name(config.task)
    if len(others) < len(arguments):
        import tomli_w

        print(tomli_w.dumps(to_dict(config)), end="")
        raise PrintedText
    return config


def _check_config_files(arguments: Sequence[str]) -> None:
    """Raise SettingsError for a file that is missing, which the parser would take for TOML, or is no TOML."""
    for argument, after in itertools.pairwise([*arguments, ""]):
        name = after if argument == "--config" else argument.removeprefix("--config=")
        if argument != "--config" and name == argument:
            continue
        if not Path(name).is_file():
            raise SettingsError(f"--config is {name!r}, but there is no such file: name a TOML file of settings")
        try:
            read_toml(Path(name))
        except (OSError, ValueError) as error:
            raise SettingsError(f"--config is {name!r}, which cannot be read as TOML: {error}") from error


def _build(parsed: Any) -> RunConfig:
    """Make the typed settings of a parsed namespace, section by section."""
    sections = {}
    for field in dataclasses.fields(RunConfig):
        value = getattr(parsed, field.name)
        kind = field.default_factory
        sections[field.name] = value if kind is dataclasses.MISSING else kind(**vars(value))  # pyright: ignore
    return RunConfig(**sections)


def command_parser(command: str, description: str) -> Any:
    """Return a parser for the flags of a command other than run."""
    import jsonargparse

    return jsonargparse.ArgumentParser(
        prog=f"fedprompt_mpi {command}", exit_on_error=False, allow_abbrev=False, description=description
    )


def parse(parser: Any, arguments: Sequence[str]) -> Any:
    """Parse the flags of a command.

    Raises:
        SettingsError: naming the flag.
        PrintedText: if only the help was asked for.
    """
    import jsonargparse

    try:
        return parser.parse_args(list(arguments))
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


def add_sizes(parser: Any) -> None:
    """Add the flags of a model and of the sizes of its prompt."""
    parser.add_argument("--model", default="embedded", help="hub id, folder, config file, or embedded")
    parser.add_argument("--num_virtual_tokens", type=int, default=20, help="length of the prompt in tokens")
    parser.add_argument("--prefix_hidden_size", type=int, default=512, help="width of the prefix method's perceptron")


def prompt_of(parsed: Any) -> PromptConfig:
    """Return the sizes of the prompt from the flags of `add_sizes`."""
    return PromptConfig(num_virtual_tokens=parsed.num_virtual_tokens, prefix_hidden_size=parsed.prefix_hidden_size)
