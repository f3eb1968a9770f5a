"""What a run keeps and says: records, checkpoints and lines, on rank 0. Other ranks only hand theirs in."""

import resource
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import Channel, Gathered
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.console import Console
from fedprompt_mpi.federation.checkpoint import Checkpoint, save_checkpoint
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.prepare import Prepared
from fedprompt_mpi.records import Records
from fedprompt_mpi.text.partition import format_table
from fedprompt_mpi.text.tasks import Task


class Journal:
    """Round by round: the line of a round is complete once its vector has been evaluated, in the round after."""

    def __init__(self, config: RunConfig, task: Task, channel: Channel, ready: Prepared) -> None:
        """Open the run directory and introduce the run."""
        self.config, self.channel, self.ready = config, channel, ready
        self.is_root = channel.rank == 0
        self.console = Console(speaks=self.is_root, rounds=config.federation.rounds)
        self.to_first_broadcast_s: float | None = None
        self.pending: dict[str, Any] = ready.checkpoint.record or {"round": 0}
        self.records: Records | None = None
        dtype = "bfloat16" if ready.backbone.bf16 else "float32"
        fields = (channel.rank, channel.place.host, ready.backbone.device, ready.threads, dtype)
        everyone = channel.collect_text("\t".join(map(str, fields)))
        if self.is_root:
            self.records = Records(ready.directory, config, last_round=ready.checkpoint.round_ - 1)
            self._introduce(self.records, task, everyone)

    def _introduce(self, records: Records, task: Task, everyone: list[str]) -> None:
        config, ready, workers = self.config, self.ready, max(1, self.channel.size - 1)
        rows = [line.split("\t") for line in everyone]
        ranks = [{"rank": int(r), "host": host, "device": dev, "threads": int(t)} for r, host, dev, t, _ in rows]
        dtype = rows[-1][4]  # a worker's: rank 0 may be on the CPU while they are on GPUs
        mpi = {"library": self.channel.library, "transport": self.channel.transport}
        records.write_environment(mpi, ranks, compute_dtype=dtype)
        counts, poisoned = ready.corpus.class_counts, ready.corpus.poisoned
        label_words = ready.corpus.label_words.tolist()
        records.write_partition(counts, poisoned, label_words)
        self.console.say(
            f"{task.name}: {config.federation.clients} clients ({config.federation.partition}) on {workers} worker"
            f"{'s' if workers > 1 else ''}; {config.prompt.method}: {ready.method.layout.size:,} parameters, "
            f"{ready.method.layout.size / ready.backbone.num_parameters:.4%} of {config.model.name} "
            f"({dtype}); output in {records.directory}"
        )
        self.console.say(format_table(counts, label_words, poisoned.tolist()))

    def arrived(self, seconds: float) -> None:
        """Note when the first global vector had reached this rank."""
        if self.to_first_broadcast_s is None:
            self.to_first_broadcast_s = seconds

    def trained(self, round_: int, cohort: Cohort, gathered: Gathered, vector: np.ndarray, seconds: float) -> None:
        """Note what a round did, and save a checkpoint if it is the round for it."""
        if self.records is None:
            return
        headers, config, timing = gathered.headers, self.config, self.channel.timing
        payload = len(headers) * vector.nbytes
        train_s = np.bincount(cohort.ranks, weights=headers["train_s"]).max()
        evaluated_before = timing.seconds("evaluate", round_ - 1)
        self.pending = {
            "round": round_,
            "train_loss": float(headers["loss"].mean()),
            "cohort": list(cohort.clients),
            "update_norms": headers["norm"].tolist(),
            "bytes_down": payload,
            "bytes_up": payload,
            "seconds": {
                "train": float(train_s),
                "wait": timing.seconds("wait", round_),
                "transfer": timing.seconds("broadcast", round_) + timing.seconds("gather", round_),
                "aggregate": timing.seconds("aggregate", round_),
                "evaluate": 0.0,
                "total": seconds - evaluated_before,
            },
        }
        if round_ % config.output.checkpoint_every == 0 or round_ == config.federation.rounds:
            checkpoint = Checkpoint(vector=vector, round_=round_, record=self.pending)
            save_checkpoint(self.records.directory, checkpoint, config)

    def finish_round(self, evaluation: dict[str, Any]) -> None:
        """Write and print the line of the round whose vector has just been evaluated, or was not to be."""
        if self.records is None:
            return
        seconds = self.pending.get("seconds") or dict.fromkeys(
            ("train", "wait", "transfer", "aggregate", "evaluate", "total"), 0.0
        )
        seconds["evaluate"] = self.channel.timing.seconds("evaluate", self.pending["round"])
        seconds["total"] += seconds["evaluate"]
        nothing = {"train_loss": None, "cohort": [], "update_norms": [], "bytes_down": 0, "bytes_up": 0}
        self._last = {"round": 0, **evaluation, **nothing, **self.pending, "seconds": seconds}
        self.records.add_round(self._last)
        self.console.say_round(self._last, self.config.federation.rounds)

    def close(self, vector: np.ndarray, seconds: float) -> dict[str, Any]:
        """Write the prompt and the summary, and print the closing table."""
        peaks = self.channel.collect_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        timings = self.channel.collect_timings()
        if self.records is None:
            return {}
        self.records.add_timings(timings)
        self.records.write_prompt(self.config, vector, self.ready.method.named(vector), self._last["round"])
        parameters, plm_parameters = self.ready.method.layout.size, self.ready.backbone.num_parameters
        summary = self.records.write_summary(
            {
                "parameters": parameters,
                "plm_parameters": plm_parameters,
                "ratio": parameters / plm_parameters,
                "bytes_per_client_round": vector.nbytes,
                "poisoned_examples": {str(k): int(n) for k, n in enumerate(self.ready.corpus.poisoned) if n},
                "seconds_total": seconds,
                "seconds_to_first_broadcast": self.to_first_broadcast_s,
                "peak_rss_bytes": [int(peak) for peak in peaks],
            }
        )
        self.console.say_summary(summary)
        return summary
