"""The command line: which command, which settings, and how a process ends.

Exit status: 0 done; 2 the user's settings or data are wrong (one message, from rank 0); 3 a rank failed;
75 stopped by SIGUSR1, SIGTERM or SIGINT, to be resumed.
"""

import dataclasses
import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedprompt_mpi.comm.channel import RankLost
from fedprompt_mpi.comm.faults import end_job, end_process, end_together, fail
from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.comm.stop import STOPPED, Stopped, listen
from fedprompt_mpi.config import PromptConfig, RunConfig, SettingsError, without_none
from fedprompt_mpi.files import CannotWriteError, read_toml

USAGE = """\
usage: mpirun -n N python -m fedprompt_mpi [run] [--config FILE.toml] [--section.setting VALUE ...]
       mpirun -n N python -m fedprompt_mpi bench [--model NAME] [--sizes '[BYTES, ...]'] [--dir DIR]
       mpirun -n N python -m fedprompt_mpi doctor
                   python -m fedprompt_mpi sweep RECIPE.toml... [--launch 'mpirun -n N'] [--seeds '[0, 1, 2]']
                                                 [--data DIR] [--runs DIR] [--section.setting=VALUE ...]
                   python -m fedprompt_mpi report [--watch] RUN... [--dir DIR] [--warmup ROUNDS]
                   python -m fedprompt_mpi predict RUN --text TEXT [--text_b TEXT]
                   python -m fedprompt_mpi export RUN DIR
                   python -m fedprompt_mpi cost [--model NAME] [--num_virtual_tokens V] [--prefix_hidden_size M]

run    federated prompt tuning; rank 0 aggregates, the other ranks hold the clients
       (without mpirun, or with -n 1, one process does all of it)
bench  raw MPI collectives and this program's, side by side over message sizes, and what each method would cost here
doctor where the ranks are, on which cores and GPUs, over which MPI, and what will hurt
sweep  a set of recipes, one after the other: what is done is skipped, what was cut is resumed
report the page of a run, or of several side by side, with the paper's tables; what the phases of a round took
predict  a text's class, by the prompt of a run
export the prompt of a run as a PEFT adapter
cost   parameters and bytes per round of every method, from a model's config alone

python -m fedprompt_mpi run --help lists every setting with its unit and default.
--config FILE.toml is read first, flags override it; lists are written as JSON: --poison.clients '[0, 3]'.
--print_config prints the resolved settings and stops.
"""


TYPE_NAMES = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "text",
    "list": "list in JSON, such as [0, 3]",
    "NoneType": "nothing",
}


class _Stop(Exception):  # noqa: N818 - nothing went wrong
    """The command line asked for text (help, settings), which has been printed."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "run"
        if command not in COMMANDS:
            raise SettingsError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
        COMMANDS[command](arguments)
    except _Stop:
        pass
    except SettingsError as error:
        if read_launch().rank == 0:  # every rank has the same error; the others leave without a word
            print(f"fedprompt_mpi: error: {error}", file=sys.stderr, flush=True)
        end_together(2, read_launch())
    except Stopped as stop:
        if read_launch().rank == 0:
            print(f"{stop}; --output.resume true goes on", flush=True)
        end_together(STOPPED, read_launch())
    except RankLost as lost:
        fail(read_launch(), f"cannot go on: {lost}", "--output.resume true goes on with the last checkpoint.")
    except CannotWriteError as error:
        fail(read_launch(), f"cannot write {error}", error.remedy)
    except KeyboardInterrupt:
        end_job(130)
    except Exception:
        fail(read_launch(), "failed", traceback.format_exc())
    end_process(0, alone=HERE.has_lost_others)


def _run(arguments: list[str]) -> None:
    config = parse_settings(arguments)
    listen()
    from fedprompt_mpi.run import run

    run(config)


def parse_settings(arguments: list[str]) -> RunConfig:
    """Turn flags and TOML files into checked settings.

    Raises:
        SettingsError: naming the setting, the value and the remedy.
    """
    import jsonargparse
    import tomli_w

    wants_help = bool({"-h", "--help"} & set(arguments))
    if wants_help:  # reading the field docstrings takes time that a run does not need
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_dumper("toml", lambda settings: tomli_w.dumps(without_none(settings)))
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
    if read_launch().rank and ("--print_config" in arguments or wants_help):
        raise _Stop
    try:
        parsed = parser.parse_args(arguments)
        return _build(parsed)
    except SystemExit as end:
        raise _Stop from end
    except SettingsError:
        raise
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(_one_line(str(error))) from error


def _check_config_files(arguments: Sequence[str]) -> None:
    """Raise SettingsError for a file that is missing, which the parser would take for TOML, or no TOML."""
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


def _one_line(message: str) -> str:
    """Put a parser's indented message into one line, with types as people call them."""
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


def _simple_parser(command: str) -> Any:
    import jsonargparse

    return jsonargparse.ArgumentParser(prog=f"fedprompt_mpi {command}", exit_on_error=False, allow_abbrev=False)


def _parse(parser: Any, arguments: list[str]) -> Any:
    """Parse the few flags of a command other than run.

    Raises:
        SettingsError: naming the flag.
    """
    import jsonargparse

    if read_launch().rank and {"-h", "--help"} & set(arguments):
        raise _Stop
    try:
        return parser.parse_args(arguments)
    except SystemExit as end:
        raise _Stop from end
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(_one_line(str(error))) from error


def _add_sizes(parser: Any) -> None:
    parser.add_argument("--model", default="embedded", help="hub id, folder, config file, or embedded")
    parser.add_argument("--num_virtual_tokens", type=int, default=20, help="length of the prompt in tokens")
    parser.add_argument("--prefix_hidden_size", type=int, default=512, help="width of the prefix method's perceptron")


