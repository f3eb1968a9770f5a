"""The audit of a round: the attacks on what it has sent, from each view.

Whoever attacks knows the PLM, the settings, the vector of the broadcast, and texts of the evaluation split, which no
client trains on: half of them are the texts that were not in, the other half trains shadow clients. The truth (whose
batch held what) is known here because this is a simulation; the attacks do not use it.

Legend: U uploads, S shadow clients, P parameters, n texts, W words, C classes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedprompt_mpi import seeds
from fedprompt_mpi.audit.attacks import as_counts, calibrated, confidence, label_shares, rows_that_moved, unit_rows
from fedprompt_mpi.audit.record import Observation, View
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.example_products import ExampleProducts
from fedprompt_mpi.federation.probes import Probes, make_probes
from fedprompt_mpi.federation.rank_training import steps_of
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.shadows import Shadows, sums_of, train_shadows
from fedprompt_mpi.text.batches import collate, evaluation_batches
from fedprompt_mpi.text.tokens import TokenTable

LEAST_MEMBERS = 8
"""Texts of an upload that are attacked if there are so many; of all uploads together about as many as were not in."""
MOST_ROUNDS = 50
"""Rounds of a run whose texts are those of its final prompt."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is attacked, and the truth about it."""

    view: View
    round: int
    vector: np.ndarray
    """`[P]`, from which the uploads were trained."""
    uploads: np.ndarray
    """`[U, P]`."""
    clients: Sequence[int | None]
    """Whose each upload is; None of a sum."""
    rows: list[np.ndarray]
    """Of the training table, on which each upload was trained, as often as it was."""
    shadows: Shadows | None = None

    @property
    def all_shadows(self) -> Shadows:
        """The shadow clients."""
        assert self.shadows is not None
        return self.shadows

    def shadow_vectors(self) -> Iterator[np.ndarray]:
        """Yield the local vectors of shadow clients `[P]`."""
        return (self.vector + delta for delta in self.all_shadows.deltas)


