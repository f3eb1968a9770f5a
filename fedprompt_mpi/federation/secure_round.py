"""A round of secure aggregation over the channel: rank 0 learns the sum of the updates that came, and who came.

It is SecAgg+ with rank 0 as the server; see `secagg`. The clients of a rank are apart from each other as those of two
ranks are. Between the steps rank 0 passes messages on, which it cannot read:

keys      every client advertises two public keys; rank 0 hands each rank those of its clients' neighbours
shares    every client deals its neighbours shares of its secrets, and checks those that it receives
          (here clients vanish: those that `federation.dropout` has drawn, and those whose update is not finite)
mask      every client scales its update to the bound, turns it into whole numbers, and masks them
          the masked vectors travel as the plain ones do, by gather or reduce
unmask    those who came reveal shares, from which rank 0 takes the masks off the sum

Legend: R ranks, K clients of the round, k of them on this rank, P numbers of a vector.
"""

import secrets
from collections.abc import Callable

import numpy as np

from fedprompt_mpi.comm.channel import Channel, Chunks
from fedprompt_mpi.comm.exact_sum import in_units, rounding_of
from fedprompt_mpi.comm.traffic import NOTHING, to_root, together
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.server import make_rule
from fedprompt_mpi.federation.updates import (
    PUBLIC_HEADER,
    Gathered,
    LocalUpdates,
    RoundGivenUp,
    Verdict,
    WholeSum,
    consult,
    everybody_diverged,
    is_finite,
    tell_whole_sum,
    waiting,
)
from fedprompt_mpi.secagg.check_words import HASHES, CheckWords
from fedprompt_mpi.secagg.client import ADVERTISED_BYTES, SEALED_BYTES, SecureClient
from fedprompt_mpi.secagg.keys import WrongKeyError, WrongMessageError
from fedprompt_mpi.secagg.neighbours import graph, least_clients, neighbourhood
from fedprompt_mpi.secagg.server import SecureServer, WrongSumError
from fedprompt_mpi.secagg.shamir import SHARE_BYTES, WrongSharesError

KEYS = np.dtype([("client", "<u4"), ("keys", "u1", ADVERTISED_BYTES)])
SHARES = np.dtype([("sender", "<u4"), ("receiver", "<u4"), ("sealed", "u1", SEALED_BYTES)])
REVEALED = np.dtype([("holder", "<u4"), ("owner", "<u4"), ("share", "u1", SHARE_BYTES)])
CHECKS = np.dtype([("client", "<u4"), ("words", "<u8", HASHES)])
ROUND_ID_BYTES = 16


