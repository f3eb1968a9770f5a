"""The command sync: a run, finished or not, into MLflow, W&B or TensorBoard, as `output.track` does during a run."""

from collections.abc import Sequence
from pathlib import Path

from fedprompt_mpi.commands.report import runs_in
from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.liveness.liveness import Liveness


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Hand over every round of some runs."""
    from fedprompt_mpi.rundir.tracking import TRACKERS

    parser = command_parser("sync", "runs into MLflow, W&B or TensorBoard, as output.track does during a run")
    parser.add_argument("runs", nargs="+", help="run directories, and folders of them")
    parser.add_argument("--to", required=True, help=f"one of {', '.join(TRACKERS)}")
    parsed = parse(parser, arguments)
    if parsed.to not in TRACKERS:
        raise SettingsError(f"--to is {parsed.to!r}: choose one of {', '.join(TRACKERS)}")
    for run in [run for named in parsed.runs for run in runs_in(Path(named))]:
        print(f"{run}: {sync(run, parsed.to)} rounds in {parsed.to}", flush=True)


def sync(run: Path, tracker: str) -> int:
    """Hand every round, the settings and the page of a run to a tracker; return the number of rounds.

    Raises:
        SettingsError: if it is no run, the tracker's packages are missing, or it takes nothing.
    """
    from fedprompt_mpi.report.run_data import read_run
    from fedprompt_mpi.rundir.paths import RunPaths
    from fedprompt_mpi.rundir.tracking import Tracking, missing_packages

    if missing := missing_packages([tracker]):
        raise SettingsError(
            f"--to is {tracker}, which needs packages that are not here: pip install {' '.join(missing)}"
        )
    data = read_run(run)
    tracking = Tracking([tracker], RunPaths(run), data.settings, first_round=0)
    for record in data.rounds:
        tracking.add_round(record)
    tracking.add_page()
    tracking.close("FINISHED" if data.summary is not None else "RUNNING")
    if tracking.failed:
        raise SettingsError(f"{run} could not be handed to {tracker}, which says why above")
    return len(data.rounds)
