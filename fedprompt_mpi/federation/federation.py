"""The federation as one rank holds it. Its methods are the steps of Algorithm 1 (Zhao et al., 2022, arXiv:2208.12268).

Every rank calls the same methods in the same order. Steps that only rank 0 takes (aggregate, keep records, print) send
nothing.
"""

import dataclasses
import functools
import math
import resource
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from fedprompt_mpi.comm.codec import FLOAT32, make_codec
from fedprompt_mpi.comm.placement import describe_processors, own_processors
from fedprompt_mpi.comm.timing import RECORD, TRANSFERS
from fedprompt_mpi.comm.traffic import NOTHING, Journey, Traffic, to_root
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.federation.adversary import Observer, attacking_clients, make_attacks
from fedprompt_mpi.federation.cohort import Cohort, draw_cohort
from fedprompt_mpi.federation.collusion import connect, meet
from fedprompt_mpi.federation.feedback import ClientFeedback
from fedprompt_mpi.federation.prepare import run_on_all_ranks
from fedprompt_mpi.federation.privacy import Account
from fedprompt_mpi.federation.server import Aggregation, Server, make_rule
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.state import FIRST, keeps_first
from fedprompt_mpi.federation.updates import (
    HEADER,
    PUBLIC_HEADER,
    LocalUpdates,
    announce,
    everybody_diverged,
    gather,
    is_finite,
)
from fedprompt_mpi.liveness.stop import Stopped
from fedprompt_mpi.plugins.load import loaded
from fedprompt_mpi.rundir.checkpoint import Checkpoint, InMemoryCheckpoint, save_checkpoint
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.formats import format_rows
from fedprompt_mpi.rundir.journal import Journal, versions
from fedprompt_mpi.rundir.records import (
    ClientRecord,
    Closing,
    Environment,
    EvaluationSplit,
    OwnRates,
    PartitionRecord,
    RankFailure,
    RankRecord,
    Rates,
    RoundRecord,
    RoundTraffic,
    Seconds,
    Summary,
    read_record,
    reading,
)
from fedprompt_mpi.text.partition import format_table

if TYPE_CHECKING:
    from fedprompt_mpi.federation.audit import Audit
    from fedprompt_mpi.federation.secure_round import SecureRound

MOST_ROUNDING = 0.01
"""Rounding error of a sum, relative to it, beyond which a bound is called too large."""
MOST_ROUNDS_OF_RANKS = 2**14
"""Rounds of single ranks, of some ten records each, after which rank 0 has collected the timings at the latest."""