def _prompt_of(parsed: Any) -> PromptConfig:
    return PromptConfig(num_virtual_tokens=parsed.num_virtual_tokens, prefix_hidden_size=parsed.prefix_hidden_size)


def _cost(arguments: list[str]) -> None:
    parser = _simple_parser("cost")
    _add_sizes(parser)
    parsed = _parse(parser, arguments)
    from fedprompt_mpi.cost import format_cost

    print(format_cost(parsed.model, _prompt_of(parsed)))


def _bench(arguments: list[str]) -> None:
    parser = _simple_parser("bench")
    _add_sizes(parser)
    parser.add_argument("--sizes", type=list[int], default=[], help="more sizes to measure, in bytes")
    parser.add_argument("--largest", type=int, help="largest size, in bytes; by default the whole model's vector")
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long for each size and collective")
    parser.add_argument("--dir", help="where bench.json and the plots go; by default runs/bench-<time>")
    parsed = _parse(parser, arguments)
    for name in ("largest", "seconds"):
        if getattr(parsed, name) is not None and getattr(parsed, name) <= 0:
            raise SettingsError(f"--{name} is {getattr(parsed, name)}: give a number above 0")
    if any(size <= 0 for size in parsed.sizes):
        raise SettingsError(f"--sizes is {parsed.sizes}: give bytes, each above 0")
    from fedprompt_mpi.measure import bench

    directory = Path(parsed.dir or f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
    bench(parsed.model, _prompt_of(parsed), parsed.sizes, parsed.largest, parsed.seconds, directory)


def _doctor(arguments: list[str]) -> None:
    _parse(_simple_parser("doctor"), arguments)
    from fedprompt_mpi.measure import doctor

    doctor()


def _report(arguments: list[str]) -> None:
    parser = _simple_parser("report")
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument(
        "--dir", help="of several runs, where page, figures and tables go; by default runs/report-<time>"
    )
    parser.add_argument("--warmup", type=int, help="rounds to leave out; by default what the runs were told")
    parser.add_argument("--watch", action="store_true", help="write the page of one run anew while it goes on")
    parsed = _parse(parser, arguments)
    from fedprompt_mpi.report.communication import format_communication, read_communication
    from fedprompt_mpi.report.comparison import write_comparison
    from fedprompt_mpi.report.page import watch_report, write_report

    runs = [Path(run) for run in parsed.runs]
    if parsed.watch:
        watch_report(runs[0], lambda page: print(f"page: {page}", flush=True))
    if len(runs) == 1:
        print(f"page: {write_report(runs[0])}")
        if not (runs[0] / "communication.json").exists():
            return  # the run is not at its end
        jobs = 1
    else:
        directory = Path(parsed.dir or f"runs/report-{time.strftime('%Y%m%d-%H%M%S')}")
        page, tables, jobs = write_comparison(runs, directory)
        print(f"page: {page}\n\n{tables}")
    if jobs > 1:
        return
    try:
        print(format_communication(read_communication(runs, warmup=parsed.warmup)))
    except SettingsError as error:
        if len(runs) == 1:
            raise
        print(f"times are not pooled: {error}")


def _sweep(arguments: list[str]) -> None:
    parser = _simple_parser("sweep")
    parser.add_argument("recipes", nargs="+", help="files of settings")
    parser.add_argument("--runs", default="runs", help="folder of the run directories, named after the recipes")
    parser.add_argument("--launch", default="", help="what goes before python, such as 'mpirun -n 11'")
    parser.add_argument("--seeds", type=list[int], default=[], help="run each recipe with each of these seeds")
    parser.add_argument("--data", help="folder that has a folder for each task, named after it")
    settings = [argument for argument in arguments if argument.startswith("--") and "." in argument.split("=")[0]]
    if any("=" not in setting for setting in settings):
        raise SettingsError("sweep wants settings with an equals sign: --section.setting=VALUE")
    parsed = _parse(parser, [argument for argument in arguments if argument not in settings])
    from fedprompt_mpi.sweep import sweep

    status = sweep(
        [Path(recipe) for recipe in parsed.recipes],
        settings,
        runs=Path(parsed.runs),
        seeds=parsed.seeds,
        data=None if parsed.data is None else Path(parsed.data),
        launch=parsed.launch,
        parse=parse_settings,
        say=lambda line: print(line, flush=True),
    )
    end_process(status)


def _predict(arguments: list[str]) -> None:
    parser = _simple_parser("predict")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--text", required=True, help="what is classified")
    parser.add_argument("--text_b", help="of a task of pairs, the second text")
    parsed = _parse(parser, arguments)
    from fedprompt_mpi.predict import load_prompt

    (answer,) = load_prompt(parsed.run).predict([parsed.text], None if parsed.text_b is None else [parsed.text_b])
    print(f"{answer.label} {answer.word} {answer.probability:.4f}")


def _export(arguments: list[str]) -> None:
    parser = _simple_parser("export")
    parser.add_argument("run", help="run directory")
    parser.add_argument("dir", help="new folder for the adapter")
    parsed = _parse(parser, arguments)
    from fedprompt_mpi.export import export

    print(f"adapter in {export(Path(parsed.run), Path(parsed.dir))}")


def _help(arguments: list[str]) -> None:
    print(USAGE, end="")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "bench": _bench,
    "doctor": _doctor,
    "sweep": _sweep,
    "report": _report,
    "predict": _predict,
    "export": _export,
    "cost": _cost,
    "help": _help,
}
