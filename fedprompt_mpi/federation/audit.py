"""The audit of a run: which rounds are attacked, and what of it is kept."""

import dataclasses
import json
import time
from typing import Any

import numpy as np

from fedprompt_mpi.audit.record import AuditRecord, CanaryRecord, Observation, leaks_of
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.auditor import Auditor
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.updates import LocalUpdates, is_finite
from fedprompt_mpi.rules.setting import typed
from fedprompt_mpi.rundir.records import read_record, write_record


class Audit:
    """What the audit has seen so far; every rank calls the same methods."""

    def __init__(self, setup: Setup, done: int) -> None:
        """Begin, or go on after round `done`."""
        self._setup, self._auditor = setup, Auditor(setup)
        self._seen: list[Observation] = []
        self._seconds, self._canary = 0.0, None
        self._before: np.ndarray | None = None
        file = setup.paths.audit
        if setup.is_root and done and file.exists():
            earlier = read_record(file, AuditRecord)
            self._seen = [seen for seen in earlier.observations if seen.round <= done and seen.view != "public"]
            self._seconds = earlier.seconds

    def follow(self, setup: Setup) -> None:
        """Go on with a setup whose clients leave examples out."""
        self._setup = setup
        self._auditor.follow(setup)

    def of_updates(self, updates: LocalUpdates, vector: Vector, round_: int) -> None:
        """Attack this rank's uploads of a round, which began with a vector, unless rank 0 sees none."""
        if not self._auditor.is_due(round_):
            return
        if self._setup.is_root:
            self._before = np.array(vector)
        if self._setup.config.privacy.secure_aggregation:
            return
        headers, clients = updates.headers, self._setup.config.federation.clients
        is_sent = is_finite(headers) & ~np.isin(headers["client"], updates.cohort.vanished)
        is_honest = ~np.isin(headers["client"], list(attacking_clients(self._setup.config)))
        chosen = np.flatnonzero(is_sent & is_honest & (headers["client"] < clients))
        start = time.perf_counter()
        self._auditor.look_at_uploads(vector, updates.deltas[chosen], headers["client"][chosen].tolist(), round_)
        self._seconds += time.perf_counter() - start

    def of_step(self, clients: list[int], vector: Vector, summed: np.ndarray | None, round_: int) -> None:
        """Attack the step that the clients' updates made of the global vector, and keep what all ranks have seen.

        Args:
            clients: those whose update counts.
            vector: after the round.
            summed: what rank 0 knows of the updates under secure aggregation `[P]`, before noise and optimiser.
            round_: from 1.
        """
        if not self._auditor.is_due(round_):
            return
        start = time.perf_counter()
        if self._before is not None:
            self._auditor.look_at_sum(self._before, np.asarray(vector) - self._before, clients, round_)
            if summed is not None:
                self._auditor.look_at_sum(self._before, summed, clients, round_, "server")
        self._seconds += time.perf_counter() - start
        own = {"seconds": self._seconds, "seen": [dataclasses.asdict(seen) for seen in self._auditor.observations]}
        self._auditor.observations.clear()
        for part in self._setup.channel.collect(json.dumps(own).encode()):
            told: dict[str, Any] = json.loads(part)
            self._seconds = max(self._seconds, told["seconds"])
            self._seen += [typed(Observation, seen) for seen in told["seen"]]
        self._write()

    def finish(self, vector: np.ndarray) -> AuditRecord | None:
        """Attack the final prompt and the mechanism; return what is known, on rank 0."""
        if not self._setup.is_root:
            return None
        config, start = self._setup.config, time.perf_counter()
        self._auditor.look_at_prompt(vector, config.federation.rounds)
        self._seen += self._auditor.observations
        if "canary" in config.privacy.audit:
            from fedprompt_mpi.federation.canary import audit_mechanism

            self._canary: CanaryRecord | None = audit_mechanism(
                config, len(vector), self._setup.channel.phases.liveness.alive
            )
        self._seconds += time.perf_counter() - start
        return self._write()

    def _write(self) -> AuditRecord | None:
        if not self._setup.is_root:
            return None
        record = record_of(self._setup.config, self._seen, self._seconds, self._canary)
        write_record(self._setup.paths.audit, record)
        return record


def record_of(config: RunConfig, seen: list[Observation], seconds: float, canary: CanaryRecord | None) -> AuditRecord:
    """Return the record of an audit under these settings."""
    return AuditRecord(
        method=config.prompt.method,
        mechanism=config.privacy.mechanism,
        secure_aggregation=config.privacy.secure_aggregation,
        batch_size=config.client.batch_size,
        steps=config.client.steps if config.client.epochs is None else None,
        rounds=sorted({one.round for one in seen if one.view != "public"}),
        seconds=seconds,
        leaks=leaks_of(seen),
        canary=canary,
        observations=seen,
    )
