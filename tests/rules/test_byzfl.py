"""Rules and attacks against another implementation: byzfl. Without it: pip install --no-deps byzfl."""

import importlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.config import FederationConfig, PoisonConfig, RunConfig
from fedprompt_mpi.federation.server import make_rule
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates, aggregate
from fedprompt_mpi.rules.collusion import ColludingAttack, Meeting, fit, moved_by

K, MALICIOUS, P = 13, 3, 60


@pytest.fixture(scope="module")
def byzfl() -> Any:
    """Return its modules, without the package's own imports: they need torchvision, which this does not."""
    found = importlib.util.find_spec("byzfl")
    if found is None:
        pytest.skip("needs byzfl: pip install --no-deps byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["byzfl"] = package
    names = {"attacks": "attacks.attacks", "rules": "aggregators.aggregators", "before": "aggregators.preaggregators"}
    yield types.SimpleNamespace(**{name: importlib.import_module(f"byzfl.{part}") for name, part in names.items()})
    for name in [name for name in sys.modules if name.partition(".")[0] == "byzfl"]:
        del sys.modules[name]


def _rule(name: str, **settings: Any) -> Aggregator:
    federation = FederationConfig(clients=K, aggregator=name, assumed_malicious=MALICIOUS, **settings)
    return make_rule(RunConfig(federation=federation))


RULES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "fedavg": ("fedavg", lambda their: their.rules.Average(), {}),
    "median": ("median", lambda their: their.rules.Median(), {}),
    "trimmed_mean": ("trimmed_mean", lambda their: their.rules.TrMean(f=MALICIOUS), {}),
    "geometric_median": ("geometric_median", lambda their: their.rules.GeometricMedian(nu=1e-6, T=1000), {}),
    "krum": ("krum", lambda their: their.rules.Krum(f=MALICIOUS), {}),
    "multi_krum": ("multi_krum", lambda their: their.rules.MultiKrum(f=MALICIOUS), {}),
    "centred_clipping": (
        "centred_clipping", lambda their: their.rules.CenteredClipping(L=3, tau=2.0),
        {"clip_radius": 2.0, "clip_iterations": 3},
    ),
}  # fmt: skip


def _ours(rule: Aggregator, deltas: np.ndarray) -> np.ndarray:
    updates = Updates(
        clients=np.arange(len(deltas)),
        num_examples=np.ones(len(deltas)),
        norms=np.linalg.norm(deltas.astype(np.float64), axis=1),
        parameters=deltas.shape[1],
        assumed_malicious=MALICIOUS,
        num_clients=K,
    )
    return aggregate(rule, updates, deltas, np.zeros(deltas.shape[1], dtype=np.float32))


def _updates(seed: int, count: int = K) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.linspace(-1, 1, P) + rng.standard_normal((count, P))).astype(np.float32)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("name", sorted({*RULES} - {"krum", "multi_krum"}))  # theirs count a neighbour more
def test_rules_agree(name: str, mixing: bool, byzfl: Any) -> None:
    rule, theirs, settings = RULES[name]
    for seed in range(5):
        deltas = _updates(seed)
        given = deltas.astype(np.float64)
        mixed = byzfl.before.NNM(f=MALICIOUS)(given) if mixing else given
        expected = theirs(byzfl)(mixed)
        np.testing.assert_allclose(_ours(_rule(rule, mixing=mixing, **settings), deltas), expected, atol=2e-5)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", ["alie", "ipm"])
def test_fitted_attacks_move_each_rule_at_least_as_far(attack: str, name: str, mixing: bool, byzfl: Any) -> None:
    """On the same honest updates, measured by our rule. Theirs tries 20 factors, all of one sign."""
    rule, theirs, settings = RULES[name]
    kind = {"alie": "Optimal_ALittleIsEnough", "ipm": "Optimal_InnerProductManipulation"}[attack]
    before = [byzfl.before.NNM(f=MALICIOUS)] if mixing else []
    for seed in range(3):
        honest = _updates(seed, K - MALICIOUS)
        given = honest.astype(np.float64)
        mean, std = given.mean(axis=0), given.std(axis=0, ddof=1)

        def moved(crafted: np.ndarray, honest: np.ndarray = honest) -> float:
            own = _rule(rule, mixing=mixing, **settings)
            return moved_by(own, honest, crafted.astype(np.float32), MALICIOUS)

        def craft(factor: float, mean: np.ndarray = mean, std: np.ndarray = std) -> np.ndarray:
            return mean + factor * std if attack == "alie" else -factor * mean

        with np.errstate(divide="ignore"):  # theirs
            crafted = getattr(byzfl.attacks, kind)(agg=theirs(byzfl), pre_agg_list=before, f=MALICIOUS)(given)
        best = fit(lambda factor, craft=craft, moved=moved: moved(craft(factor)))
        assert moved(craft(best)) >= 0.999 * moved(crafted)


@pytest.mark.parametrize(("attack", "kind"), [("alie", "ALittleIsEnough"), ("ipm", "InnerProductManipulation")])
def test_attacks_agree(attack: str, kind: str, byzfl: Any) -> None:
    deltas = _updates(0, 4)
    config = PoisonConfig(clients=[0], attack=attack, alie_factor=1.5, ipm_factor=2.0)  # pyright: ignore
    ours = registry.attacks[attack](config)  # pyright: ignore[reportArgumentType]
    assert isinstance(ours, ColludingAttack)
    meeting = Meeting(deltas=deltas, clients=K, make_rule=lambda: _rule("median"), rng=np.random.default_rng(0))
    expected = getattr(byzfl.attacks, kind)(1.5 if attack == "alie" else 2.0)(deltas.astype(np.float64))
    np.testing.assert_allclose(ours.agree(meeting), expected, rtol=1e-9)