class SecureRound:
    """What one rank holds in one round."""

    def __init__(self, config: RunConfig, channel: Channel, updates: LocalUpdates, round_: int) -> None:
        """Begin; every rank calls this."""
        self._config, self._channel, self._updates = config, channel, updates
        cohort = updates.cohort
        self._cohort, self._size = cohort, updates.deltas.shape[1]
        self._least = least_clients(config.privacy.threshold, len(cohort.clients))
        self._hood = neighbourhood(len(cohort.clients), self._least, config.privacy.neighbours)
        self._round, self._round_id = round_, b""
        self._neighbours: dict[int, list[int]] = {}
        self._clients: dict[int, SecureClient] = {}
        self._server: SecureServer | None = None
        self._rule = make_rule(config)
        self.came = np.zeros(len(cohort.clients), dtype=bool)
        """Whose update has come `[K]`, once the sum is there."""
        self.has_uploaded = False
        """Whether masked updates have travelled."""
        self.traffic = NOTHING
        """Of keys and shares so far, on rank 0."""

    def gather(self, judge: Callable[[np.ndarray], Verdict]) -> Gathered:
        """Gather the public headers at rank 0, and return how to get at the sum; every rank calls this.

        Args:
            judge: the headers of all clients -> the verdict; called on rank 0.
        """
        public = np.zeros(len(self._updates.headers), dtype=PUBLIC_HEADER)
        for name in PUBLIC_HEADER.names or ():
            public[name] = self._updates.headers[name]
        everyone = Cohort(clients=self._cohort.clients, ranks=self._cohort.ranks, size=self._cohort.size)
        headers, verdict = consult(self._channel, public, everyone, judge)
        return Gathered(headers=headers, came=self.came, verdict=verdict, chunks=iter(()), sums=self._sum)

    def _sum(self, whole: WholeSum | None) -> Chunks:
        """Return the sum of the updates that come in units, in one chunk `[P]` int32 on rank 0.

        Args:
            whole: on rank 0, the unit, and the weights `[K]` of updates that are not yet scaled to the bound.

        Raises:
            RoundGivenUp: on every rank.
        """
        unit, weights = tell_whole_sum(self._channel, whole, len(self._cohort.clients))
        if not self._cohort.clients:
            return iter([(slice(0, self._size), np.zeros(self._size, dtype=np.int32))])
        if len(self._cohort.clients) < self._least:
            raise RoundGivenUp(f"{len(self._cohort.clients)} of its clients are too few: {self._least} must be left")
        self._agree(self._exchange_keys)
        self._agree(self._deal_shares)
        own = self._find_who_comes()
        words, checks = self._mask(own, unit, weights)
        total = self._upload(words)
        self.has_uploaded = True
        self._agree(lambda: self._unmask(own, checks, total))
        return iter([(slice(0, self._size), total.view(np.int32))])

    def _agree(self, step: Callable[[], None]) -> None:
        """Do a step; if it shows on any rank that somebody breaks the protocol, give up on all ranks."""
        error = None
        try:
            step()
        except (WrongKeyError, WrongMessageError, WrongSharesError, WrongSumError) as wrong:
            error = str(wrong)
        with waiting(self._channel):
            message = self._channel.agree(error)
        if message is not None:
            raise RoundGivenUp(message)

    def _count(self, parts: list[bytes]) -> list[bytes]:
        """Add to the traffic what all ranks have sent, or what each of them is sent."""
        if parts:
            sizes = np.array([len(part) for part in parts], dtype=np.int64)
            self.traffic = together(self.traffic, to_root(self._channel.placement.nodes, sizes))
        return parts

    def _ranks_of(self, clients: np.ndarray) -> np.ndarray:
        """Return the rank on which each of some clients of the round lives."""
        places = np.searchsorted(self._cohort.clients, clients)
        return np.asarray(self._cohort.ranks)[np.minimum(places, len(self._cohort.clients) - 1)]

    def _exchange_keys(self) -> None:
        """Draw this rank's secrets, and let each client know its neighbours' public keys."""
        channel, phases = self._channel, self._channel.phases
        self._round_id = self._tell_round_id()
        rng = np.random.default_rng(list(self._round_id))
        self._neighbours = graph(self._cohort.clients, self._hood.neighbours, rng)
        with phases.time("keys"):
            self._clients = {
                client: SecureClient(client, self._round_id, least=self._least, threshold=self._hood.threshold)
                for client in self._cohort.of_rank(channel.rank)
            }
            keys = np.array([(client, _bytes(own.advertise())) for client, own in self._clients.items()], dtype=KEYS)
        collected = self._count(channel.collect(keys.tobytes(), "keys"))
        parts: list[bytes] = []
        if channel.rank == 0:
            with phases.time("keys"):
                everyone = np.frombuffer(b"".join(collected), dtype=KEYS)
                self._server = SecureServer(self._round_id, self._neighbours, self._hood.threshold)
                self._server.advertised = {int(row["client"]): row["keys"].tobytes() for row in everyone}
                for rank in range(channel.size):
                    is_wanted = np.isin(everyone["client"], list(self._neighbours_of(rank)))
                    parts.append(everyone[is_wanted].tobytes())
        received = np.frombuffer(channel.deal(self._count(parts), "keys"), dtype=KEYS)
        self._advertised = {int(row["client"]): row["keys"].tobytes() for row in received}
        if set(self._advertised) != self._neighbours_of(channel.rank):
            raise WrongMessageError("public keys were changed on their way, or are missing")

    def _neighbours_of(self, rank: int) -> set[int]:
        """Return the neighbours of a rank's clients."""
        return {other for client in self._cohort.of_rank(rank) for other in self._neighbours[client]}

    def _tell_round_id(self) -> bytes:
        told = np.zeros(ROUND_ID_BYTES, dtype=np.uint8)
        if self._channel.rank == 0:
            told[:] = _bytes(secrets.token_bytes(ROUND_ID_BYTES))
        with waiting(self._channel):
            self._channel.tell(told)
        return told.tobytes()

    def _deal_shares(self) -> None:
        """Deal shares among neighbours; raise if what this rank's clients receive is wrong."""
        channel, phases, dealt, error = self._channel, self._channel.phases, [], None
        with phases.time("shares"):
            try:
                for client, own in self._clients.items():
                    sealed = own.deal({other: self._advertised[other] for other in self._neighbours[client]})
                    dealt += [(client, other, _bytes(message)) for other, message in sealed.items()]
                    phases.liveness.alive()
            except WrongKeyError as wrong:  # told once the others, who wait for this rank's messages, have them
                error = wrong
        collected = self._count(channel.collect(np.array(dealt, dtype=SHARES).tobytes(), "shares"))
        parts: list[bytes] = []
        if channel.rank == 0:
            with phases.time("shares"):
                everyone = np.frombuffer(b"".join(collected), dtype=SHARES)
                home = self._ranks_of(everyone["receiver"])  # of a wrong number any rank: shares are missing then
                parts = [everyone[home == rank].tobytes() for rank in range(channel.size)]
        received = np.frombuffer(channel.deal(self._count(parts), "shares"), dtype=SHARES)
        if error is not None:
            raise error
        with phases.time("shares"):
            by_client: dict[int, dict[int, bytes]] = {client: {} for client in self._clients}
            for row in received:
                if (receiver := int(row["receiver"])) in by_client:
                    by_client[receiver][int(row["sender"])] = row["sealed"].tobytes()
            for client, own in self._clients.items():
                own.accept(by_client[client])
                phases.liveness.alive()

    def _find_who_comes(self) -> np.ndarray:
        """Return which of this rank's updates come `[k]` bool; let every rank know who comes.

        Raises:
            RoundGivenUp: if they are fewer than t.
        """
        clients, headers = self._cohort.clients, self._updates.headers
        own = is_finite(headers) & ~np.isin(headers["client"], self._cohort.vanished)
        told = np.zeros(len(clients), dtype=np.uint8)
        with waiting(self._channel):
            self._channel.consult(own.view(np.uint8), self._cohort.counts, lambda rows: rows, told)
        self.came[:] = told
        expected = ~np.isin(clients, [*self._cohort.vanished, *attacking_clients(self._config)])
        if expected.any() and not self.came[expected].any():
            raise everybody_diverged(self._config, self._round)
        if (left := int(self.came.sum())) < self._least:
            raise RoundGivenUp(f"{left} of {len(clients)} clients came, and {self._least} must be left")
        return own

    def _mask(self, own: np.ndarray, unit: float, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn this rank's deltas, of which `own` `[k]` come, into masked words in the same memory.

        Returns:
            The words `[own, P]` uint32, and the masked check words `[own]` of dtype `CHECKS`.
        """
        deltas, headers, phases = self._updates.deltas, self._updates.headers, self._channel.phases
        assert isinstance(deltas, np.ndarray)
        words, checks = deltas.view(np.uint32), np.zeros(int(own.sum()), dtype=CHECKS)
        with phases.time("mask"):
            check = CheckWords(self._size, self._round_id)
            weight = dict(zip(self._cohort.clients, weights, strict=True))
            for place, row in enumerate(np.flatnonzero(own)):
                client = int(headers["client"][row])
                norm = headers["norm"][row : row + 1]
                factor = self._rule.bounded_factors(np.array([weight[client]]), norm, rounding_of(unit, self._size))
                units = in_units(deltas[row : row + 1], factor, unit)
                checks[place] = client, check.of(units)
                words[row] = units.view(np.uint32)
                self._clients[client].mask(words[row], checks["words"][place])
                phases.liveness.alive()
        return words if own.all() else words[own], checks

    def _upload(self, words: np.ndarray) -> np.ndarray:
        """Return the sum of all ranks' words modulo 2^32 `[P]` on rank 0; every rank calls this."""
        channel, timing = self._channel, self._channel.phases.timing
        total = np.zeros(self._size if channel.rank == 0 else 0, dtype=np.uint32)
        if self._config.comm.collective == "reduce":
            for chunk, summed in channel.reduce(lambda at: words[:, at].sum(axis=0, dtype=np.uint32), self._size):
                if channel.rank == 0:
                    total[chunk] = summed
            return total
        counts = np.bincount(np.asarray(self._cohort.ranks)[self.came], minlength=channel.size)
        for chunk, rows in channel.gather(words, counts):
            if channel.rank == 0:
                with timing.time("aggregate"):
                    total[chunk] = rows.sum(axis=0, dtype=np.uint32)
        return total

    def _unmask(self, own: np.ndarray, checks: np.ndarray, total: np.ndarray) -> None:
        """Let this rank's clients that came reveal their shares; take the masks off the total on rank 0."""
        channel, phases = self._channel, self._channel.phases
        came = set(np.asarray(self._cohort.clients)[self.came].tolist())
        with phases.time("unmask"):
            revealed = np.array(
                [
                    (client, owner, _bytes(share))
                    for client in self._updates.headers["client"][own].tolist()
                    for owner, share in self._clients[client].reveal(came).items()
                ],
                dtype=REVEALED,
            )
        collected = self._count(channel.collect(checks.tobytes() + revealed.tobytes(), "unmask"))
        if self._server is None:
            return
        with phases.time("unmask"):
            check, shares = np.zeros(HASHES, dtype=np.uint64), {client: {} for client in came}
            homes = self._ranks_of(np.array(sorted(came)))
            for rank, data in enumerate(collected):
                size = CHECKS.itemsize * int((homes == rank).sum())
                check += np.frombuffer(data[:size], dtype=CHECKS)["words"].sum(axis=0, dtype=np.uint64)
                for row in np.frombuffer(data[size:], dtype=REVEALED):
                    if (holder := int(row["holder"])) in shares:
                        shares[holder][int(row["owner"])] = row["share"].tobytes()
            self._server.unmask(total, check, came, shares)
            numbers = total.view(np.int32)
            if np.einsum("i,i", numbers, numbers, dtype=np.float64) <= len(came) * self._size / 6:
                raise WrongSumError("the bound of the updates is so large that rounding leaves nothing of their sum")


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)
