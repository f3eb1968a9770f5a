"""Attacks of several malicious clients that know each other's updates, and nothing of the honest ones'.

In each round they share the deltas that they have trained, on clean data (`poison.rate 0`) or on poisoned, and all send
what they have agreed on. With `poison.fitted` they choose the factor of the attack by trial: they know the server's
rule, and try it on their own deltas and on stand-ins for the honest ones, which they draw from the normal distribution
of their own. A lone attacker has no deviation to hide in: alie, min_max and min_sum then send what it has trained.

Legend: m malicious clients of the round, K clients of the round, P parameters.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates, aggregate, euclidean_norm
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.registry import attacks
from fedprompt_mpi.rules.setting import Comparison, setting

FACTORS = np.concatenate([[0.0], 2.0 ** np.arange(-6, 25)])
"""Sizes of the factors that are tried first. Rules that withstand nothing take the largest."""
REFINED, STEPS = 4, 9
"""The best factor is sought between its neighbours so many times, in so many steps."""

Perturbation = Literal["std", "unit", "sign"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What the malicious clients of a round know together."""

    deltas: np.ndarray
    """`[m, P]` float32, what each has trained, in client order."""
    clients: int
    """K."""
    make_rule: Callable[[], Aggregator]
    """Returns the server's rule, without a history."""
    rng: np.random.Generator
    """The same for all of them."""
    alive: Callable[[], None] = lambda: None
    """Called from time to time."""

    @property
    def mean(self) -> np.ndarray:
        """`[P]` float64, the mean of their deltas."""
        return self.deltas.mean(axis=0, dtype=np.float64)

    @property
    def std(self) -> np.ndarray:
        """`[P]` float64, the sample's standard deviation of each coordinate; 0 for a lone attacker."""
        if len(self.deltas) == 1:
            return np.zeros(self.deltas.shape[1])
        return self.deltas.std(axis=0, dtype=np.float64, ddof=1)


class ColludingAttack(Attack):
    """Base of the attacks that malicious clients agree on."""

    colludes = True

    def __init__(self, options: Any, last_update: np.ndarray | None = None) -> None:
        """Prepare; see `Attack`."""
        super().__init__(options, last_update)
        self._agreed: np.ndarray | None = None

    def meet(self, meeting: Meeting) -> None:
        """Agree on what all send in this round."""
        self._agreed = self.agree(meeting)

    def agree(self, meeting: Meeting) -> np.ndarray:
        """Return what all send `[P]` float64."""
        raise NotImplementedError

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return what was agreed, boosted; what was trained, if nothing was."""
        return super().send(delta if self._agreed is None else self._agreed.astype(np.float32), rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollusionOptions:
    """Options of the attacks on which malicious clients agree."""

    fitted: bool = setting(False, may_differ=Comparison.CLEAN_RUN)
    """alie, ipm: take the factor that moves the server's rule most, by trial on the malicious clients' own updates."""
    alie_factor: float | None = setting(None, at_least=0, may_differ=Comparison.CLEAN_RUN)
    """alie: standard deviations from the mean; not given, the most that the paper's count of supporters allows."""
    ipm_factor: float = setting(0.5, above=0, may_differ=Comparison.CLEAN_RUN)
    """ipm: factor on the negative mean."""
    perturbation: Perturbation = setting("std", may_differ=Comparison.CLEAN_RUN)
    """min_max, min_sum: direction of what is added to the mean: the negative standard deviation (std), mean (unit), or
    sign of the mean (sign)."""


