"""Algorithm 1 of FedPrompt (Zhao et al., 2022, arXiv:2208.12268), from its settings to its summary."""

import contextlib
import dataclasses
import time
from typing import Any

from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.federation.federation import Federation, StopRound
from fedprompt_mpi.federation.prepare import prepare
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.stop import Stopped
from fedprompt_mpi.plugins.load import loaded
from fedprompt_mpi.recovery import run_with_recovery
from fedprompt_mpi.rundir.lock import DirectoryLock
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Summary
from fedprompt_mpi.rundir.screen import LiveScreen
from fedprompt_mpi.start.launcher import Origin, read_launch
from fedprompt_mpi.text.tasks import resolve


def run_rounds(federation: Federation) -> Summary | None:
    """Run all rounds that are left; every rank calls this.

    Returns:
        The summary, on rank 0.

    Raises:
        Stopped: on every rank, once the last round done is saved, if a rank was asked to stop.
    """
    start, rounds = federation.rounds_done, federation.config.federation.rounds
    try:
        federation.publish(start)
        for round_ in range(start + 1, rounds + 1):
            federation.filter_examples(round_)
            cohort = federation.draw_cohort(round_)
            updates = federation.train(cohort, round_)
            result = federation.aggregate(updates, round_)
            del updates  # which may be as large as the PLM, before there are new ones
            federation.record(round_, cohort, result)
            federation.save_if_due(round_)
            federation.publish(round_)
        return federation.finish()
    except StopRound:
        federation.stop()


def run(config: RunConfig | None = None, *, liveness: Liveness | None = None) -> dict[str, Any]:
    """Train a prompt by federated learning on all ranks of this job; without mpirun, in this process.

    Args:
        config: the settings, the same on every rank; the defaults train the embedded model.
        liveness: how this process ends if a rank fails; by default nothing ends the process.

    Returns:
        The content of summary.json on rank 0, {} on the others.

    Raises:
        SettingsError: on every rank, if settings or data are wrong.
        Stopped: on every rank, if one was asked to stop; the last round done is saved.
        StalledError: if a rank makes no progress for `comm.deadline_s`.
    """
    started = Origin.since or time.perf_counter()
    config, launch = config or RunConfig(), read_launch()
    if not config.plugin and (plugins := loaded()):  # imported in Python
        config = dataclasses.replace(config, plugin=[plugin.name for plugin in plugins])
    task = resolve(config.task)
    if launch.size is not None:
        check_ranks(config, launch.size)
    liveness = liveness or Liveness(rank=launch.rank, size=launch.size)
    lock = DirectoryLock()
    shown = LiveScreen() if launch.rank == 0 else contextlib.nullcontext()
    with liveness.watched(config.comm.deadline_s), shown as screen:
        channel = open_channel(launch, liveness, config.comm)
        channel.progress.screen = screen
        if liveness.ends_job:
            liveness.stop.listen()
        try:
            check_ranks(config, channel.size)
            setup, checkpoint = prepare(config, task, channel, lock, started)
            summary = run_with_recovery(setup, checkpoint, run_rounds)
        except (SettingsError, Stopped):  # raised on every rank alike
            channel.close()
            raise
        except BaseException:  # perhaps on this rank only: it waits for no other
            liveness.claim_report()
            channel.close(alone=True)
            raise
        finally:
            lock.release()
        channel.close()
    if summary is None:
        return {}
    _write_report(config, setup.paths)
    if config.output.track:
        from fedprompt_mpi.rundir.tracking import track_page

        track_page(to_dict(config), setup.paths)
    return dataclasses.asdict(summary)


def check_ranks(config: RunConfig, size: int) -> None:
    """Raise SettingsError if some of `size` ranks would have no client."""
    clients = config.federation.clients
    if size > clients + 1:
        idle = f"rank {size - 1}" if size == clients + 2 else f"ranks {clients + 1} to {size - 1}"
        raise SettingsError(
            f"federation.clients is {clients} but there are {size} ranks, of which {idle} would stay idle: "
            f"start at most {clients + 1} (rank 0 and one for each client), or have more clients"
        )


def _write_report(config: RunConfig, paths: RunPaths) -> None:
    if not config.output.report:
        return
    from fedprompt_mpi.report.page import write_report

    try:
        print(f"report in {write_report(paths.directory)}", flush=True)
    except Exception as error:  # the run is done even without its page
        print(f"no report could be drawn: {error!r}", flush=True)
