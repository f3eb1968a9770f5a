"""What a run keeps and says: records, checkpoints and lines, on rank 0. Other ranks only hand theirs in."""

import dataclasses
import functools
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.doctor import describe_processors
from fedprompt_mpi.comm.timing import TRANSFERS
from fedprompt_mpi.comm.topology import own_processors
from fedprompt_mpi.comm.traffic import Traffic
from fedprompt_mpi.comm.wire import WIRES
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.console import Console
from fedprompt_mpi.federation.checkpoint import Checkpoint, save_checkpoint
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.privacy import Account
from fedprompt_mpi.federation.server import Aggregation, is_finite
from fedprompt_mpi.prepare import Prepared
from fedprompt_mpi.records import Records
from fedprompt_mpi.scalars import Scalars
from fedprompt_mpi.text.partition import format_table
from fedprompt_mpi.text.tasks import Task

if TYPE_CHECKING:
    from fedprompt_mpi.federation.evaluate import Evaluation


NOTHING_TRAINED: dict[str, Any] = {
    "train_loss": None,
    "cohort": [],
    "update_norms": [],
    "shares": None,
    "dropped": [],
    "aggregated": None,
    "epsilon": None,
    "lost_ranks": [],
    "client_accuracy": None,
    "client_attack_success_rate": None,
    "bytes_down": 0,
    "bytes_up": 0,
    "traffic": None,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Ranks that were lost while the others went on."""

    ranks: list[int]
    """As numbered at the start."""
    round_: int
    """In which the others noticed, and which was repeated."""
    line: int
    """The round whose line in rounds.jsonl tells of it: the last that was done."""
    seconds: float
    """Until the others could go on, without what is done again."""


class Journal:
    """Round by round: the line of a round is complete once its vector has been evaluated, in the round after."""

    def __init__(
        self, config: RunConfig, task: Task, channel: Channel, ready: Prepared, losses: Sequence[Loss]
    ) -> None:
        """Open the run directory and introduce the run, or say that it goes on without some ranks."""
        self.losses = losses
        self.config, self.channel, self.ready = config, channel, ready
        self.is_root = channel.rank == 0
        self.console = Console(speaks=self.is_root, rounds=config.federation.rounds)
        self.pending: dict[str, Any] = ready.checkpoint.record or {"round": 0}
        told = self.pending.setdefault("lost_ranks", [])
        new = [dataclasses.asdict(loss) for loss in losses if loss.line == self.pending["round"]]
        told += [loss for loss in new if loss not in told]
        self.records: Records | None = None
        self._scalars: Scalars | None = None
        dtype = "bfloat16" if ready.backbone.bf16 else "float32"
        cores = describe_processors(sorted(own_processors()))
        fields = (
            channel.first_ranks[channel.rank],
            channel.place.host,
            ready.backbone.device,
            ready.threads,
            cores,
            dtype,
        )
        everyone = channel.collect_text("\t".join(map(str, fields)))
        if self.is_root:
            self.records = Records(ready.directory, config, last_round=ready.checkpoint.round_ - 1)
            if config.output.tensorboard:
                self._scalars = Scalars(ready.directory, first_round=ready.checkpoint.round_)
            self._introduce(self.records, task, everyone)

    def _introduce(self, records: Records, task: Task, everyone: list[str]) -> None:
        config, ready, workers = self.config, self.ready, max(1, self.channel.size - 1)
        rows = [line.split("\t") for line in everyone]
        ranks = [
            {"rank": int(r), "host": host, "node": int(node), "device": device, "threads": int(threads), "cores": cores}
            for (r, host, device, threads, cores, _), node in zip(rows, self.channel.nodes, strict=True)
        ]
        dtype = rows[-1][5]  # a worker's: rank 0 may be on the CPU while they are on GPUs
        mpi = {
            "library": self.channel.library,
            "transport": self.channel.transport,
            "thread_level": self.channel.thread_level,
            "survives": self.channel.survives,
            "clock_resolution_s": self.channel.clock_resolution_s,
        }
        records.write_environment(mpi, ranks, compute_dtype=dtype)
        counts, poisoned = ready.corpus.class_counts, ready.corpus.poisoned
        label_words = ready.corpus.label_words.tolist()
        self._account = self._open_account()
        self.malicious = config.poison.malicious(config.federation.clients)
        records.write_partition(counts, poisoned, label_words, self.malicious)
        if self.losses:
            lost = self.losses[-1]
            self.console.say(
                f"lost rank {', '.join(map(str, lost.ranks))} in round {lost.round_}: its clients go to the {workers} "
                f"workers that are left, on with round {ready.checkpoint.round_ + 1} after {lost.seconds:.1f} s"
            )
            return
        self.console.say(
            f"{task.name}: {config.federation.clients} clients ({config.federation.partition}) on {workers} worker"
            f"{'s' if workers > 1 else ''}; {config.prompt.method}: {ready.method.layout.size:,} parameters, "
            f"{ready.method.layout.size / ready.backbone.num_parameters:.4%} of {config.model.name} "
            f"({dtype}); output in {records.directory}"
        )
        self.console.say(format_table(counts, label_words, poisoned.tolist()))

    def _open_account(self) -> Account:
        from fedprompt_mpi.federation.client import learning_rate

        client, rounds = self.config.client, self.config.federation.rounds
        rate = functools.partial(learning_rate, client, rounds)
        return Account(self.config, self.ready.method.layout.size, rate)

    def arrived(self, seconds: float) -> None:
        """Note when the first global vector had reached this rank."""
        if self.channel.timing.to_first_broadcast_s is None:
            self.channel.timing.to_first_broadcast_s = seconds

    def trained(
        self,
        round_: int,
        cohort: Cohort,
        headers: np.ndarray,
        aggregation: Aggregation,
        own: "list[Evaluation]",
        traffic: tuple[Traffic, Traffic],
        seconds: float,
    ) -> None:
        """Note what a round did.

        Args:
            round_: its number.
            cohort: K clients.
            headers: `[K]` of dtype `HEADER`, the server's own update before them if it has one.
            aggregation: what became of the updates.
            own: K evaluations of the clients' own prompts, or none.
            traffic: what went down and what came up.
            seconds: of the whole round.
        """
        if self.records is None:
            return
        timing, first = self.channel.timing, len(headers) - len(cohort.clients)
        clients = headers[first:]
        finite, shares = is_finite(clients), aggregation.shares
        down, up = traffic
        train_s = np.bincount(cohort.ranks, weights=clients["train_s"], minlength=cohort.size)
        train_s[0] += headers["train_s"][:first].sum()
        evaluated_before = timing.seconds("evaluate", round_ - 1)
        self.pending = {
            "round": round_,
            "train_loss": float(clients["loss"][finite].mean()) if finite.any() else None,
            "cohort": list(cohort.clients),
            "update_norms": [float(norm) if fine else None for norm, fine in zip(clients["norm"], finite, strict=True)],
            "shares": None if shares is None else shares[first:].tolist(),
            "dropped": aggregation.dropped,
            "aggregated": aggregation.aggregated,
            "epsilon": self._account.after(round_),
            "client_accuracy": [rates.accuracy for rates in own] or None,
            "client_attack_success_rate": [rates.attack_success_rate for rates in own] or None,
            "bytes_down": down.bytes,
            "bytes_up": up.bytes,
            "traffic": {"down": dataclasses.asdict(down), "up": dataclasses.asdict(up)},
            "seconds": {
                "train": float(train_s.max()),
                "wait": timing.seconds("wait", round_) + timing.seconds("sync", round_),
                "transfer": sum(timing.seconds(phase, round_) for phase in TRANSFERS),
                "aggregate": timing.seconds("aggregate", round_),
                "evaluate": 0.0,
                "total": seconds - evaluated_before,
            },
        }

    def collect_timings(self) -> None:
        """Bring all ranks' records to rank 0, at a time at which it disturbs nothing; every rank calls this."""
        by_rank = self.channel.collect_timings()
        if self.records is not None:
            self.records.add_timings(dict(zip(self.channel.first_ranks.tolist(), by_rank, strict=True)))

    def save(self, vector: np.ndarray, state: dict[str, np.ndarray]) -> None:
        """Save, on rank 0, what a resume after the round just noted needs."""
        if self.records is None:
            return
        save_checkpoint(self.ready.directory, self.checkpoint(vector, state), self.config)

    def checkpoint(self, vector: np.ndarray, state: dict[str, np.ndarray]) -> Checkpoint:
        """Return, on rank 0, the round just noted."""
        return Checkpoint(vector=vector, round_=self.pending["round"], record=self.pending, state=state)

    def finish_round(self, evaluation: dict[str, Any]) -> None:
        """Write and print the line of the round whose vector has just been evaluated, or was not to be."""
        if self.records is None:
            return
        seconds = dict.fromkeys(("train", "wait", "transfer", "aggregate", "evaluate", "total"), 0.0)
        seconds |= self.pending.get("seconds", {})
        timing, round_ = self.channel.timing, self.pending["round"]
        seconds["total"] += timing.seconds("evaluate", round_)
        seconds["evaluate"] = timing.seconds("evaluate", round_) + timing.seconds("evaluate_clients", round_)
        if "attack_success_rate" in evaluation:
            evaluation["clean_attack_success_rate"] = self.ready.clean_rates.get(self.pending["round"])
        self._last = {"round": 0, **evaluation, **NOTHING_TRAINED, **self.pending, "seconds": seconds}
        self.records.add_round(self._last)
        if self._scalars is not None:
            self._scalars.add_round(self._last)
        self.console.say_round(self._last, self.config.federation.rounds)

    def close(self, vector: np.ndarray, seconds: float) -> dict[str, Any]:
        """Write the prompt and the summary, and print the closing table."""
        peaks = self.channel.collect_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        self.collect_timings()
        if self.records is None:
            return {}
        figures = self.records.write_communication(self.config.comm)
        self.records.write_prompt(self.config, vector, self.ready.method.named(vector), self._last["round"])
        parameters, plm_parameters = self.ready.method.layout.size, self.ready.backbone.num_parameters
        summary = self.records.write_summary(
            {
                "parameters": parameters,
                "plm_parameters": plm_parameters,
                "ratio": parameters / plm_parameters,
                "bytes_per_client_round": WIRES[self.config.comm.wire].bytes_of(parameters),
                "malicious_clients": self.malicious,
                "poisoned_examples": {str(k): int(n) for k, n in enumerate(self.ready.corpus.poisoned) if n},
                **self._local_rates(),
                "seconds_total": seconds,
                "seconds_to_first_broadcast": self.channel.timing.to_first_broadcast_s,
                "peak_rss_bytes": [int(peak) for peak in peaks],
            }
        )
        self.console.say_summary(summary, figures, self.config)
        if self._scalars is not None:
            self._scalars.close()
        if self.config.output.report:
            from fedprompt_mpi.report.page import write_report

            try:
                self.console.say(f"report in {write_report(self.ready.directory)}")
            except Exception as error:  # the run is done, whatever becomes of its picture
                self.console.say(f"no report could be drawn: {error!r}")
        return summary

    def _local_rates(self) -> dict[str, float | None]:
        """Return the mean attack success rate of malicious and of honest clients' own prompts in the last round."""
        rates = self._last["client_attack_success_rate"] or []
        named = [(k, rate) for k, rate in zip(self._last["cohort"], rates, strict=False) if rate is not None]
        means = {}
        for who, is_malicious in (("malicious", True), ("honest", False)):
            own = [rate for client, rate in named if (client in self.malicious) == is_malicious]
            means[f"{who}_clients_attack_success_rate"] = float(np.mean(own)) if own else None
        return means
