"""The command report: the page of a run, or of several side by side with the paper's tables."""

from collections.abc import Sequence
from pathlib import Path

from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.rundir.directory import make_output_directory
from fedprompt_mpi.rundir.paths import LOG, RunPaths


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Write pages, and print what the phases of a round take."""
    parser = command_parser("report", "the page of a run, or of several side by side, with the paper's tables")
    parser.add_argument("runs", nargs="+", help="run directories, and folders of them")
    parser.add_argument("--dir", help="folder for the page of several runs; by default runs/report-<time>")
    parser.add_argument("--warmup", type=int, help="rounds to leave out; by default the setting of the runs")
    parser.add_argument("--watch", action="store_true", help="rewrite the page of one run while it runs")
    parsed = parse(parser, arguments)
    runs = [run for named in parsed.runs for run in runs_in(Path(named))]
    if len(runs) == 1 and parsed.dir is not None:
        raise SettingsError("--dir is for the page of several runs; that of one run goes into its own directory")
    if len(runs) > 1 and parsed.watch:
        raise SettingsError(f"--watch is for one run, but {len(runs)} are named")
    if parsed.warmup is not None and parsed.warmup < 0:
        raise SettingsError(f"--warmup is {parsed.warmup}: give a number of rounds from 0")
    if len(runs) == 1:
        _one(runs[0], parsed.warmup, watch=parsed.watch)
    else:
        _several(runs, parsed.dir, parsed.warmup)


def runs_in(named: Path) -> list[Path]:
    """Return a run directory itself, or the runs in a folder of them, as a sweep makes it; logs beside them are none.

    Raises:
        SettingsError: if a folder has no run in it.
    """
    if named.is_file() and named.name.endswith(LOG):
        return []
    if not named.is_dir() or RunPaths(named).config.exists():
        return [named]
    found = sorted(path for path in named.iterdir() if path.is_dir() and RunPaths(path).config.exists())
    if not found:
        raise SettingsError(f"{named} is no run directory, and none is in it: name runs, or the folder of a sweep")
    return found


def _one(run: Path, warmup: int | None, *, watch: bool) -> None:
    from fedprompt_mpi.report.communication import format_communication, read_communication
    from fedprompt_mpi.report.page import watch_report, write_report

    if watch:
        watch_report(run, lambda page: print(f"page: {page}", flush=True))
    is_finished = RunPaths(run).communication.exists()
    if warmup is not None and not is_finished:
        raise SettingsError(f"--warmup is {warmup}, but {run} is not finished: its rounds have no statistics yet")
    print(f"page: {write_report(run)}")
    if is_finished:
        print(format_communication(read_communication([run], warmup=warmup)))


def _several(runs: list[Path], named: str | None, warmup: int | None) -> None:
    from fedprompt_mpi.report.communication import format_communication, read_communication
    from fedprompt_mpi.report.comparison import read_groups, write_comparison

    groups = read_groups(runs)
    if len(groups) > 1 and warmup is not None:
        raise SettingsError(
            f"--warmup is {warmup}, but the runs are {len(groups)} different experiments: only the times of launches "
            "of one job are pooled"
        )
    page, tables = write_comparison(groups, make_output_directory(named, "report"))
    print(f"page: {page}\n\n{tables}")
    if len(groups) > 1:
        return
    try:
        print(format_communication(read_communication(runs, warmup=warmup)))
    except SettingsError as error:
        if warmup is not None:
            raise
        print(f"times are not pooled: {error}")
