"""One whole run: the paper's Algorithm 1 (Zhao et al., FedPrompt, 2022, arXiv:2208.12268).

Every rank runs this same sequence; what only rank 0 does (aggregate, keep records, speak) sends nothing.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from fedprompt_mpi.comm.channel import Channel, open_channel
from fedprompt_mpi.comm.faults import Watchdog
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.comm.stop import Stopped, is_requested, request
from fedprompt_mpi.comm.traffic import NOTHING, round_traffic
from fedprompt_mpi.comm.wire import WIRES
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.federation.aggregate import check_rule
from fedprompt_mpi.federation.attack import Observer, attacking_clients
from fedprompt_mpi.federation.checkpoint import Memory
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.feedback import ClientFeedback
from fedprompt_mpi.federation.server import Server, is_finite
from fedprompt_mpi.journal import Journal, Loss
from fedprompt_mpi.lock import DirectoryLock
from fedprompt_mpi.prepare import Prepared, prepare, shard_of
from fedprompt_mpi.text.tasks import Task, resolve


def run(config: RunConfig | None = None) -> dict[str, Any]:
    """Train a prompt by federated learning on all ranks of this job; without mpirun, in this process.

    Args:
        config: the settings, the same on every rank; the defaults train the embedded model.

    Returns:
        What summary.json holds, on rank 0; {} on the others.

    Raises:
        SettingsError: on every rank, if settings or data are wrong.
        Stopped: on every rank, if one was asked to stop; the last round that was done is saved.
    """
    started = time.perf_counter()
    config = config or RunConfig()
    task = resolve(config.task)
    check_rule(config.federation, config.comm)
    launch = read_launch()
    check_ranks(config, launch.size)
    watchdog = Watchdog(launch, config.comm.deadline_s)
    watchdog.start()
    channel = open_channel(launch, measure=config.comm.mode == "measure", deadline_s=config.comm.deadline_s)
    losses: list[Loss] = []
    lock = DirectoryLock()
    try:
        ready = prepare(config, task, channel, lock)
        memory = None
        if channel.rank == 0 and channel.survives:
            memory = Memory(config, ready.directory, ready.checkpoint)
        before = channel
        while True:
            try:
                if channel is not before:
                    ready = go_on(config, before, channel, ready, memory, losses)
                    before = channel
                result = federate(config, task, channel, ready, started, memory, losses)
                break
            except Exception as error:
                if not channel.has_lost_a_rank(error):
                    raise
                channel = channel.without_the_lost()
    except (SettingsError, Stopped):  # raised on all ranks alike
        channel.close()
        raise
    except BaseException:  # on this rank perhaps: nobody may wait for the others now
        channel.abandon()
        raise
    finally:
        lock.release()
        watchdog.stop()
    try:
        channel.close()
    except Exception as error:  # whoever is lost now is not needed any more
        if not channel.has_lost_a_rank(error):
            raise
        channel.abandon()
    return result


def go_on(
    config: RunConfig, before: Channel, channel: Channel, ready: Prepared, memory: Memory | None, losses: list[Loss]
) -> Prepared:
    """Return where those who are left go on: after the last round done.

    From there it is as if the run were resumed on fewer ranks, which gives the same bits; nothing is loaded again.

    Args:
        config: the settings.
        before: the channel with the lost ranks.
        channel: the one without them.
        ready: what this rank has.
        memory: of rank 0.
        losses: gets one more.
    """
    round_, start = channel.timing.round_, time.perf_counter()
    is_root = channel.rank == 0
    checkpoint = dataclasses.replace(ready.checkpoint, round_=0) if memory is None else memory.latest()
    done, received = channel.sum(np.array([checkpoint.round_, is_root * channel.timing.received], float)).astype(int)
    channel.timing.take_back(int(received))
    channel.timing.forget_after(int(done))
    ready = dataclasses.replace(
        ready,
        checkpoint=dataclasses.replace(checkpoint, round_=int(done)),
        shard=shard_of(channel, on_gpu=ready.backbone.device.type == "cuda"),
    )
    lost = sorted(set(before.first_ranks.tolist()) - set(channel.first_ranks.tolist()))
    losses.append(Loss(ranks=lost, round_=round_, line=int(done), seconds=time.perf_counter() - start))
    return ready


def check_ranks(config: RunConfig, size: int) -> None:
    """Raise SettingsError if some of `size` ranks would have no client."""
    clients = config.federation.clients
    if size > clients + 1:
        idle = f"rank {size - 1}" if size == clients + 2 else f"ranks {clients + 1} to {size - 1}"
        raise SettingsError(
            f"federation.clients is {clients} but there are {size} ranks, of which {idle} would stay idle: "
            f"start at most {clients + 1} (rank 0 and one for each client), or have more clients"
        )


def check_some_are_finite(config: RunConfig, headers: np.ndarray, round_: int) -> None:
    """Raise SettingsError, on every rank alike, if nobody's honest training came to a finite end.

    A client that diverges beside others that do not is only left out, as is one that ruins its update on purpose.
    """
    honest = headers[~np.isin(headers["client"], list(attacking_clients(config)))]
    if len(honest) and not is_finite(honest).any():
        raise SettingsError(
            f"client.lr is {config.client.lr}, with which every client diverged in round {round_} (no loss or update "
            "is finite): take a smaller one"
        )


def federate(
    config: RunConfig,
    task: Task,
    channel: Channel,
    ready: Prepared,
    started: float,
    memory: Memory | None = None,
    losses: Sequence[Loss] = (),
) -> dict[str, Any]:
    """Go through the rounds, from the one after the checkpoint.

    Round t sends the vector that round t - 1 made, and evaluates it on arrival, so that evaluation costs no
    broadcast of its own; a last broadcast brings the final vector.
    """
    from fedprompt_mpi.federation.evaluate import evaluate, evaluate_clients
    from fedprompt_mpi.federation.local import finish_updates, make_attacks, make_jobs, steps_by_rank, train_rank

    corpus, backbone, method = ready.corpus, ready.backbone, ready.method
    rounds, size = config.federation.rounds, channel.size
    first, wire_up = ready.checkpoint.round_ + 1, WIRES[config.comm.wire]
    server = Server(ready.checkpoint.vector, config, is_root=channel.rank == 0)
    server.restore(ready.checkpoint.state)
    feedback = ClientFeedback(wire_up, config.federation.clients, method.layout.size, channel)
    if first > 1:
        feedback.restore(ready.checkpoint.state)
    observer = _resumed_observer(config, channel, ready)
    journal = Journal(config, task, channel, ready, losses)
    timing = channel.timing
    try:
        for round_ in range(first, max(rounds, first - 1) + 2):
            clock = time.perf_counter()
            cohort = draw_cohort(config, size, round_)
            timing.round_ = round_
            steps = steps_by_rank(config, corpus, method, cohort)
            channel.watch_progress(journal.console.start_steps(int(steps.max())), steps)
            wire_down = server.broadcast(channel, method.layout.fingerprint)
            journal.arrived(time.perf_counter() - started)
            before = observer.state()  # as the round before left it
            if channel.stopping and round_ <= rounds:
                stop(round_, journal, server, before, feedback)
            observer.see(server.vector)

            timing.round_ = round_ - 1  # what has arrived is the work of the round before
            if is_evaluated(config, round_ - 1):
                rates = evaluate(config, channel, backbone, method, server.vector, corpus, ready.shard)
                if rates is None:
                    stop(round_, journal, server, before, feedback)
                journal.finish_round(dataclasses.asdict(rates))
            else:
                journal.finish_round({})
            if round_ > rounds:
                break
            timing.round_ = round_
            attacks = make_attacks(config, cohort, channel.rank, observer)
            jobs = make_jobs(config, corpus, cohort, channel.rank, round_, attacks)
            evaluates_clients = config.output.evaluate_clients and is_evaluated(config, round_)
            headers, deltas = train_rank(
                config,
                corpus,
                backbone,
                method,
                server.vector,
                jobs,
                round_,
                channel,
                may_give_up=wire_up.exact and not evaluates_clients,  # nobody needs the update before all hear of it
            )
            own = []
            if evaluates_clients:
                own = evaluate_clients(config, channel, backbone, method, server.vector, deltas, corpus, cohort)
            with timing.phase("pack"):
                finish_updates(config, headers, deltas, attacks, feedback, round_)
            headers["asked_to_stop"] = is_requested()
            gathered = channel.gather(headers, deltas, cohort.counts, wire_up)
            if gathered.headers["given_up"].any():
                stop(round_, journal, server, before, feedback)
            if gathered.headers["asked_to_stop"].any():
                request()  # rank 0 tells all with the next broadcast
            check_some_are_finite(config, gathered.headers, round_)
            aggregation = server.apply(gathered, timing, round_)
            down, up = round_traffic(
                channel.nodes,
                np.bincount(cohort.ranks, minlength=size),
                method.layout.size,
                collective=config.comm.collective,
                wire_down=wire_down,
                wire_up=wire_up,
            )
            if not aggregation.aggregated:  # then nothing was asked for
                up = NOTHING
            journal.trained(round_, cohort, gathered.headers, aggregation, own, (down, up), time.perf_counter() - clock)
            if wants_checkpoint(config, round_):
                save(journal, server, observer.state(), feedback)
            elif memory is not None and wire_up.exact:
                memory.remember(journal.checkpoint(server.vector, {**server.state(), **observer.state()}))
        return journal.close(server.vector, time.perf_counter() - started)
    finally:
        journal.console.close()


def save(journal: Journal, server: Server, observed: dict[str, np.ndarray], feedback: ClientFeedback) -> None:
    """Bring to rank 0, and save, what a resume after the round last noted needs; every rank calls this."""
    with journal.channel.timing.phase("checkpoint"):
        journal.collect_timings()
        left_behind = feedback.collect()
        journal.save(server.vector, {**server.state(), **observed, **left_behind})


def stop(
    round_: int,
    journal: Journal,
    server: Server,
    observed: dict[str, np.ndarray],
    feedback: ClientFeedback,
) -> NoReturn:
    """Leave in this round, as if it had not begun; every rank calls this.

    Raises:
        Stopped: once the round before is saved.
    """
    if round_ > 1:  # also if it has been saved: what is noted since of ranks that were lost is not
        save(journal, server, observed, feedback)
    raise Stopped(f"stopped on request after round {round_ - 1}")


def is_evaluated(config: RunConfig, round_: int) -> bool:
    """Tell whether the vector that a round made is evaluated."""
    return round_ % config.output.evaluate_every == 0 or round_ >= config.federation.rounds


def wants_checkpoint(config: RunConfig, round_: int) -> bool:
    """Tell whether a round's end is saved."""
    return round_ % config.output.checkpoint_every == 0 or round_ >= config.federation.rounds


def _resumed_observer(config: RunConfig, channel: Channel, ready: Prepared) -> Observer:
    """Return what an attacker has seen; in a resumed run every rank is sent what only rank 0 has kept."""
    observer, checkpoint = Observer(config.poison), ready.checkpoint
    if observer.watches and checkpoint.round_ > 0:
        before = checkpoint.state.get("vector_before")
        before = np.zeros(ready.method.layout.size, dtype=np.float32) if before is None else before
        with channel.timing.mute():
            channel.broadcast(before, ready.method.layout.fingerprint)
        observer.see(before)
    return observer
