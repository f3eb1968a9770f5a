"""Aggregation rules that work by coordinate, or that weigh each update by itself.

Rules that compare updates with each other are in distance.py, angle.py and spectral.py. Each docstring states the
rule's breakdown point: the number f of malicious clients up to which no update can move the result without bound. A
rule that bounds each client's influence may have no breakdown point. `least_clients` is the K that f requires; it is
checked before a run.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from fedprompt_mpi.rules.aggregator_base import (
    TINY,
    Aggregator,
    Settings,
    Updates,
    clip_factors,
    honest_majority,
    middle,
)
from fedprompt_mpi.rules.angle import FlameOptions, FLTrustOptions, FreqFedOptions
from fedprompt_mpi.rules.distance import CentredClippingOptions
from fedprompt_mpi.rules.registry import aggregators
from fedprompt_mpi.rules.setting import setting
from fedprompt_mpi.rules.spectral import DivideAndConquerOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedAvgOptions:
    """Options of fedavg."""

    update_bound: float | None = setting(None, above=0)
    """fedavg: each update is scaled to at most this norm (not given: to none). Secure aggregation needs a bound."""


@aggregators.register("fedavg", options=FedAvgOptions)
class FedAvg(Aggregator):
    """The mean, weighted by the clients' numbers of examples: sum n_k delta_k / sum n_k. Breakdown point: f = 0.

    With `update_bound` it is norm_clip.

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017,
        arXiv:1602.05629, Algorithm 1.
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Equation 4.
    """

    mean_at: ClassVar[Settings | None] = {}
    bounded_by = "update_bound"

    def weights(self, updates: Updates) -> np.ndarray:
        """Return n_k / sum n, times min(1, bound / norm_k) if there is a bound."""
        weights = super().weights(updates)
        return weights if self.bound is None else weights * clip_factors(updates.norms, self.bound)


@aggregators.register("median")
class Median(Aggregator):
    """The median of each coordinate; clients count alike. Breakdown point: f < K / 2.

    References:
        Yin et al., Byzantine-Robust Distributed Learning, 2018, arXiv:1803.01498, Definition 1.
    """

    withstands = True
    weighs_examples = False
    coordinate_wise = True

    least_clients = staticmethod(honest_majority)

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the median of each column; of an even K the mean of the middle two."""
        return middle(np.sort(deltas, axis=0))


@aggregators.register("trimmed_mean")
class TrimmedMean(Aggregator):
    """The mean of each coordinate without its f smallest and f largest; clients count alike. Breakdown: f < K / 2.

    References:
        Yin et al., Byzantine-Robust Distributed Learning, 2018, arXiv:1803.01498, Definition 2.
    """

    withstands = True
    mean_at: ClassVar[Settings | None] = {"assumed_malicious": 0}
    weighs_examples = False
    coordinate_wise = True

    least_clients = staticmethod(honest_majority)

    def begin(self, updates: Updates) -> None:
        """Keep f."""
        self._trim = updates.assumed_malicious

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the mean of the rest of each column."""
        if self._trim == 0:
            return deltas.mean(axis=0, dtype=np.float64)
        return np.sort(deltas, axis=0)[self._trim : len(deltas) - self._trim].mean(axis=0, dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormClipOptions:
    """Options of norm_clip."""

    clip_norm: float = setting(1.0, above=0)
    """norm_clip: each update is scaled to at most this norm."""


@aggregators.register("norm_clip", options=NormClipOptions)
class NormClip(FedAvg):
    """The weighted mean of deltas that are scaled to at most `clip_norm`; with `noise_std`, weak differential privacy.

    No breakdown point: any number of malicious clients moves the result by at most clip_norm times their share of the
    examples.

    References:
        Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (norm thresholding, weak DP).
    """

    withstands = scales_updates = True
    mean_at: ClassVar[Settings | None] = {"clip_norm": 1e4}
    bounded_by = "clip_norm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierCheckOptions:
    """Options of outlier_check."""

    outlier_threshold: float = setting(3.5, above=0)
    """outlier_check: robust z-score beyond which a prompt's mean or standard deviation is an outlier."""


@aggregators.register("outlier_check", options=OutlierCheckOptions)
class OutlierCheck(Aggregator):
    """The weighted mean of the prompts whose mean and standard deviation are not outliers among the clients'.

    An outlier is further from the clients' median than `outlier_threshold` robust standard deviations (1.4826 times
    the median absolute deviation). Breakdown point: f < K / 2 of the medians; a malicious prompt of ordinary mean and
    standard deviation passes.

    References:
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 4.3 (proposed there, not tested).
        Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993 (the robust z-score, and 3.5 as its threshold).
    """

    withstands = True
    mean_at: ClassVar[Settings | None] = {"outlier_threshold": 1e9}
    observes_first = True

    least_clients = staticmethod(honest_majority)

    def begin(self, updates: Updates) -> None:
        """Reset the moments."""
        self._count = 0
        self._sums = np.zeros((2, len(updates.clients)))

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add up the prompts' coordinates and their squares."""
        self._count += deltas.shape[1]
        for client, delta in enumerate(deltas):
            prompt = vector + delta.astype(np.float64)
            self._sums[:, client] += prompt.sum(), np.einsum("i,i", prompt, prompt)

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weights of the clients that are no outliers."""
        means, squares = self._sums / self._count
        deviations = np.sqrt(np.maximum(squares - means**2, 0.0))
        ordinary = np.maximum(_robust_z(means), _robust_z(deviations)) <= self.options.outlier_threshold
        kept = ordinary * updates.num_examples
        return kept / max(kept.sum(), TINY)


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Return how many robust standard deviations each value is from the median; rounding alone is none."""
    distances = np.abs(values - np.median(values))
    return distances / max(1.4826 * float(np.median(distances)), 1e-9 * float(np.abs(values).max()), TINY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleOptions(
    DivideAndConquerOptions, FreqFedOptions, CentredClippingOptions, FlameOptions, FLTrustOptions, OutlierCheckOptions,
    NormClipOptions, FedAvgOptions,
):  # fmt: skip
    """The options of all rules, as the section `federation` holds them."""
