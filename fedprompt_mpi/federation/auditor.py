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
from fedprompt_mpi.audit.attacks import (
    as_counts,
    calibrated,
    confidence,
    floor_of,
    label_shares,
    rows_that_moved,
    unit_rows,
    within_classes,
)
from fedprompt_mpi.audit.intervals import auc_value
from fedprompt_mpi.audit.record import Observation, View
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.example_products import ExampleProducts
from fedprompt_mpi.federation.probes import Probes, make_probes
from fedprompt_mpi.federation.rank_training import steps_of
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.shadows import Shadows, sums_of, train_shadows
from fedprompt_mpi.text.batches import collate, evaluation_batches
from fedprompt_mpi.text.tokens import TokenTable

LEAST_TEXTS = 20
"""Of the evaluation split."""
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
        if self._attacks and len(table) < LEAST_TEXTS:
            raise SettingsError(
                f"privacy.audit is {', '.join(options.audit)}, for which the evaluation split needs {LEAST_TEXTS} "
                f"texts, but it has {len(table)}: give more, or leave the audit out"
            )
        order = seeds.generator(setup.config.seed, "audit").permutation(len(table))
        half = len(order) // 2
        self._outside, self._reference = np.sort(order[: min(options.audit_texts, half)]), np.sort(order[half:])
        self._shadows: tuple[int, Shadows] | None = None
        self.observations: list[Observation] = []
        """Of this rank, that rank 0 does not have yet."""

    def follow(self, setup: Setup) -> None:
        """Go on with a setup whose clients leave examples out."""
        self._setup = setup

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

    def look_at_sum(
        self, vector: Vector, step: np.ndarray, clients: Sequence[int], round_: int, view: View = "client"
    ) -> None:
        """Attack the step `[P]` of the global vector that these clients' uploads made, as any client could.

        Of the server under secure aggregation it is the sum, before the noise.
        """
        if not clients or not step.any():
            return
        steps = [steps_of(self._setup, client, round_) for client in clients]
        shadows = self._shadows_of(vector, round_, len(steps[0]))
        sums = sums_of(self._setup, shadows, len(clients), round_, with_noise=view == "client")
        rows = np.concatenate([part for own in steps for part in own])
        self._look(
            Target(
                view=view, round=round_, vector=_on_host(vector), uploads=step[None], clients=[None], rows=[rows],
                shadows=sums,
            )
        )  # fmt: skip

    def look_at_prompt(self, vector: np.ndarray, rounds: int) -> None:
        """Attack the final prompt `[P]`, as anybody could: by the loss of texts."""
        if "membership" not in self._attacks:
            return
        setup, rows = self._setup, []
        first = setup.config.federation.filter_round or 1  # before, clients had other examples
        for round_ in np.unique(np.linspace(first, rounds, MOST_ROUNDS).astype(np.int64)).tolist() if rounds else []:
            cohort = draw_cohort(setup.config, 1, round_)
            for client in set(cohort.clients) - set(cohort.vanished) - attacking_clients(setup.config):
                rows += steps_of(setup, client, round_)
        if not rows:
            return
        with setup.channel.phases.time("audit", rounds):
            members = self._some(np.unique(np.concatenate(rows)), rounds, len(self._outside))
            found = [
                self._logits(vector, table, chosen)
                for table, chosen in ((setup.corpus.train, members), (setup.corpus.test, self._outside))
            ]
            labels = found[0][1], found[1][1]
            prompt = Target(
                view="public", round=rounds, vector=vector, uploads=vector[None], clients=[None], rows=[members]
            )
            self._add_membership(prompt, 0, "loss", labels, tuple(-_losses(*of) for of in found))

    def _some(self, members: np.ndarray, round_: int, most: int) -> np.ndarray:
        """Return members, or so many of them."""
        rng = seeds.generator(self._setup.config.seed, "audited members", round_)
        return np.sort(rng.permutation(members)[:most])

    def _shadows_of(self, vector: Vector, round_: int, steps: int) -> Shadows:
        """Return the shadow clients of a round, trained once."""
        if self._shadows is None or self._shadows[0] != round_:
            self._say(f"audit of round {round_}: training shadow clients")
            with self._setup.channel.phases.time("audit", round_):
                self._shadows = round_, train_shadows(self._setup, vector, self._reference, steps, round_)
        return self._shadows[1]

    def _look(self, target: Target) -> None:
        """Attack uploads."""
        self._say(f"audit of round {target.round}: attacks from the {target.view}'s view")
        with self._setup.channel.phases.time("audit", target.round):
            directions = np.concatenate([unit_rows(target.uploads), unit_rows(target.all_shadows.deltas)])
            products = ExampleProducts(self._setup, target.vector, directions)
            outside = -products.of(self._setup.corpus.test, self._outside)
            if "labels" in self._attacks:
                self._labels(target, outside)
            if "tokens" in self._attacks and self._probes is not None:
                if self._setup.method.trains_model:
                    self._rows_that_moved(target, self._probes)
                self._gradients_of_words(target, products, self._probes)
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
        known = corpus.test.labels[self._reference]
        prior = np.bincount(known, minlength=classes) / len(known)
        features = np.stack([outside[labels == label].mean(axis=0) for label in there], axis=1)
        told = label_shares(features[:count], features[count:], target.all_shadows.shares)
        for number, (share, own) in enumerate(zip(told, target.rows, strict=True)):
            truth = np.bincount(corpus.train.labels[own], minlength=classes)
            counts = as_counts(share, len(own))
            self._add(
                target, number, "labels", "gradients of classes",
                hits=int(np.minimum(counts, truth).sum()), said=len(own), true=len(own),
                chance=float(np.minimum(prior, truth / len(own)).sum()),
            )  # fmt: skip

    def _rows_that_moved(self, target: Target, probes: Probes) -> None:
        """Tell which words were in the texts, by the rows of the embeddings that an upload of all weights moves."""
        table, layout, known = self._setup.corpus.train, self._setup.method.layout, probes.known
        name = self._setup.backbone.embedding_name
        for number, (upload, own) in enumerate(zip(target.uploads, target.rows, strict=True)):
            moved = rows_that_moved(layout.views(torch.from_numpy(upload))[name].numpy())
            said, truth = set(np.flatnonzero(moved).tolist()) - known, set(_tokens_of(table, own)) - known
            self._add(
                target, number, "tokens", "rows that moved",
                hits=len(said & truth), said=len(said), true=len(truth),
            )  # fmt: skip

    def _gradients_of_words(self, target: Target, products: ExampleProducts, probes: Probes) -> None:
        """Tell which of the common words were in the texts, by the gradients of questions about single words."""
        count = len(target.uploads)
        found = -products.of(probes.table, np.arange(len(probes.table)))
        scores = calibrated(found[:, :count], found[:, count:], floor_of(found[:, count:]))
        by_word = scores.reshape(len(probes.words), -1, count).max(axis=1) + probes.odds[:, None]  # over the classes
        for number, (score, own) in enumerate(zip(by_word.T, target.rows, strict=True)):
            there = np.isin(probes.words, _tokens_of(self._setup.corpus.train, own))
            many = int(there.sum())
            named, guessed = (np.argsort(-of, kind="stable")[:many] for of in (score, probes.odds))
            knows = 0 < many < len(there)
            self._add(
                target, number, "tokens", "gradients of words", scores=score.tolist(), truth=there.tolist(),
                hits=int(there[named].sum()), said=many, true=many,
                chance=float(there[guessed].mean()) if many else None,
                chance_auc=auc_value(probes.odds[there], probes.odds[~there]) if knows else 0.5,
            )  # fmt: skip

    def _membership(self, target: Target, products: ExampleProducts, outside: np.ndarray) -> None:
        """Tell which texts an upload was trained on."""
        train, test, count = self._setup.corpus.train, self._setup.corpus.test, len(target.uploads)
        sharers = 1 if target.clients == [None] else self._setup.config.federation.cohort_size  # on all ranks
        most = max(LEAST_MEMBERS, len(self._outside) // sharers)
        members = [self._some(np.unique(own), target.round, most) for own in target.rows]
        everyone = np.unique(np.concatenate(members))
        inside = -products.of(train, everyone)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._say(f"audit of round {target.round}: texts under shadow clients", len(target.all_shadows.deltas))
        for vector in target.shadow_vectors():
            found = self._logits(vector, train, everyone), self._logits(vector, test, self._outside)
            parts.append((confidence(*found[0]), confidence(*found[1])))
            self._setup.channel.progress.advance(len(parts))
        shadowed = [np.stack(of, axis=1) for of in zip(*parts, strict=True)]
        floors = floor_of(outside[:, count:]), floor_of(shadowed[1])
        for number, own in enumerate(members):
            at = np.searchsorted(everyone, own)
            vector = target.vector + target.uploads[number]
            ours = self._logits(vector, train, own), self._logits(vector, test, self._outside)
            labels = ours[0][1], ours[1][1]
            found = {
                "inner product": (inside[at, number], outside[:, number]),
                "calibrated inner product": tuple(
                    calibrated(of[:, number : number + 1], of[:, count:], floors[0])[:, 0]
                    for of in (inside[at], outside)
                ),
                "loss": tuple(-_losses(*of) for of in ours),
                "likelihood ratio": tuple(
                    calibrated(confidence(*of)[:, None], theirs, floors[1])[:, 0]
                    for of, theirs in zip(ours, (shadowed[0][at], shadowed[1]), strict=True)
                ),
            }
            for by, scores in found.items():
                self._add_membership(target, number, by, labels, scores)

    def _say(self, what: str, total: int = 0) -> None:
        """Say on rank 0 what is going on."""
        self._setup.channel.progress.stage(what, total)

    def _add_membership(
        self,
        target: Target,
        number: int,
        by: str,
        labels: tuple[np.ndarray, np.ndarray],
        scores: tuple[np.ndarray, ...],
    ) -> None:
        """Keep the scores of members and of others, whose classes are `labels`."""
        inside, outside = scores
        members, others = within_classes(inside, outside, labels)
        truth = [True] * len(members) + [False] * len(others)
        self._add(target, number, "membership", by, scores=[*members.tolist(), *others.tolist()], truth=truth)

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
