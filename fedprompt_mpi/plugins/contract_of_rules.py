"""The contract of aggregation rules and of attacks.

Legend: K clients, P parameters.
"""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from fedprompt_mpi.plugins.contract_base import expect, expect_same, settings
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates, aggregate
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.collusion import ColludingAttack, Meeting

K, P = 11, 500
COLUMNS = 37
"""Of a piece; no power of two, and no divisor of P."""
FAR = (1e6, 1e16)
"""Sizes of a malicious update."""
NEAR = 0.5
"""Distance from the honest mean, in norms of it, up to which a result withstands."""
LARGE = 400_000
"""P of the check of memory."""
SHARE_IN_MEMORY = 0.5
"""Share of all deltas that a rule may have in memory beside them and its state."""


Make = Callable[..., Aggregator]
"""Makes a rule of a federation of K clients, under further settings."""


def rule_of(name: str) -> Make:
    """Return what makes a rule by its name."""

    def make(**given: Any) -> Aggregator:
        options = settings("federation", **{"clients": K, "aggregator": name, **given}).federation
        return registry.aggregators[name](options)

    return make


def updates_of(
    rule: Aggregator, deltas: np.ndarray, counts: np.ndarray | None = None, clients: np.ndarray | None = None
) -> Updates:
    """Return the headers of deltas `[K, P]`; the server's own are first if the rule has some."""
    first = int(rule.trains_itself)
    ids = np.arange(len(deltas) - first) if clients is None else clients
    return Updates(
        clients=np.concatenate([[K], ids]) if first else ids,
        num_examples=np.ones(len(deltas)) if counts is None else counts,
        norms=np.linalg.norm(deltas.astype(np.float64), axis=1),
        parameters=deltas.shape[1],
        assumed_malicious=rule.options.assumed_malicious,
        num_clients=K,
    )


def combined(rule: Aggregator, deltas: np.ndarray, updates: Updates | None = None, columns: int = P) -> np.ndarray:
    """Return what a rule makes of deltas `[K, P]` in pieces, on a global vector of ones, as the server asks for it."""
    ones = np.ones(deltas.shape[1], dtype=np.float32)
    return aggregate(rule, updates or updates_of(rule, deltas), deltas, ones, columns)


def honest(rule: Aggregator, seed: int, parameters: int = P) -> np.ndarray:
    """Return deltas that agree on a direction and differ a little; before them the server's, if the rule has one."""
    noise = np.random.default_rng(seed).standard_normal((K + rule.trains_itself, parameters))
    return (np.linspace(-1, 1, parameters) + 0.1 * noise).astype(np.float32)


def piece_by_piece(make: Make) -> str:
    """Pieces and the whole give the same, in float64 rounding, as the vector travels in chunks."""
    deltas = honest(make(), 1)
    whole = combined(make(), deltas)
    expect(whole.shape == (P,) and whole.dtype == np.float64, f"returns {whole.dtype} {whole.shape}, not float64 [P]")
    expect(np.isfinite(whole).all(), f"{int((~np.isfinite(whole)).sum())} of {P} numbers are not finite")
    return expect_same(combined(make(), deltas, columns=COLUMNS), whole, f"pieces of {COLUMNS} and the whole", 1e-10)


def any_order(make: Make) -> str:
    """Clients may come in any order."""
    rng, deltas, first = np.random.default_rng(2), honest(make(), 2), int(make().trains_itself)
    counts = rng.integers(1, 9, len(deltas)).astype(np.float64)
    order = np.concatenate([np.arange(first), first + rng.permutation(K)]).astype(int)
    shuffled = updates_of(make(), deltas[order], counts[order], order[first:] - first)
    result = combined(make(), deltas, updates_of(make(), deltas, counts))
    return expect_same(combined(make(), deltas[order], shuffled), result, "another order of clients", 1e-9)


def equal_updates(make: Make) -> str:
    """If nobody deviates, the update is theirs."""
    found = ""
    for seed in range(10):  # no luck of rounding
        deltas = np.repeat(honest(make(), seed)[:1], K + make().trains_itself, axis=0)
        result = combined(make(**(make().mean_at or {})), deltas)
        found = expect_same(result, deltas[0], "the common update", 1e-6)
    return found


def as_it_withstands(make: Make) -> str:
    """With f = 2 updates that are far away the result is near the honest ones, or is not, as the rule states."""
    states, distances = make().withstands, []
    for size in FAR:
        deltas = honest(make(), 5)
        middle = deltas.mean(axis=0)
        radius = float(np.linalg.norm(middle))
        deltas[-2:] = -size
        rule = make(assumed_malicious=2, clip_norm=radius, clip_radius=radius)
        distances.append(float(np.linalg.norm(combined(rule, deltas) - middle)) / radius)
    found = ", ".join(
        f"{distance:.3g} from the honest mean at {size:g}" for distance, size in zip(distances, FAR, strict=True)
    )
    holds = all((distance < NEAR) == states for distance in distances)
    return expect(holds, f"states withstands = {states}: from the honest mean {found}, near is {NEAR}")


def least_clients(make: Make) -> str:
    """It works with the least number of clients that it says it needs."""
    needed = [make().least_clients(malicious) for malicious in (0, 1, 2)]
    for malicious, count in enumerate(needed):
        deltas = honest(make(), 6)[: count + make().trains_itself]
        result = combined(make(assumed_malicious=malicious), deltas)
        works = np.isfinite(result).all() and np.abs(result).max() > 0
        expect(works, f"{count} clients, f = {malicious}: the result is zero or not finite")
    return f"{', '.join(map(str, needed))} clients for f = 0, 1, 2"


