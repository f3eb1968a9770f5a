"""Whether what a plug-in registers keeps the contract, and computes the same bits on ranks as in one process."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.plugins.contract import findings
from fedprompt_mpi.plugins.contract_base import BrokenError, expect
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import read_prompt
from fedprompt_mpi.rundir.records import read_rounds

SMALL = (
    "--federation.rounds=2", "--client.steps=2", "--client.batched=1",
    "--task.max_train=100", "--task.max_test=40", "--output.report=false", "--federation.alpha=100",
    "--federation.server_examples=8",
)  # fmt: skip
"""A run of seconds, on the data and the model inside the package."""
WIDTH = 26
"""Of the name of a check."""
LAST_LINES, DEADLINE_S = 3, 600.0


def check_plugins(named: Sequence[str], launch: str) -> None:
    """Load plug-ins, and print what the checks of all that they register find.

    Args:
        named: files, modules or announced names.
        launch: command that starts several ranks, such as "mpirun -n 4"; empty for none.

    Raises:
        SettingsError: if a check has failed.
    """
    load_plugins(named)
    failed = 0
    for one in registry.REGISTRIES:
        for name in one.of_plugins():
            print(f"{one.kind} {name}")
            results = [(f.what, f.holds, f.found) for f in findings(one.kind, name)]
            can_run = all(holds for _, holds, _ in results) and (one.kind != "task" or _makes_examples(name))
            if launch and can_run:
                results.append(_on_ranks(one.kind, name, named, launch))
            for what, holds, found in results:
                print(f"  {'holds ' if holds else 'FAILS '} {what:<{WIDTH}}{found}", flush=True)
                failed += not holds
    if failed:
        raise SettingsError(f"{failed} of the checks of {', '.join(named)} failed")


def _makes_examples(task: str) -> bool:
    """Return False for a task whose examples come from files, which the user has."""
    return registry.tasks[task](TaskConfig()).examples is not None


def _on_ranks(kind: str, name: str, named: Sequence[str], launch: str) -> tuple[str, bool, str]:
    try:
        return "on ranks", True, same_bits(kind, name, named, launch)
    except BrokenError as error:
        return "on ranks", False, str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "on ranks", False, f"{launch}: {error}"


def same_bits(kind: str, name: str, plugins: Sequence[str], launch: str) -> str:
    """Compare a small run in one process with the same run on several ranks.

    Args:
        kind: of what is registered.
        name: of it.
        plugins: to name.
        launch: command that starts several ranks, such as "mpirun -n 4".

    Returns:
        What was found.

    Raises:
        BrokenError: if a run fails, or its prompt or its metrics have other bits.
    """
    setting = next(one.setting for one in registry.REGISTRIES if one.kind == kind)
    flags = [*(f"--plugin={plugin}" for plugin in plugins), *SMALL]
    flags.append(f'--{setting}=["{name}"]' if kind == "metric" else f"--{setting}={name}")
    needed = registry.aggregators[name].least_clients(1) if kind == "aggregator" else 0
    flags.append(f"--federation.clients={max(5, needed)}")
    if kind == "attack":
        flags.append("--poison.clients=[1, 4]")
    with tempfile.TemporaryDirectory(prefix="fedprompt-check-") as folder:
        found = [_run(command, flags, Path(folder) / f"{len(command)}") for command in ([], shlex.split(launch))]
    (one, lines), (several, others) = found
    apart = int((one.view(np.uint32) != several.view(np.uint32)).sum())
    expect(not apart and lines == others, f"{apart} of {one.size:,} numbers differ between one process and {launch}")
    return f"{one.size:,} numbers have the same bits in one process and under {launch}"


def _run(command: list[str], flags: list[str], folder: Path) -> tuple[np.ndarray, list[object]]:
    """Return the final vector of a run, and what its rounds were evaluated to."""
    program = [*command, sys.executable, "-m", "fedprompt_mpi", "run", *flags, f"--output.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=DEADLINE_S, check=False)
    last = " ".join(done.stderr.splitlines()[-LAST_LINES:])
    expect(done.returncode == 0, f"{' '.join(command) or 'one process'}: exit status {done.returncode}: {last}")
    rounds = read_rounds(RunPaths(folder))
    return read_prompt(folder)[0]["vector"], [(record.accuracy, record.metrics) for record in rounds]