@attacks.register("alie", options=CollusionOptions)
class ALittleIsEnough(ColludingAttack):
    """Send the mean plus z standard deviations of each coordinate, so little that it hides among the honest updates.

    z is the largest with which enough honest clients are further from the mean than the attackers:
    Phi(z) < (K - m - s) / (K - m), with s = floor(K / 2 + 1) - m supporters; at least 0.

    References:
        Baruch et al., A Little Is Enough: Circumventing Defenses For Distributed Learning, 2019, arXiv:1902.06156,
        Algorithm 3.
    """

    def agree(self, meeting: Meeting) -> np.ndarray:
        """Return mean + z std."""
        mean, std, factor = meeting.mean, meeting.std, self.options.alie_factor
        if self.options.fitted:
            factor = best_factor(lambda z: mean + z * std, meeting)
        elif factor is None:
            factor = supported_deviation(meeting.clients, len(meeting.deltas))
        return mean + factor * std


def supported_deviation(clients: int, malicious: int) -> float:
    """Return the z of Algorithm 3 of Baruch et al. for K clients, m of them malicious."""
    honest = clients - malicious
    supporters = clients // 2 + 1 - malicious
    share = (honest - supporters) / honest if honest else 0.5
    return max(0.0, statistics.NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9)))


@attacks.register("ipm", options=CollusionOptions)
class InnerProductManipulation(ColludingAttack):
    """Send the negative mean times a factor, so that the aggregate points away from the honest direction.

    References:
        Xie et al., Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation, 2019,
        arXiv:1903.03936, Section 3.
    """

    def agree(self, meeting: Meeting) -> np.ndarray:
        """Return -factor mean."""
        mean = meeting.mean
        fitted = self.options.fitted
        return -(best_factor(lambda e: -e * mean, meeting) if fitted else self.options.ipm_factor) * mean


@attacks.register("min_max", options=CollusionOptions)
class MinMax(ColludingAttack):
    """Send mean + gamma p with the largest gamma that leaves it no further from any update than two of them are apart.

    p is the perturbation (`poison.perturbation`); the updates are the attackers' own. gamma solves quadratic equations,
    one for each update: no search is needed.

    References:
        Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021, Equation 9 (Min-Max).
    """

    def agree(self, meeting: Meeting) -> np.ndarray:
        """Return mean + gamma p."""
        mean, direction = meeting.mean, perturbation(self.options.perturbation, meeting)
        away = mean - meeting.deltas
        length = float(direction @ direction)
        return mean + (self._most(away, away @ direction, length, meeting) if length else 0.0) * direction

    def _most(self, away: np.ndarray, along: np.ndarray, length: float, meeting: Meeting) -> float:
        """Return the largest gamma.

        Args:
            away: `[m, P]` float64, the mean minus each update.
            along: `[m]` float64, inner products of that with p.
            length: squared norm of p.
            meeting: the updates.
        """
        bound = pairwise_squares(meeting.deltas).max()
        squares = np.einsum("ij,ij->i", away, away)
        return float(np.min(largest_root(length, 2 * along, squares - bound)))


@attacks.register("min_sum", options=CollusionOptions)
class MinSum(MinMax):
    """As `MinMax`, but the sum of the squared distances to all updates is at most that of the worst update.

    References:
        Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021, Equation 10 (Min-Sum).
    """

    def _most(self, away: np.ndarray, along: np.ndarray, length: float, meeting: Meeting) -> float:
        bound = pairwise_squares(meeting.deltas).sum(axis=1).max()
        squares = np.einsum("ij,ij", away, away)
        return float(largest_root(len(away) * length, 2 * along.sum(), squares - bound))


@attacks.register("against_trimmed_mean")
class AgainstTrimmedMean(ColludingAttack):
    """Send, in each coordinate, a value three to four standard deviations from the mean, against its direction.

    Where the mean rises the value is drawn from [mean - 4 std, mean - 3 std], where it falls from
    [mean + 3 std, mean + 4 std]; each attacker draws its own.

    References:
        Fang et al., Local Model Poisoning Attacks to Byzantine-Robust Federated Learning, USENIX Security 2020,
        arXiv:1911.11815, Section 4.3 (partial knowledge).
    """

    def agree(self, meeting: Meeting) -> np.ndarray:
        """Return the mean; the deviation is kept for `send`."""
        self._std = meeting.std
        return meeting.mean

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return this attacker's own draw, boosted."""
        if self._agreed is None:
            return super().send(delta, rng)
        drawn = self._agreed - np.sign(self._agreed) * rng.uniform(3.0, 4.0, len(delta)) * self._std
        return Attack.send(self, drawn.astype(np.float32), rng)