class StopRound(Exception):  # noqa: N818 - nothing went wrong
    """A rank was asked to stop: the round is given up or does not begin. Raised on every rank alike."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """The result of one round at rank 0."""

    headers: np.ndarray
    """`[K]` of dtype `HEADER` or `PUBLIC_HEADER`, the server's own update before the clients' if it has one."""
    came: np.ndarray
    """`[K]` bool, whose update has come."""
    aggregation: Aggregation
    own_rates: list[OwnRates]


class Federation:
    """What one rank holds for the rounds of a run."""

    def __init__(self, setup: Setup, checkpoint: Checkpoint, failures: Sequence[RankFailure] = ()) -> None:
        """Start, or continue, from a checkpoint; every rank calls this.

        Args:
            setup: from `prepare`.
            checkpoint: the state after the last round done; its content is valid on rank 0 alone.
            failures: the rank failures of this job.
        """
        config, channel = setup.config, setup.channel
        self.setup, self.config, self.channel, self.phases = setup, config, channel, channel.phases
        self.rounds_done = checkpoint.round_
        self.server = Server(checkpoint.vector, config, is_root=setup.is_root, pairs=setup.method.pairs)
        self._first = checkpoint.state.get(FIRST)
        """The vector that the run began with, on rank 0, as long as it may begin again."""
        if keeps_first(config, self.rounds_done) and self._first is None and setup.is_root:
            self._first = np.array(checkpoint.vector)
        self._began_again = False
        """From before a round until it is done."""
        self._secure: SecureRound | None = None
        """The round's secure aggregation, if the settings ask for it."""
        self._has_told_rounding = False
        self._audit: Audit | None = None
        """Of what the rounds send, if the settings ask for it."""
        if config.privacy.audit:
            from fedprompt_mpi.federation import audit

            self._audit = run_on_all_ranks(channel, lambda: audit.Audit(setup, self.rounds_done))
            if config.privacy.secure_aggregation and setup.is_root:
                self.server.last_sum = np.zeros(setup.method.layout.size, dtype=np.float32)
        self.server.restore(checkpoint.state)
        self._codec = make_codec(config.comm)
        self._feedback = ClientFeedback(self._codec, config.federation.clients, setup.method.layout.size, channel)
        self._observer = Observer(config.poison)
        connect(config, channel)
        self._filtered: FilterRecord | None = None
        """What the example filter did; on rank 0."""
        if self.rounds_done >= (config.federation.filter_round or math.inf):
            self._leave_out_again()
        if self.rounds_done:
            self._feedback.restore(checkpoint.state)
            self._restore_observer(checkpoint)
        told = [failure for failure in failures if failure.line == self.rounds_done]
        known = [*checkpoint.record.lost_ranks, *(new for new in told if new not in checkpoint.record.lost_ranks)]
        self._record = dataclasses.replace(checkpoint.record, lost_ranks=known)
        self.memory: InMemoryCheckpoint | None = None
        """The state to continue from if another rank is lost; on rank 0, where the job survives that."""
        self._to_first_broadcast_s: float | None = None
        self._backdoor = self._vector_before = np.zeros(0)
        """The backdoor's direction at the last broadcast, and that vector, if its signal is measured."""
        self._down = FLOAT32
        self._round_began = time.perf_counter()
        self._journal: Journal | None = None
        everyone = channel.collect("\t".join(map(str, self._describe_rank())).encode())
        if setup.is_root:
            self._journal = Journal(setup.paths, config, channel.progress.screen, done=self.rounds_done)
            self._introduce(self._journal, [line.decode().split("\t") for line in everyone], failures)

    # the steps of the loop

    def publish(self, round_: int) -> None:
        """Broadcast the global vector after a round, evaluate it, and write the line of the round.

        The next round starts from this broadcast, to which it is therefore attributed.

        Raises:
            StopRound: if a rank was asked to stop and there are rounds left.
        """
        self._round_began = time.perf_counter()
        self.phases.timing.round = round_ + 1
        screen = self.channel.progress.screen
        if screen is not None:
            self.channel.progress.is_watched = screen.has_bar
        layout = self.setup.method.layout
        is_stopping = announce(self.channel, layout.size, layout.fingerprint)
        self._down = self.server.broadcast(self.channel)
        if self._to_first_broadcast_s is None:
            self._to_first_broadcast_s = time.perf_counter() - self.setup.started
        if is_stopping and round_ < self.config.federation.rounds:
            raise StopRound
        rates = None
        self._look_for_backdoor(round_)
        if self.is_evaluated(round_):
            from fedprompt_mpi.federation.evaluate import evaluate, texts_to_evaluate

            console = self._journal.console if self._journal is not None else None
            tell = None if console is None else console.start_evaluation(round_, texts_to_evaluate(self.setup))
            rates = evaluate(self.setup, self.server.vector, round_, tell)
            if rates is None:
                raise StopRound
            self._check_weights()
        self._finish_line(round_, rates)

    def filter_examples(self, round_: int) -> None:
        """Leave out what the example filter calls poison, if it is due before this round; every rank calls this.

        Raises:
            StopRound: if a rank was asked to stop meanwhile.
        """
        if round_ != self.config.federation.filter_round:
            return
        from fedprompt_mpi.federation.example_filter import filter_examples
        from fedprompt_mpi.federation.example_gradients import FilterGivenUp

        if self._journal is not None:
            self._journal.console.start_filter(round_)
        try:
            rows, self._filtered = filter_examples(self.setup, self.server.vector, round_)
        except FilterGivenUp:
            raise StopRound from None
        self._leave_out(rows)
        if self._journal is not None and self._filtered is not None:
            self._journal.add_filter(self._filtered)
        if self.config.federation.filter_restart and rows.any():  # the same on every rank
            self._begin_again(round_)

    def draw_cohort(self, round_: int) -> Cohort:
        """Return the clients of a round and their ranks, the same on every rank."""
        return draw_cohort(self.config, self.channel.size, round_)

    def train(self, cohort: Cohort, round_: int) -> LocalUpdates:
        """Train this rank's clients of the cohort, malicious ones as their attack says."""
        from fedprompt_mpi.federation.evaluate import evaluate_clients
        from fedprompt_mpi.federation.rank_training import finish_updates, make_jobs, steps_by_rank, train_rank

        setup, vector, progress = self.setup, self.server.vector, self.channel.progress
        if progress.is_watched and self._journal is not None:  # rank 0 shows them, the others only report
            steps = steps_by_rank(setup, cohort)
            progress.watch(self._journal.console.start_steps(round_, int(steps.max())), steps)
        last_update = self._observer.last_update(vector) if self._observer.watches else None
        attacks = make_attacks(self.config, cohort, self.channel.rank, last_update)
        evaluates_clients = self.config.output.evaluate_clients and self.is_evaluated(round_)
        jobs = make_jobs(setup, cohort, round_, attacks)
        # with a short codec, or if clients are evaluated, other ranks need the update before they hear of the request
        may_give_up = self._codec.exact and not evaluates_clients
        headers, deltas = train_rank(setup, vector, jobs, round_, may_give_up=may_give_up)
        own = evaluate_clients(setup, vector, deltas, cohort) if evaluates_clients else []
        updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=own)
        self._check_weights()
        meet(self.config, self.channel, updates, attacks, round_)
        with self.phases.time("pack"):
            finish_updates(self.config, updates, attacks, self._feedback, round_)
        self._feedback.note(cohort.clients)
        headers["asked_to_stop"] = self.phases.liveness.stop.requested
        if self._audit is not None and not headers["given_up"].any():
            self._audit.of_updates(updates, vector, round_)
        return updates

    def _check_weights(self) -> None:
        """Raise ChangedFileError if the PLM's weights are not what was loaded."""
        if self.setup.backbone.weights is not None:
            self.setup.backbone.weights.check()

    def aggregate(self, updates: LocalUpdates, round_: int) -> RoundResult:
        """Gather the updates of all ranks at rank 0 and apply them to the global vector.

        Raises:
            StopRound: if a rank has given the round up.
            SettingsError: on every rank, if every honest client diverged.
        """
        if self.config.privacy.secure_aggregation:
            from fedprompt_mpi.federation.secure_round import SecureRound

            self._secure = SecureRound(self.config, self.channel, updates, round_)
            gathered = self._secure.gather(self.server.judge)
        else:
            gathered = gather(self.channel, updates, self._codec, self.server.judge)
        if gathered.verdict.given_up:
            raise StopRound
        if gathered.verdict.asked_to_stop:
            self.phases.liveness.stop.request()  # rank 0 tells all ranks with the next broadcast
        if gathered.verdict.diverged:  # one that diverges beside others, or spoils its update on purpose, is dropped
            raise everybody_diverged(self.config, round_)
        if gathered.verdict.rounded_away:
            raise SettingsError(
                f"the bound of the updates, {make_rule(self.config).bound:g}, is so large that rounding leaves nothing "
                f"of them in round {round_}: take a smaller one"
            )
        self._observer.note(self.server.vector)
        aggregation = self.server.apply(gathered, self.phases, round_)
        self._tell_about_rounding(aggregation)
        return RoundResult(
            headers=gathered.headers, came=gathered.came, aggregation=aggregation, own_rates=updates.own_rates
        )

    def _tell_about_rounding(self, aggregation: Aggregation) -> None:
        """Warn once if a sum is rounded too much."""
        if self._journal is None:
            return
        rounding = aggregation.rounding or 0.0
        if rounding > MOST_ROUNDING and not self._has_told_rounding:
            self._has_told_rounding = True
            self._journal.console.say(
                f"warning: the bound of the updates is so large that rounding makes {min(rounding, 1.0):.0%} of the "
                "step: give a smaller one"
            )

    def record(self, round_: int, cohort: Cohort, result: RoundResult) -> None:
        """Keep the record of a round; its line is written once its vector has been evaluated."""
        self.rounds_done, self._began_again = round_, False
        if self._audit is not None:
            self._audit.of_step(
                self._honest_and_counted(cohort, result), self.server.vector, self.server.last_sum, round_
            )
        if not self.setup.is_root:
            return
        aggregation, own = result.aggregation, result.own_rates
        clients = result.headers[len(result.headers) - len(cohort.clients) :]
        came = result.came[len(result.came) - len(cohort.clients) :]
        is_public = clients.dtype == PUBLIC_HEADER  # then rank 0 knows neither losses nor norms
        finite, weights = is_finite(clients) & (not is_public), aggregation.weights
        not_finite = clients["client"][~came & ~np.isin(clients["client"], cohort.vanished)].tolist()
        travelled = aggregation.aggregated or (self._secure is not None and self._secure.has_uploaded)
        gone = dataclasses.replace(cohort, vanished=(*cohort.vanished, *not_finite))
        traffic = self._traffic(gone, travelled=travelled)
        spent = self._account.after(round_)
        self._record = RoundRecord(
            round=round_,
            train_loss=float(clients["loss"][finite].mean()) if finite.any() else None,
            cohort=list(cohort.clients),
            update_norms=[float(clients["norm"][k]) if fine else None for k, fine in enumerate(finite)],
            vanished=list(cohort.vanished),
            given_up=aggregation.given_up,
            shares=None if weights is None else weights[len(weights) - len(clients) :].tolist(),
            malicious_share=self.server.malicious_share(clients[came]),
            backdoor_snr=self._backdoor_snr(),
            lora_error=aggregation.lora_error,
            dropped=sorted({*aggregation.dropped, *not_finite}),
            aggregated=aggregation.aggregated,
            epsilon=spent.epsilon,
            epsilon_renyi=spent.renyi,
            client_accuracy=[rates.accuracy for rates in own] or None,
            client_attack_success_rate=[rates.attack_success_rate for rates in own] or None,
            bytes_down=traffic.down.bytes,
            bytes_up=traffic.up.bytes,
            traffic=traffic,
            seconds=self._seconds(round_, cohort, result.headers),
        )

    def _honest_and_counted(self, cohort: Cohort, result: RoundResult) -> list[int]:
        """Return the clients whose own training is in a round's step, as far as rank 0 knows."""
        if not result.aggregation.aggregated:
            return []
        size = len(cohort.clients)
        counts = result.came[len(result.came) - size :].copy()
        if (weights := result.aggregation.weights) is not None:
            counts &= weights[len(weights) - size :] != 0
        counts &= ~np.isin(cohort.clients, list(attacking_clients(self.config)))
        return np.asarray(cohort.clients)[counts].tolist()

    def save_if_due(self, round_: int) -> None:
        """Save a checkpoint if this round has one; else keep the state in memory if ranks may be lost."""
        if round_ % self.config.output.checkpoint_every == 0 or round_ >= self.config.federation.rounds:
            self.save()
            return
        if round_ % max(1, MOST_ROUNDS_OF_RANKS // self.channel.size) == 0:
            self._collect_timings()
        if self.memory is not None and self._codec.exact:
            self.memory.keep(self._checkpoint({}))

    def save(self) -> None:
        """Save a checkpoint after the last round done; every rank calls this."""
        with self.phases.time("checkpoint"):
            sizes = self._collect_timings() + self._feedback.bytes_to_collect
        residuals = self._feedback.collect()
        if self.setup.is_root:
            with self.phases.time("checkpoint"):
                self._count(to_root(self.channel.placement.nodes, sizes))
                save_checkpoint(self.setup.paths, self._checkpoint(residuals), self.config)

    def stop(self) -> NoReturn:
        """Save the last round done, and stop on request; every rank calls this.

        Raises:
            Stopped: always.
        """
        if self.rounds_done and not self._began_again:  # what is saved does not list the ranks that were lost since
            self.save()
        raise Stopped(f"stopped on request after round {self.rounds_done}")

    def finish(self) -> Summary | None:
        """Write the prompt and the summary, and print the closing table; return the summary on rank 0."""
        peaks = self.channel.collect(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024).encode())
        self._collect_timings()
        if self._journal is None:
            return None
        setup, parameters = self.setup, self.setup.method.layout.size
        closing = Closing(
            parameters=parameters,
            plm_parameters=setup.backbone.num_parameters,
            bytes_per_client_round=self._codec.bytes_of(parameters),
            malicious_clients=self.config.malicious,
            poisoned_examples={str(k): int(n) for k, n in enumerate(setup.corpus.poisoned) if n},
            seconds_total=time.perf_counter() - setup.started,
            seconds_to_first_broadcast=self._to_first_broadcast_s,
            peak_rss_bytes=[int(peak) for peak in peaks],
            filter_recall=None if self._filtered is None else self._filtered.recall,
            filter_precision=None if self._filtered is None else self._filtered.precision,
        )
        summary = self._journal.finish(self.server.vector, setup.method.named(self.server.vector), closing)
        if self._audit is not None and (audit := self._audit.finish(np.array(self.server.vector))) is not None:
            self._journal.console.say_audit(audit)
        return summary

    def close(self) -> None:
        """Close what the journal has open, in whatever way the rounds have ended."""
        if self._journal is not None:
            self._journal.close()

    # parts of the steps

    def _leave_out_again(self) -> None:
        """Leave out what the example filter has called poison before this job or this failure."""
        from fedprompt_mpi.federation.example_filter import rows_left_out

        def read() -> np.ndarray:
            if self.setup.is_root:
                file = self.setup.paths.filtered
                self._filtered = read_record(file, FilterRecord)
                with reading(file):
                    return rows_left_out(self.setup, self._filtered)
            return rows_left_out(self.setup, None)

        mine = run_on_all_ranks(self.channel, read)
        with self.phases.timing.mute():
            self._leave_out(self.channel.sum(mine.astype(np.float64)) > 0)

    def _leave_out(self, rows: np.ndarray) -> None:
        """Let clients train on none of these rows of the training table `[N]` bool from here on."""
        self.setup = dataclasses.replace(self.setup, corpus=self.setup.corpus.without(rows))
        if self._audit is not None:
            self._audit.follow(self.setup)

    def _begin_again(self, round_: int) -> None:
        """Go back to the vector that the run began with, before a round; every rank calls this.

        The state of the round before is saved: a stop in this round has nothing newer to save.
        """
        if self.rounds_done:
            self.save()
        self._began_again = True
        if self.setup.is_root:
            self.server.vector[:] = self._first
        pairs = self.setup.method.pairs
        self.server = Server(self.server.vector, self.config, is_root=self.setup.is_root, pairs=pairs)
        size = self.setup.method.layout.size
        self._feedback = ClientFeedback(self._codec, self.config.federation.clients, size, self.channel)
        self._observer = Observer(self.config.poison)
        with self.phases.timing.mute():
            self.server.broadcast(self.channel)
        self._look_for_backdoor(round_ - 1)

    def _look_for_backdoor(self, round_: int) -> None:
        """Note the backdoor's direction at the vector after a round, if its signal is measured."""
        if not self.config.output.backdoor_snr or round_ >= self.config.federation.rounds:
            return
        from fedprompt_mpi.federation.signal import backdoor_direction

        with self.phases.time("evaluate", round_):
            self._backdoor = backdoor_direction(self.setup, self.server.vector)
        if self.setup.is_root:
            self._vector_before = np.array(self.server.vector)

    def _backdoor_snr(self) -> float | None:
        """Return the backdoor's signal-to-noise ratio in the server's last step, if it is measured."""
        if not self.config.output.backdoor_snr:
            return None
        from fedprompt_mpi.federation.signal import backdoor_snr

        return backdoor_snr(self._backdoor, np.asarray(self.server.vector) - self._vector_before)

    def is_evaluated(self, round_: int) -> bool:
        """Return True if the vector after a round is evaluated."""
        return round_ % self.config.output.evaluate_every == 0 or round_ >= self.config.federation.rounds

    def _restore_observer(self, checkpoint: Checkpoint) -> None:
        """Send every rank the vector that only rank 0 has kept."""
        if self._observer.watches:
            before = checkpoint.state.get("vector_before")
            before = np.zeros(self.setup.method.layout.size, dtype=np.float32) if before is None else before
            with self.phases.timing.mute():
                self.channel.broadcast(before)
            self._observer.note(before)

    def _checkpoint(self, residuals: dict[str, np.ndarray]) -> Checkpoint:
        first = {FIRST: self._first} if keeps_first(self.config, self.rounds_done) and self._first is not None else {}
        state = {**self.server.state(), **self._observer.state(), **residuals, **first}
        return Checkpoint(
            vector=self.server.vector,
            round_=self.rounds_done,
            record=self._record,
            state=state,
            numerics=self.setup.numerics,
        )

    def _count(self, traffic: Traffic) -> None:
        """Add the traffic of a checkpoint to the record of the last round."""
        if (known := self._record.traffic) is not None:
            self._record = dataclasses.replace(self._record, traffic=dataclasses.replace(known, checkpoint=traffic))

    def _collect_timings(self) -> np.ndarray:
        """Append the timings of all ranks to the file; return the bytes of each `[R]`, on rank 0."""
        timing, ranks = self.phases.timing, self.channel.placement.original_ranks.tolist()
        by_rank = self.channel.collect(timing.take().tobytes())
        timing.received += 1
        if self._journal is not None:
            records = [np.frombuffer(data, dtype=RECORD) for data in by_rank]
            self._journal.add_timings(dict(zip(ranks, records, strict=True)))
        return np.array([len(data) for data in by_rank] or [0], dtype=np.int64)

    def _finish_line(self, round_: int, rates: Rates | None) -> None:
        if self._journal is None:
            return
        timing, seconds = self.phases.timing, self._record.seconds
        evaluated = timing.seconds("evaluate", round_)
        seconds = dataclasses.replace(
            seconds, total=seconds.total + evaluated, evaluate=evaluated + timing.seconds("evaluate_clients", round_)
        )
        measured = {} if rates is None else dataclasses.asdict(rates)
        if rates is not None:
            measured["clean_attack_success_rate"] = self.setup.clean_rates.get(round_)
        self._record = dataclasses.replace(self._record, seconds=seconds, **measured)
        self._journal.finish_round(self._record)

    def _seconds(self, round_: int, cohort: Cohort, headers: np.ndarray) -> Seconds:
        """Return the seconds of a round so far, as rank 0 sees them; `train` is that of the slowest rank."""
        timing, first = self.phases.timing, len(headers) - len(cohort.clients)
        train_s = np.bincount(cohort.ranks, weights=headers["train_s"][first:], minlength=cohort.size)
        train_s[0] += headers["train_s"][:first].sum()
        evaluated_before = timing.seconds("evaluate", round_ - 1)
        return Seconds(
            train=float(train_s.max()),
            wait=timing.seconds("wait", round_) + timing.seconds("sync", round_),
            transfer=sum(timing.seconds(phase, round_) for phase in TRANSFERS),
            aggregate=timing.seconds("aggregate", round_),
            total=time.perf_counter() - self._round_began - evaluated_before,
        )

    def _traffic(self, cohort: Cohort, *, travelled: bool) -> RoundTraffic:
        secure = self.config.privacy.secure_aggregation
        summed = secure or self.config.comm.collective == "reduce"
        journey = Journey(
            nodes=self.channel.placement.nodes,
            counts=np.bincount(cohort.ranks, minlength=cohort.size),
            size=self.setup.method.layout.size,
            server_rows=int(cohort.server is not None),
            told_weights=1 + len(cohort.clients) if summed else 0,
        )
        came = cohort.came_counts - (np.arange(cohort.size) == 0) * int(cohort.server is not None)
        back = dataclasses.replace(journey, counts=came)
        up = back.up(self._codec, self.config.comm.collective) if travelled else NOTHING
        headers = journey.headers((PUBLIC_HEADER if secure else HEADER).itemsize)
        keys = NOTHING if self._secure is None else self._secure.traffic
        return RoundTraffic(down=journey.down(self._down), up=up, headers=headers, secure=keys)

    def _describe_rank(self) -> tuple[object, ...]:
        """Return rank, host, device, threads and cores of this rank."""
        setup, placement = self.setup, self.channel.placement
        rank = placement.original_ranks[placement.rank]
        cores = describe_processors(own_processors())
        return rank, placement.host, setup.backbone.device, setup.threads, cores

    def _introduce(self, journal: Journal, rows: list[list[str]], failures: Sequence[RankFailure]) -> None:
        """Write environment.json and partition.json, and print the settings, or the ranks that were lost."""
        config, setup, placement = self.config, self.setup, self.channel.placement
        dtype = setup.numerics["arithmetic"]
        ranks = [
            RankRecord(rank=int(rank), host=host, node=int(node), device=device, threads=int(threads), cores=cores)
            for (rank, host, device, threads, cores), node in zip(rows, placement.nodes, strict=True)
        ]
        environment = Environment(
            versions=versions(),
            mpi=placement.mpi,
            compute_dtype=dtype,
            dropout=config.drops_out,
            plugins=loaded(),
            ranks=ranks,
        )
        corpus, workers = setup.corpus, max(1, self.channel.size - 1)
        malicious = config.malicious
        partition = partition_record(corpus.class_counts, corpus.poisoned, corpus.label_words.tolist(), malicious)
        evaluated = EvaluationSplit(
            name=str(corpus.split),
            by_class=np.bincount(corpus.test.labels, minlength=len(corpus.label_words)).tolist(),
            triggered=len(corpus.triggered.labels),
        )
        names = corpus.class_names.tolist() if config.task.labels is not None else None
        partition = dataclasses.replace(partition, class_names=names, evaluation=evaluated)
        journal.begin(environment, partition, is_new_job=not failures)
        self._account = self._open_account()
        if failures:
            lost = failures[-1]
            journal.console.say(
                f"lost rank {', '.join(map(str, lost.ranks))} in round {lost.round}: its clients go to the {workers} "
                f"workers that are left, on with round {self.rounds_done + 1} after {lost.seconds:.1f} s"
            )
            return
        journal.console.say(format_rows(self._head(workers, dtype)))
        for note in corpus.notes.tolist():
            journal.console.say(note)
        journal.console.say(format_table(corpus.class_counts, partition.names, corpus.poisoned.tolist()))

    def _head(self, workers: int, dtype: str) -> list[tuple[str, str]]:
        """Return the rows that say who trains what."""
        config, setup, corpus = self.config, self.setup, self.setup.corpus
        parameters, whole = setup.method.layout.size, setup.backbone.num_parameters
        federation, train = config.federation, int(corpus.class_counts.sum())
        return [
            ("task", f"{setup.task.name}: {train:,} training texts; evaluated on {len(corpus.test.labels):,} of "
                     f"{corpus.split}; {len(corpus.label_words)} classes"),
            ("model", f"{config.model.name}, {whole:,} parameters, computed in {dtype}, "
                      f"dropout {'on' if config.drops_out else 'off'}"),
            ("prompt", f"{config.prompt.method}, {parameters:,} parameters, {parameters / whole:.4%} of the model"),
            ("clients", f"{federation.clients} ({federation.partition}) on {workers} "
                        f"worker{'s' if workers > 1 else ''}, {federation.aggregator}"),
            ("run", str(setup.paths.directory)),
        ]  # fmt: skip

    def _open_account(self) -> Account:
        from fedprompt_mpi.federation.client_training import learning_rate

        rate = functools.partial(learning_rate, self.config.client, self.config.federation.rounds)
        return Account(self.config, self.setup.method.layout.size, rate)


def partition_record(
    class_counts: np.ndarray, poisoned: np.ndarray, label_words: list[str], malicious: list[int]
) -> PartitionRecord:
    """Return which client holds how many examples of each class.

    Args:
        class_counts: `[K, C]` int64.
        poisoned: `[K]` int64.
        label_words: C words.
        malicious: ids of the malicious clients.
    """
    clients = [
        ClientRecord(
            client=k, num_examples=int(row.sum()), by_class=row.tolist(), poisoned=int(extra), malicious=k in malicious
        )
        for k, (row, extra) in enumerate(zip(class_counts, poisoned, strict=True))
    ]
    return PartitionRecord(label_words=label_words, clients=clients)
