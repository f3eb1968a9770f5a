"""How the server makes one update of the clients' updates: the mean, and rules that withstand malicious clients.

Here are the rules that go by coordinate or weigh each update by itself; those that compare updates are in pairwise.py.

Each says its breakdown point: how many malicious clients f it takes to carry the result away without bound, whatever
they send. A rule may have none because it bounds what each client can do, and yet be moved as far as that.
`least_clients` is the K that f asks for, and is checked before a run begins.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import numpy as np

from fedprompt_mpi.config import CommConfig, FederationConfig, SettingsError
from fedprompt_mpi.federation.cohort import cohort_size
from fedprompt_mpi.federation.pairwise import Bulyan, Flame, FLTrust, FoolsGold, GeometricMedian, Krum, MultiKrum
from fedprompt_mpi.federation.rule import TINY, Aggregator, Updates, clip_factors, honest_majority, middle


class FedAvg(Aggregator):
    """The mean, weighted by the clients' numbers of examples: sum n_k delta_k / sum n_k. Breakdown point: f = 0.

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017,
        arXiv:1602.05629, Algorithm 1.
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Equation 4.
    """


class Median(Aggregator):
    """The median of each coordinate; clients count alike. Breakdown point: f < K / 2.

    References:
        Yin et al., Byzantine-Robust Distributed Learning, 2018, arXiv:1803.01498, Definition 1.
    """

    coordinate_wise = True

    least_clients = staticmethod(honest_majority)

    def combine(self, deltas: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Return the median of each column; of an even K the mean of the middle two."""
        return middle(np.sort(deltas, axis=0))


class TrimmedMean(Aggregator):
    """The mean of each coordinate without its f smallest and f largest; clients count alike. Breakdown: f < K / 2.

    References:
        Yin et al., Byzantine-Robust Distributed Learning, 2018, arXiv:1803.01498, Definition 2.
    """

    coordinate_wise = True

    least_clients = staticmethod(honest_majority)

    def begin(self, updates: Updates) -> None:
        """Take f."""
        self._trim = updates.assumed_malicious

    def combine(self, deltas: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Return the mean of what is left of each column."""
        if self._trim == 0:
            return deltas.mean(axis=0, dtype=np.float64)
        return np.sort(deltas, axis=0)[self._trim : len(deltas) - self._trim].mean(axis=0, dtype=np.float64)


class NormClip(Aggregator):
    """The weighted mean of deltas that are scaled to at most `clip_norm`; with `noise_std`, weak differential privacy.

    No breakdown point: however many they are, malicious clients move the result by at most clip_norm times their
    share of the examples.

    References:
        Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (norm thresholding, weak DP).
    """

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return n_k / sum n * min(1, clip_norm / norm_k)."""
        return super().weigh(updates) * clip_factors(updates.norms, self.config.clip_norm)


class OutlierCheck(Aggregator):
    """The weighted mean of the prompts whose mean and standard deviation are not outliers among the clients'.

    An outlier is further from the clients' median than `outlier_threshold` robust standard deviations (1.4826 times
    the median absolute deviation). Breakdown point: f < K / 2 of the medians; a malicious prompt of ordinary mean and
    standard deviation passes.

    References:
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 4.3 (proposed there, not tested).
        Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993 (the robust z-score, and 3.5 as its threshold).
    """

    looks_first = True

    least_clients = staticmethod(honest_majority)

    def begin(self, updates: Updates) -> None:
        """Start with moments of nothing."""
        self._count = 0
        self._sums = np.zeros((2, len(updates.clients)))

    def look(self, piece: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add up the prompts' coordinates and their squares."""
        self._count += deltas.shape[1]
        for client, delta in enumerate(deltas):
            prompt = vector + delta.astype(np.float64)
            self._sums[:, client] += prompt.sum(), np.einsum("i,i", prompt, prompt)

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the shares of those that are no outliers."""
        means, squares = self._sums / self._count
        deviations = np.sqrt(np.maximum(squares - means**2, 0.0))
        ordinary = np.maximum(_robust_z(means), _robust_z(deviations)) <= self.config.outlier_threshold
        kept = ordinary * updates.num_examples
        return kept / max(kept.sum(), TINY)


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Return how many robust standard deviations each value is from the median; rounding alone is none."""
    distances = np.abs(values - np.median(values))
    return distances / max(1.4826 * float(np.median(distances)), 1e-9 * float(np.abs(values).max()), TINY)


def check_rule(config: FederationConfig, comm: CommConfig) -> None:
    """Check that the aggregator is one, that K and f allow it, and that it goes with the collective.

    Raises:
        SettingsError: naming the settings and their bounds.
    """
    rule = AGGREGATORS.get(config.aggregator)
    if rule is None:
        raise SettingsError(
            f"federation.aggregator is {config.aggregator!r}: choose one of {', '.join(sorted(AGGREGATORS))}"
        )
    if comm.collective == "reduce" and not rule.needs_headers_only():
        able = sorted(name for name, other in AGGREGATORS.items() if other.needs_headers_only())
        raise SettingsError(
            f"comm.collective is reduce, which adds updates up on their way, but {config.aggregator} must see each of "
            f"them: take gather, or one of {', '.join(able)}"
        )
    count, malicious = cohort_size(config), config.assumed_malicious
    if count < rule.least_clients(malicious):
        most = rule.most_malicious(count)
        remedy = f"assume at most {most}" if most is not None else f"have at least {rule.least_clients(0)}"
        raise SettingsError(
            f"federation.assumed_malicious is {malicious}, for which {config.aggregator} needs "
            f"{rule.least_clients(malicious)} clients in a round, but there are {count}: {remedy}, or take another rule"
        )


AGGREGATORS: dict[str, type[Aggregator]] = {
    "fedavg": FedAvg,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "norm_clip": NormClip,
    "foolsgold": FoolsGold,
    "fltrust": FLTrust,
    "flame": Flame,
    "outlier_check": OutlierCheck,
}