class Auditor:
    """The attacks of a run that the settings ask for, on one rank."""

    def __init__(self, setup: Setup) -> None:
        """Part the texts of the evaluation split into those that are not in, and those of shadow clients."""
        self._setup, options = setup, setup.config.privacy
        self._attacks = [attack for attack in options.audit if attack != "canary"]
        table = setup.corpus.test
        order = seeds.generator(setup.config.seed, "audit").permutation(len(table))
        half = len(order) // 2
        self._outside, self._reference = np.sort(order[: min(options.audit_texts, half)]), np.sort(order[half:])
        self._steps = setup.config.client.steps
        self._shadows: tuple[int, Shadows] | None = None
        self.observations: list[Observation] = []
        """Of this rank, that rank 0 does not have yet."""

    def is_due(self, round_: int) -> bool:
        """Return whether a round is audited."""
        return bool(self._attacks) and round_ <= self._setup.config.privacy.audit_rounds

    @functools.cached_property
    def _probes(self) -> Probes | None:
        return make_probes(self._setup, self._reference)

    def look_at_uploads(self, vector: Vector, deltas: Vector, clients: Sequence[int], round_: int) -> None:
        """Attack this rank's uploads `[U, P]`, as rank 0 could."""
        if not clients:
            return
        steps = [steps_of(self._setup, client, round_) for client in clients]
        self._look(
            Target(
                view="server", round=round_, vector=_on_host(vector), uploads=_on_host(deltas), clients=clients,
                rows=[np.concatenate(own) for own in steps],
                shadows=self._shadows_of(vector, round_, len(steps[0])),
            )
        )  # fmt: skip

    def look_at_sum(self, vector: Vector, step: np.ndarray, clients: Sequence[int], round_: int) -> None:
        """Attack the step `[P]` of the global vector that these clients' uploads made, as any client could.

        Under secure aggregation rank 0 knows no more.
        """
        if not clients or not step.any():
            return
        steps = [steps_of(self._setup, client, round_) for client in clients]
        shadows = self._shadows_of(vector, round_, len(steps[0]))
        before = len(self.observations)
        self._look(
            Target(
                view="client", round=round_, vector=_on_host(vector), uploads=step[None], clients=[None],
                rows=[np.concatenate([part for own in steps for part in own])],
                shadows=sums_of(self._setup, shadows, len(clients), round_),
            )
        )  # fmt: skip
        if self._setup.config.privacy.secure_aggregation:
            self.observations += [dataclasses.replace(seen, view="server") for seen in self.observations[before:]]

    def look_at_prompt(self, vector: np.ndarray, rounds: int) -> None:
        """Attack the final prompt `[P]`, as anybody could: by the loss of texts."""
        if "membership" not in self._attacks:
            return
        setup, rows = self._setup, []
        for round_ in np.unique(np.linspace(1, rounds, MOST_ROUNDS).astype(np.int64)).tolist() if rounds else []:
            for client in draw_cohort(setup.config, 1, round_).clients:
                rows += steps_of(setup, client, round_)
        if not rows:
            return
        with setup.channel.phases.time("audit", rounds):
            members = self._some(np.unique(np.concatenate(rows)), rounds, len(self._outside))
            inside, outside = (
                _losses(*self._logits(vector, table, chosen))
                for table, chosen in ((setup.corpus.train, members), (setup.corpus.test, self._outside))
            )
            prompt = Target(
                view="public", round=rounds, vector=vector, uploads=vector[None], clients=[None], rows=[members]
            )
            self._add_membership(prompt, 0, "loss", -inside, -outside)

    def _some(self, members: np.ndarray, round_: int, most: int) -> np.ndarray:
        """Return members, or so many of them."""
        rng = seeds.generator(self._setup.config.seed, "audited members", round_)
        return np.sort(rng.permutation(members)[:most])

    def _shadows_of(self, vector: Vector, round_: int, steps: int) -> Shadows:
        """Return the shadow clients of a round, trained once."""
        if self._shadows is None or self._shadows[0] != round_:
            with self._setup.channel.phases.time("audit", round_):
                self._shadows = round_, train_shadows(self._setup, vector, self._reference, steps, round_)
        return self._shadows[1]

    def _look(self, target: Target) -> None:
        """Attack uploads."""
        with self._setup.channel.phases.time("audit", target.round):
            directions = np.concatenate([unit_rows(target.uploads), unit_rows(target.all_shadows.deltas)])
            products = ExampleProducts(self._setup, target.vector, directions)
            outside = -products.of(self._setup.corpus.test, self._outside)
            if "labels" in self._attacks:
                self._labels(target, outside)
            if "tokens" in self._attacks:
                if self._setup.method.trains_model:
                    self._rows_that_moved(target)
                self._gradients_of_words(target, products)
            if "membership" in self._attacks:
                self._membership(target, products, outside)

    def _labels(self, target: Target, outside: np.ndarray) -> None:
        """Tell how many texts of each class an upload was trained on.

        Args:
            target: the uploads.
            outside: products of other texts with uploads and shadow uploads `[n, U + S]`.
        """
        corpus, classes = self._setup.corpus, target.all_shadows.shares.shape[1]
        labels, count = corpus.test.labels[self._outside], len(target.uploads)
        there = np.unique(labels)
        features = np.stack([outside[labels == label].mean(axis=0) for label in there], axis=1)
        told = label_shares(features[:count], features[count:], target.all_shadows.shares)
        for number, (share, own) in enumerate(zip(told, target.rows, strict=True)):
            truth = np.bincount(corpus.train.labels[own], minlength=classes)
            counts = as_counts(share, len(own))
            self._add(
                target, number, "labels", "gradients of classes",
                hits=int(np.minimum(counts, truth).sum()), said=len(own), true=len(own),
                chance=float(np.minimum(1 / classes, truth / len(own)).sum()),
            )  # fmt: skip

    def _rows_that_moved(self, target: Target) -> None:
        """Tell which words were in the texts, by the rows of the embeddings that an upload of all weights moves."""
        if self._probes is None:
            return
        table, layout, known = self._setup.corpus.train, self._setup.method.layout, self._probes.known
        name = self._setup.backbone.embedding_name
        for number, (upload, own) in enumerate(zip(target.uploads, target.rows, strict=True)):
            moved = rows_that_moved(layout.views(torch.from_numpy(upload))[name].numpy())
            said, truth = set(np.flatnonzero(moved).tolist()) - known, set(_tokens_of(table, own)) - known
            self._add(
                target, number, "tokens", "rows that moved",
                hits=len(said & truth), said=len(said), true=len(truth),
            )  # fmt: skip

    def _gradients_of_words(self, target: Target, products: ExampleProducts) -> None:
        """Tell which of the common words were in the texts, by the gradients of questions about single words."""
        if self._probes is None:
            return
        probes, count = self._probes, len(target.uploads)
        found = -products.of(probes.table, np.arange(len(probes.table)))
        scores = calibrated(found[:, :count], found[:, count:])
        by_word = scores.reshape(len(probes.words), -1, count).max(axis=1)  # over the classes
        for number, (score, own) in enumerate(zip(by_word.T, target.rows, strict=True)):
            there = np.isin(probes.words, _tokens_of(self._setup.corpus.train, own))
            named = np.argsort(-score, kind="stable")[: there.sum()]
            self._add(
                target, number, "tokens", "gradients of words", scores=score.tolist(), truth=there.tolist(),
                hits=int(there[named].sum()), said=int(there.sum()), true=int(there.sum()), chance=float(there.mean()),
            )  # fmt: skip

    def _membership(self, target: Target, products: ExampleProducts, outside: np.ndarray) -> None:
        """Tell which texts an upload was trained on."""
        train, test, count = self._setup.corpus.train, self._setup.corpus.test, len(target.uploads)
        most = max(LEAST_MEMBERS, len(self._outside) // count)
        members = [self._some(np.unique(own), target.round, most) for own in target.rows]
        everyone = np.unique(np.concatenate(members))
        inside = -products.of(train, everyone)
        shadowed = [
            np.stack([confidence(*self._logits(vector, table, rows)) for vector in target.shadow_vectors()], axis=1)
            for table, rows in ((train, everyone), (test, self._outside))
        ]
        for number, own in enumerate(members):
            at = np.searchsorted(everyone, own)
            vector = target.vector + target.uploads[number]
            ours = self._logits(vector, train, own), self._logits(vector, test, self._outside)
            found = {
                "inner product": (inside[at, number], outside[:, number]),
                "calibrated inner product": tuple(
                    calibrated(of[:, number : number + 1], of[:, count:])[:, 0] for of in (inside[at], outside)
                ),
                "loss": tuple(-_losses(*of) for of in ours),
                "likelihood ratio": tuple(
                    calibrated(confidence(*of)[:, None], theirs)[:, 0]
                    for of, theirs in zip(ours, (shadowed[0][at], shadowed[1]), strict=True)
                ),
            }
            for by, (of_members, of_others) in found.items():
                self._add_membership(target, number, by, of_members, of_others)

    def _add_membership(self, target: Target, number: int, by: str, inside: np.ndarray, outside: np.ndarray) -> None:
        truth = [True] * len(inside) + [False] * len(outside)
        self._add(target, number, "membership", by, scores=[*inside.tolist(), *outside.tolist()], truth=truth)

    def _add(self, target: Target, number: int, attack: str, by: str, **seen: Any) -> None:
        client = target.clients[number]
        self.observations.append(
            Observation(attack=attack, by=by, view=target.view, round=target.round, client=client, **seen)
        )

    @torch.no_grad()
    def _logits(self, vector: Vector, table: TokenTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of texts at a vector `[n, C]` float32, and their labels `[n]`."""
        setup = self._setup
        device = setup.backbone.device
        (leaves,) = setup.method.leaves(to_device(vector, device)[None].clone())
        injection = setup.method.inject([leaves])
        logits = np.zeros((len(rows), len(setup.corpus.label_words)), dtype=np.float32)
        for places in evaluation_batches(table.lengths[rows], 0):
            batch = collate(table, rows[places])
            logits[places] = score_batch(setup.backbone, batch, injection).float().cpu().numpy()
            setup.channel.phases.liveness.step()
        return logits, table.labels[rows]


def _on_host(vector: Vector) -> np.ndarray:
    return vector if isinstance(vector, np.ndarray) else to_host(vector)


def _tokens_of(table: TokenTable, rows: np.ndarray) -> np.ndarray:
    """Return the tokens of some rows, each once."""
    return np.unique(np.concatenate([table.ids[table.starts[row] : table.starts[row + 1]] for row in rows]))


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each text `[n]` float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
