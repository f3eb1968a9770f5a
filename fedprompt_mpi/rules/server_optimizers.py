"""The server's optimiser: it turns the aggregated delta of a round into the step of the global vector."""

import dataclasses

import numpy as np

from fedprompt_mpi.rules.registry import server_optimizers
from fedprompt_mpi.rules.setting import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptimizerOptions:
    """Options of the server optimisers, as the section `federation` holds them."""

    server_lr: float = setting(1.0, above=0)
    """Learning rate of the server."""
    server_momentum: float = setting(0.9, at_least=0, below=1)
    """beta_1 of momentum, adam and yogi."""
    server_beta2: float = setting(0.99, at_least=0, below=1)
    """beta_2 of adam and yogi."""
    server_tau: float = setting(0.001, above=0)
    """Adaptivity of adam and yogi: a small value is more adaptive."""


@server_optimizers.register("plain", options=ServerOptimizerOptions)
class ServerOptimizer:
    """Apply the aggregated delta: w += server_lr * delta (FedAvg at server_lr 1).

    An optimiser works coordinate by coordinate, so that the vector may come in chunks.

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithms 1 and 2.
    """

    slots: tuple[str, ...] = ()
    """Names of the vectors that the optimiser carries from round to round."""

    def __init__(self, options: ServerOptimizerOptions, size: int) -> None:
        """Start with empty slots of P numbers."""
        self.options = options
        self.state = {name: self._empty(name, size) for name in self.slots}

    def _empty(self, name: str, size: int) -> np.ndarray:
        return np.zeros(size, dtype=np.float32)

    def step(self, chunk: slice, delta: np.ndarray) -> np.ndarray:
        """Return the step of one chunk of the global vector `[chunk]` float64, given its delta `[chunk]` float64."""
        return self.options.server_lr * delta


@server_optimizers.register("momentum", options=ServerOptimizerOptions)
class Momentum(ServerOptimizer):
    """FedAvgM: v = beta_1 v + delta, w += server_lr * v.

    References:
        Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019, arXiv:1909.06335, Section 4.3.
    """

    slots = ("momentum",)

    def step(self, chunk: slice, delta: np.ndarray) -> np.ndarray:
        """Return server_lr * v; see `ServerOptimizer`."""
        momentum = self.options.server_momentum * self.state["momentum"][chunk] + delta
        self.state["momentum"][chunk] = momentum
        return self.options.server_lr * momentum


@server_optimizers.register("adam", options=ServerOptimizerOptions)
class Adam(ServerOptimizer):
    """FedAdam: m = b1 m + (1 - b1) delta, v = b2 v + (1 - b2) delta^2, w += server_lr * m / (sqrt(v) + tau).

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithm 2 (v starts at tau^2).
    """

    slots = ("momentum", "second_moment")

    def _empty(self, name: str, size: int) -> np.ndarray:
        start = self.options.server_tau**2 if name == "second_moment" else 0.0
        return np.full(size, start, dtype=np.float32)

    def _second_moment(self, before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return self.options.server_beta2 * before + (1 - self.options.server_beta2) * square

    def step(self, chunk: slice, delta: np.ndarray) -> np.ndarray:
        """Return server_lr * m / (sqrt(v) + tau); see `ServerOptimizer`."""
        beta = self.options.server_momentum
        momentum = beta * self.state["momentum"][chunk] + (1 - beta) * delta
        second = self._second_moment(self.state["second_moment"][chunk].astype(np.float64), delta**2)
        self.state["momentum"][chunk], self.state["second_moment"][chunk] = momentum, second
        return self.options.server_lr * momentum / (np.sqrt(second) + self.options.server_tau)


@server_optimizers.register("yogi", options=ServerOptimizerOptions)
class Yogi(Adam):
    """FedYogi: as FedAdam, with v = v - (1 - b2) delta^2 sign(v - delta^2).

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithm 2.
    """

    def _second_moment(self, before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return before - (1 - self.options.server_beta2) * square * np.sign(before - square)