def perturbation(name: Perturbation, meeting: Meeting) -> np.ndarray:
    """Return p `[P]` float64: the direction in which `MinMax` leaves the mean."""
    if name == "std":
        return -meeting.std
    mean = meeting.mean
    return -np.sign(mean) if name == "sign" else -mean / max(euclidean_norm(mean), 1e-300)


def pairwise_squares(deltas: np.ndarray) -> np.ndarray:
    """Return the squared distances of all pairs `[m, m]` float64."""
    wide = deltas.astype(np.float64)
    return np.array([[float(np.sum((a - b) ** 2)) for b in wide] for a in wide])


def largest_root(a: float, b: Any, c: Any) -> np.ndarray:
    """Return the larger root of a x^2 + b x + c, or 0 if there is none above it; for a > 0."""
    discriminant = np.maximum(np.square(b) - 4 * a * c, 0.0)
    return np.maximum((-b + np.sqrt(discriminant)) / (2 * a), 0.0)


def best_factor(craft: Callable[[float], np.ndarray], meeting: Meeting) -> float:
    """Return the factor with which a crafted update moves the server's rule furthest from the mean of honest ones.

    Args:
        craft: factor -> what each attacker sends `[P]`.
        meeting: the attackers; honest clients are drawn as their own updates are distributed.
    """
    malicious, size = meeting.deltas.shape
    others = max(meeting.clients - malicious, 1)
    drawn = meeting.mean + meeting.std * meeting.rng.standard_normal((max(others - malicious, 0), size))
    honest = np.concatenate([meeting.deltas[:others], drawn.astype(np.float32)])

    def moved(factor: float) -> float:
        meeting.alive()
        return moved_by(meeting.make_rule(), honest, craft(factor).astype(np.float32), malicious)

    return fit(moved)


def fit(moved: Callable[[float], float]) -> float:
    """Return the factor, of either sign, with the largest value of `moved`; the smallest of equal ones."""
    tried = {float(factor): moved(float(factor)) for factor in np.concatenate([FACTORS, -FACTORS[1:]])}
    for _ in range(REFINED):
        best = max(tried, key=lambda factor: (tried[factor], -abs(factor)))
        order = sorted(tried)
        at = order.index(best)
        low, high = order[max(at - 1, 0)], order[min(at + 1, len(order) - 1)]
        tried |= {float(factor): moved(float(factor)) for factor in np.linspace(low, high, STEPS)}
    return max(tried, key=lambda factor: (tried[factor], -abs(factor)))


def moved_by(rule: Aggregator, honest: np.ndarray, crafted: np.ndarray, malicious: int) -> float:
    """Return how far a rule's result is from the mean of honest updates if some clients send a crafted one.

    Args:
        rule: the server's, without a history.
        honest: `[n, P]` float32.
        crafted: `[P]` float32.
        malicious: how many send it.
    """
    count, first = len(honest) + malicious, int(rule.trains_itself)
    mean = honest.mean(axis=0, dtype=np.float64)
    rows = np.concatenate([mean[None].astype(np.float32)[:first], honest, np.repeat(crafted[None], malicious, axis=0)])
    most = rule.most_malicious(count)
    updates = Updates(
        clients=np.concatenate([np.full(first, count), np.arange(count)]),
        num_examples=np.ones(len(rows)),
        norms=np.array([euclidean_norm(row) for row in rows]),
        parameters=rows.shape[1],
        assumed_malicious=min(rule.options.assumed_malicious, most or 0),
        num_clients=count,
    )
    return euclidean_norm(aggregate(rule, updates, rows, np.zeros(rows.shape[1], dtype=np.float32)) - mean)