def zero_updates(make: Make) -> str:
    """Updates of zeros give zeros."""
    largest = float(np.abs(combined(make(), np.zeros((K + make().trains_itself, P), dtype=np.float32))).max())
    return expect(largest == 0, f"largest number of the result {largest:g}")


def its_limit(make: Make) -> str:
    """Under the settings that it states, it is the mean."""
    limit = make().mean_at
    if limit is None:
        return "states no such settings (mean_at)"
    deltas = honest(make(), 4)
    return expect_same(combined(make(**limit), deltas), deltas.mean(axis=0, dtype=np.float64), "the mean", 1e-6)


def goes_on(make: Make) -> str:
    """From its state in a checkpoint it goes on with the same bits; the state is as large as it says."""
    rule, names = make(), {}
    for seed in (7, 8):
        combined(rule, honest(rule, seed))
    state = {name: array.copy() for name, array in rule.state().items()}
    for name, array in state.items():
        names[name] = array.shape
        expect(array.dtype == np.float32, f"state {name!r} is {array.dtype}, not float32")
    stated = rule.state_shapes(K, P)
    expect(names == stated, f"state has {names}, but state_shapes says {stated}")
    restored = make()
    restored.restore(state)
    after = [combined(one, honest(rule, 9)) for one in (rule, restored)]
    return expect_same(after[1], after[0], f"the round after a checkpoint of {len(state)} arrays")


def memory(make: Make) -> str:
    """It keeps no copies of all updates, which may be whole models."""
    rule = make()
    deltas = honest(rule, 10, LARGE)
    combined(make(), deltas[:, :COLUMNS])  # imports and caches do not count
    updates, ones = updates_of(rule, deltas), np.ones(LARGE, dtype=np.float32)
    tracemalloc.start()
    try:
        aggregate(rule, updates, deltas, ones, LARGE // 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    state = sum(array.nbytes for array in rule.state().values())
    extra = max(0, peak - state - 2 * 8 * LARGE)  # the result, and its pieces
    found = f"{extra / deltas.nbytes:.2f} of the updates' bytes beside them, allowed {SHARE_IN_MEMORY}"
    if rule.keeps_updates:
        return f"states keeps_updates: {found}"
    return expect(extra <= SHARE_IN_MEMORY * deltas.nbytes, found)


DELTA = np.linspace(-4, 12, 60, dtype=np.float32)
"""What an attacker has trained."""


def attack_of(name: str) -> Callable[..., Attack]:
    """Return what makes an attack by its name."""

    def make(**given: Any) -> Attack:
        options = settings("poison", **{"clients": [0], "attack": name, **given}).poison
        return registry.attacks[name](options, DELTA[::-1].copy())

    return make


def sent(attack: Attack, seed: int = 0, delta: np.ndarray = DELTA) -> np.ndarray:
    """Return what an attacker sends in place of a delta `[P]`; if it colludes, with a second one."""
    if isinstance(attack, ColludingAttack):
        deltas, rng = np.stack([delta, 2 * delta]), np.random.default_rng(0)
        attack.meet(Meeting(deltas=deltas, clients=10, make_rule=rule_of("median"), rng=rng))
    return attack.send(delta.copy(), np.random.default_rng(seed))


def shape_and_type(make: Callable[..., Attack]) -> str:
    """What is sent, and what training goes on with, is float32 of the same shape."""
    attack = make()
    for what, made in (("constrain", attack.constrain(DELTA.copy())), ("send", sent(attack))):
        right = made.shape == DELTA.shape and made.dtype == np.float32
        expect(right, f"{what} returns {made.dtype} {made.shape}, not float32 [P]")
    return "float32 [P]"


def own_stream(make: Callable[..., Attack]) -> str:
    """What is sent depends on the random stream alone, and leaves the trained delta as it is."""
    first, again = sent(make(), seed=3), sent(make(), seed=3)
    expect(np.array_equal(first, again, equal_nan=True), "the same stream, other updates")
    trained = DELTA.copy()
    make().send(trained, np.random.default_rng(0))
    expect(np.array_equal(trained, DELTA), "send changes the delta that it is given")
    return "the same bits twice"


def boost(make: Callable[..., Attack]) -> str:
    """`poison.boost` multiplies what is sent."""
    plain, boosted = (sent(make(boost=factor)) for factor in (1.0, 10.0))
    holds = np.allclose(boosted, 10 * plain, rtol=1e-6, equal_nan=True)
    norms = [float(np.linalg.norm(update)) for update in (plain, boosted)]
    return expect(holds, f"norms of {norms[0]:.4g}, and of {norms[1]:.4g} at a boost of 10")


def bounds(make: Callable[..., Attack]) -> str:
    """It says so if it changes the delta during training."""
    changes = not np.array_equal(make().constrain(DELTA.copy()), DELTA)
    return expect(changes == make().bounds_training, f"bounds_training = {make().bounds_training}, changes {changes}")


RULES: dict[str, Callable[[Make], str]] = {
    "piece by piece": piece_by_piece,
    "any order of clients": any_order,
    "equal updates": equal_updates,
    "far updates": as_it_withstands,
    "least number of clients": least_clients,
    "updates of zeros": zero_updates,
    "its limit": its_limit,
    "a checkpoint": goes_on,
    "memory": memory,
}
ATTACKS: dict[str, Callable[[Callable[..., Attack]], str]] = {
    "shape and type": shape_and_type,
    "its own stream": own_stream,
    "boost": boost,
    "bounds": bounds,
}
