"""The command sweep: a set of recipes, one run after the other; what is done is skipped, what was cut is resumed."""

import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedprompt_mpi.comm.stop import STOPPED
from fedprompt_mpi.comparable import RUN, differences, dotted
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import read_toml


def sweep(
    recipes: Sequence[Path],
    flags: Sequence[str],
    *,
    runs: Path,
    seeds: Sequence[int],
    data: Path | None,
    launch: str,
    parse: Callable[[list[str]], RunConfig],
    say: Callable[[str], None],
) -> int:
    """Run every recipe with every seed, each in a directory of its own.

    Args:
        recipes: files of settings; a run's directory is `runs / name`, with seeds `runs / name-seed<N>`.
        flags: of the program, for every run.
        runs: folder of the run directories.
        seeds: none for the recipe's own.
        data: folder that has a folder for each task, named after it.
        launch: what goes before python, such as "mpirun -n 11".
        parse: makes settings of flags.
        say: called with a line about each run.

    Returns:
        The exit status: 0 if all are done; 75 if the sweep was asked to stop, as the run under way was; else that of
        the first run that failed.

    Raises:
        SettingsError: before anything runs, if two recipes have one name, the settings of one are wrong, or what is
            done in its directory was done with others.
    """
    names = [recipe.stem for recipe in recipes]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SettingsError(f"two recipes are named {sorted(twice)[0]!r}: their runs would share a directory")
    plans = []
    for recipe, seed in itertools.product(recipes, seeds or [None]):
        place = runs / (recipe.stem if seed is None else f"{recipe.stem}-seed{seed}")
        own = _settings(recipe, seed, place, data, flags)
        plans.append((place, own, _is_done(place, parse(own))))
    failed = 0
    for number, (place, own, is_done) in enumerate(plans, start=1):
        where = f"{number}/{len(plans)} {place}"
        if is_done:
            say(f"{where}: is done")
            continue
        say(f"{where}: {'goes on' if (place / 'checkpoint').exists() else 'begins'}")
        place.parent.mkdir(parents=True, exist_ok=True)
        command = [*shlex.split(launch), sys.executable, "-m", "fedprompt_mpi", "run", *own]
        status, asked_to_stop = _run(command, place.parent / f"{place.name}.log")
        if status:
            say(f"{where}: exit status {status}, see {place}.log")
            failed = failed or status
        if asked_to_stop or status == STOPPED:
            return STOPPED
    return failed


def _settings(recipe: Path, seed: int | None, place: Path, data: Path | None, flags: Sequence[str]) -> list[str]:
    """Return the flags of one run."""
    try:
        task = read_toml(recipe).get("task", {}).get("name", "embedded")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{recipe} cannot be read as a recipe ({error})") from error
    own = [f"--config={recipe}", f"--output.dir={place}", "--output.resume=true"]
    own += [] if seed is None else [f"--seed={seed}"]
    own += [] if data is None else [f"--task.data={data / task}"]
    return [*own, *flags]


def _is_done(place: Path, config: RunConfig) -> bool:
    """Tell whether a directory has the run to its end.

    Raises:
        SettingsError: if it has another one.
    """
    if not (place / "summary.json").exists():
        return False
    differs = differences(dotted(read_toml(place / "config.toml"), RUN), dotted(to_dict(config), RUN))
    if differs:
        raise SettingsError(
            f"{place} is done with other settings ({', '.join(differs)}): give the sweep another --runs"
        )
    return True


def _run(command: list[str], log: Path) -> tuple[int, bool]:
    """Run a command to its end; returns its exit status, and whether this process was asked to stop meanwhile.

    Such a request is passed on, so that the run saves what it has; nothing is left behind.
    """
    asked = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        process.send_signal(number)

    with log.open("ab") as output:
        # a session of its own: a terminal's Ctrl-C reaches it once, from here
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            return process.wait(), asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
