"""The command sweep: a set of recipes, each a run; finished runs are skipped, interrupted ones are resumed."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fedprompt_mpi.comm.placement import own_processors
from fedprompt_mpi.commands.settings import add_plugins, command_parser, parse, parse_settings
from fedprompt_mpi.config import RunConfig, SettingsError, from_dict, to_dict
from fedprompt_mpi.files import RunFile, open_to_append, read_toml
from fedprompt_mpi.liveness.exit import end_process
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.stop import STOPPED, requests
from fedprompt_mpi.rules.setting import Comparison
from fedprompt_mpi.rundir.directory import check_content
from fedprompt_mpi.rundir.formats import format_left, format_rate
from fedprompt_mpi.rundir.may_differ import compared, differences
from fedprompt_mpi.rundir.paths import LOG, RunPaths
from fedprompt_mpi.rundir.records import Summary, read_record, read_settings
from fedprompt_mpi.start.front import kept_importer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run of a sweep."""

    directory: Path
    flags: list[str]
    """Of the program, without the run directory."""

    @property
    def command_line(self) -> list[str]:
        """The flags, with the run directory."""
        return [*self.flags, f"--output.dir={self.directory}", "--output.resume=true"]


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Run every recipe, with every seed, and end with the exit status of the sweep."""
    if liveness.size > 1:
        raise SettingsError("sweep starts the ranks of its runs itself: leave mpirun out, and give it to --launch")
    parser = command_parser("sweep", "a set of recipes, each a run; finished ones are skipped, cut ones are resumed")
    parser.add_argument("recipes", nargs="*", help="files of settings; without one, the default settings")
    parser.add_argument("--runs", default="runs", help="folder of the run directories, named after the recipes")
    parser.add_argument("--launch", default="", help="what goes before python, such as 'mpirun -n 11'")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=list[int], default=[], help="run each recipe with each of these seeds")
    parser.add_argument("--data", help="folder that has a folder for each task, named after it")
    add_plugins(parser)
    settings = [argument for argument in arguments if argument.startswith("--") and "." in argument.split("=")[0]]
    if any("=" not in setting for setting in settings):
        raise SettingsError("sweep wants settings with an equals sign: --section.setting=VALUE")
    parsed = parse(parser, [argument for argument in arguments if argument not in settings])
    axes = [axis(setting) for setting in [*(f"--plugin={name}" for name in parsed.plugin), *settings]]
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise SettingsError(f"--seeds is {parsed.seeds}: give each seed once")
    try:
        shlex.split(parsed.launch)
    except ValueError as error:
        raise SettingsError(f"--launch is {parsed.launch!r}, which is no command line ({error})") from error
    recipes = [Path(recipe) for recipe in parsed.recipes] or [Path("default")]
    names = [recipe.stem for recipe in recipes]
    strange = [recipe for recipe in recipes if not re.fullmatch(r"\w[\w.+-]*", recipe.stem)]
    if strange:
        raise SettingsError(f"{str(strange[0])!r}: its run is named after it: name it by letters, digits and . _ + -")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"two recipes are named {twice[0]!r}: their runs would share a directory")
    plans = [
        Plan(
            directory=Path(parsed.runs) / "-".join([recipe.stem, *(name for name, _ in cell if name), *_seed(seed)]),
            flags=recipe_flags(recipe if parsed.recipes else None, seed, parsed.data, [flag for _, flag in cell]),
        )
        for recipe, cell, seed in itertools.product(recipes, list(itertools.product(*axes)), parsed.seeds or [None])
    ]
    alike = sorted({str(plan.directory) for plan in plans if [p.directory for p in plans].count(plan.directory) > 1})
    if alike:
        raise SettingsError(f"two runs would be in {alike[0]}: give values whose letters and digits differ")
    end_process(sweep(plans, launch=parsed.launch, jobs=parsed.jobs))


def axis(setting: str) -> list[tuple[str, str]]:
    """Return the values of a setting in a sweep: the part of a run's name for each, and its flag.

    A list of values, where the setting wants one (or a list of lists, where it wants a list), is an axis of a grid.

    Args:
        setting: as a flag, `--section.name=VALUE`.
    """
    name, _, value = setting.partition("=")
    wants_list = name.removeprefix("--") in LISTS
    values: Any = None
    with contextlib.suppress(ValueError):
        values = json.loads(value)
    if not isinstance(values, list) or not values or name.removeprefix("--") in PAIRS:
        return [("", setting)]
    if wants_list and not all(isinstance(one, list) for one in values):
        return [("", setting)]
    short = name.rpartition(".")[2]
    texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
    return [(f"{short}-{re.sub(r'[^A-Za-z0-9_.+]', '', text) or 'none'}", f"{name}={text}") for text in texts]


def _list_settings() -> tuple[set[str], set[str]]:
    """Return the settings whose value is a list, and those whose value may be a list of lists."""
    lists, nested = set(), set()
    for section in dataclasses.fields(RunConfig):
        if not dataclasses.is_dataclass(kind := section.default_factory):
            continue
        for name, hint in get_type_hints(kind).items():
            inner = [part for one in (hint, *get_args(hint)) if get_origin(one) is list for part in get_args(one)]
            lists |= {f"{section.name}.{name}"} if inner else set()
            is_nested = any(get_origin(part) is list for one in inner for part in (one, *get_args(one)))
            nested |= {f"{section.name}.{name}"} if is_nested else set()
    return lists, nested


LISTS, PAIRS = _list_settings()


def _seed(seed: int | None) -> list[str]:
    return [] if seed is None else [f"seed{seed}"]


def recipe_flags(recipe: Path | None, seed: int | None, data: str | None, settings: Sequence[str]) -> list[str]:
    """Return the flags that run a recipe.

    Args:
        recipe: a file of settings; None for the defaults.
        seed: None for the recipe's own.
        data: folder that has a folder for each task, named after it; None for the recipe's own data.
        settings: flags that come behind it.

    Raises:
        SettingsError: if the recipe cannot be read.
    """
    try:
        tables = {} if recipe is None else read_toml(recipe)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{recipe} cannot be read as a recipe ({error})") from error
    named = [flag.partition("=")[2] for flag in settings if flag.startswith("--task.name=")]
    task = named[-1] if named else from_dict({"task": tables.get("task", {})}).task.name
    own = [] if recipe is None else [f"--config={recipe}"]
    own += [] if seed is None else [f"--seed={seed}"]
    own += [] if data is None else [f"--task.data={Path(data) / task}"]
    return [*own, *settings]


def sweep(plans: Sequence[Plan], *, launch: str = "", jobs: int = 1, say: Callable[[str], None] | None = None) -> int:
    """Run every plan that is not done, several at a time if asked for.

    Args:
        plans: the runs.
        launch: what goes before python, such as "mpirun -n 11".
        jobs: runs at a time. Without a launcher they share the cores, unless OMP_NUM_THREADS says otherwise: threads
            that outnumber cores spend their time waiting for each other.
        say: called with a line about each run; by default it is printed.

    Returns:
        The exit status: 0 if all are done; 75 if the sweep was asked to stop, as the runs under way were; else that of
        the first run that failed.

    Raises:
        SettingsError: before anything runs, if the settings of a run are wrong, or its directory holds a finished run
            with other settings.
    """
    if jobs < 1:
        raise SettingsError(f"--jobs is {jobs}: give a number from 1")
    configs = [parse_settings(plan.command_line) for plan in plans]
    done = [_is_done(plan.directory, config) for plan, config in zip(plans, configs, strict=True)]
    variables = [{} if launch else shared_cores(config, jobs) for config in configs]
    runner = _Runner(launch, len(plans), say or (lambda line: print(line, flush=True)))
    with runner.signals(), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        numbered = zip(itertools.count(1), plans, done, variables, strict=False)
        statuses = list(pool.map(lambda planned: runner.run(*planned), numbered))
    if runner.asked_to_stop or STOPPED in statuses:
        return STOPPED
    return next((status for status in statuses if status), 0)


def shared_cores(config: RunConfig, jobs: int) -> dict[str, str]:
    """Return the variables by which a process of its own computes on its share of the cores, beside others.

    OMP_NUM_THREADS stays as it is if it is set. A run of one client a pass takes one thread anyway, for the same bits
    everywhere.

    Args:
        config: of the run.
        jobs: runs at a time.
    """
    if jobs == 1 or config.client.batched == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(own_processors()) // jobs))}


def _is_done(directory: Path, config: RunConfig) -> bool:
    """Return True if a directory holds the finished run.

    Raises:
        SettingsError: if it holds another one.
    """
    paths = RunPaths(directory)
    if not paths.summary.exists():
        return False
    check_content(paths, own_only=False)
    theirs, ours = read_settings(paths), to_dict(config)
    differs = differences(compared(theirs, Comparison.SWEEP), compared(ours, Comparison.SWEEP))
    if differs:
        raise SettingsError(
            f"{directory} is done with other settings ({', '.join(differs)}): give the sweep another --runs"
        )
    return True


class _Runner:
    """Runs the plans of a sweep as processes, and passes signals on to them."""

    def __init__(self, launch: str, count: int, say: Callable[[str], None]) -> None:
        self._command = [*shlex.split(launch), sys.executable, "-P", "-m", "fedprompt_mpi", "run"]
        self._count, self._say = count, say
        self._began, self._ran, self._left = time.monotonic(), 0, count
        self._running: set[subprocess.Popen[bytes]] = set()
        self.asked_to_stop = False

    def run(self, number: int, plan: Plan, is_done: bool, variables: dict[str, str]) -> int:
        """Run one plan to its end with some more variables, unless it is done; return its exit status."""
        if self.asked_to_stop:
            return STOPPED
        where, paths = f"{number}/{self._count} {plan.directory}", RunPaths(plan.directory)
        if is_done:
            self._left -= 1
            self._say(f"{where}: is done, {self._result(paths)}")
            return 0
        self._say(f"{where}: {'continues' if paths.checkpoints() else 'begins'}")
        plan.directory.parent.mkdir(parents=True, exist_ok=True)
        log = plan.directory.parent / f"{plan.directory.name}{LOG}"
        with open_to_append(RunFile(log.parent, log.name)) as output:
            # a session of its own: a terminal's Ctrl-C reaches the run once, from here
            process = subprocess.Popen(
                [*self._command, *plan.command_line],
                env={**os.environ, **kept_importer(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running.add(process)
        status = process.wait()
        self._running.discard(process)
        if status == STOPPED:
            self.asked_to_stop = True
        self._left -= 1
        self._ran += 1
        if status:
            self._say(f"{where}: exit status {status}, see {log}")
        else:
            self._say(f"{where}: {self._result(paths)}{self._time_left()}")
        return status

    def _result(self, paths: RunPaths) -> str:
        """Return accuracy, attack success rate and time of a finished run."""
        summary = read_record(paths.summary, Summary)
        success = summary.attack_success_rate
        parts = [
            f"accuracy {format_rate(summary.accuracy)}",
            *([] if success is None else [f"ASR {format_rate(success)}"]),
        ]
        return ", ".join([*parts, f"{summary.seconds_total:.1f} s"])

    def _time_left(self) -> str:
        """Return how long the runs that are left will take, if they take as long as those before."""
        if not self._left:
            return ""
        return f"; {format_left((time.monotonic() - self._began) / self._ran * self._left)} left for all"

    def signals(self) -> "_PassedOn":
        """Pass requests to stop on to the runs during a block, so that they save what they have."""
        return _PassedOn(self._pass_on)

    def _pass_on(self, number: int, frame: object) -> None:
        self.asked_to_stop = True
        for process in list(self._running):
            process.send_signal(number)


class _PassedOn:
    """Handles the signals that ask to stop during a block."""

    def __init__(self, handler: Callable[[int, object], None]) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._handler) for number in requests()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
