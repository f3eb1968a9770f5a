"""The command sweep: a set of recipes, one run after the other; what is done is skipped, what was cut is resumed."""

import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedprompt_mpi.comm.stop import STOPPED
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_toml


def sweep(
    recipes: Sequence[Path],
    flags: Sequence[str],
    *,
    runs: Path,
    seeds: Sequence[int],
    data: Path | None,
    launch: str,
    say: Callable[[str], None],
) -> int:
    """Run every recipe with every seed, each in a directory of its own.

    Args:
        recipes: files of settings; a run's directory is `runs / name`, with several seeds `runs / name-seed<N>`.
        flags: of the program, for every run.
        runs: folder of the run directories.
        seeds: none for the recipe's own.
        data: folder that has a folder for each task, named after it.
        launch: what goes before python, such as "mpirun -n 11".
        say: called with a line about each run.

    Returns:
        The exit status: 0 if all are done; that of a run that was stopped, which ends the sweep; else that of the first
        run that failed.

    Raises:
        SettingsError: if two recipes have one name, or one cannot be read.
    """
    names = [recipe.stem for recipe in recipes]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SettingsError(f"two recipes are named {sorted(twice)[0]!r}: their runs would share a directory")
    plans = [
        (runs / (recipe.stem if len(seeds) < 2 else f"{recipe.stem}-seed{seed}"), recipe, seed)
        for recipe, seed in itertools.product(recipes, seeds or [None])
    ]
    commands = [(place, _command(recipe, seed, place, data, launch, flags)) for place, recipe, seed in plans]
    failed = 0
    for number, (place, command) in enumerate(commands, start=1):
        where = f"{number}/{len(commands)} {place}"
        if (place / "summary.json").exists():
            say(f"{where}: is done")
            continue
        say(f"{where}: {'goes on' if (place / 'checkpoint').exists() else 'begins'}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with (place.parent / f"{place.name}.log").open("ab") as log:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
        if status:
            say(f"{where}: exit status {status}, see {place}.log")
            failed = failed or status
        if status == STOPPED:
            return STOPPED
    return failed


def _command(
    recipe: Path, seed: int | None, place: Path, data: Path | None, launch: str, flags: Sequence[str]
) -> list[str]:
    try:
        task = read_toml(recipe).get("task", {}).get("name", "embedded")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{recipe} cannot be read as a recipe ({error})") from error
    own = [f"--config={recipe}", f"--output.dir={place}", "--output.resume=true"]
    own += [] if seed is None else [f"--seed={seed}"]
    own += [] if data is None else [f"--task.data={data / task}"]
    return [*shlex.split(launch), sys.executable, "-m", "fedprompt_mpi", "run", *own, *flags]
