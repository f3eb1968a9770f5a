"""The contract of server optimisers, wire formats, partitions, metrics and tasks.

Legend: K clients, P parameters.
"""

import numpy as np

from fedprompt_mpi.plugins.contract_base import BrokenError, expect, expect_same, settings
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.metrics import Answers
from fedprompt_mpi.rules.setting import SettingsError
from fedprompt_mpi.text.load import load
from fedprompt_mpi.text.partition import partition
from fedprompt_mpi.text.tasks import resolve

K, P, COLUMNS = 11, 500, 37
"""COLUMNS of a piece: no divisor of P."""


def chunks(name: str) -> str:
    """A server optimiser works by coordinate: pieces and the whole give the same bits, and its states are its slots."""
    options, kind = settings("federation", server_optimizer=name).federation, registry.server_optimizers[name]
    deltas, whole, cut = np.random.default_rng(11).standard_normal((3, P)), kind(options, P), kind(options, P)
    pieces = [slice(at, min(at + COLUMNS, P)) for at in range(0, P, COLUMNS)]
    found = ""
    for delta in deltas:
        steps = np.concatenate([cut.step(piece, delta[piece]) for piece in pieces])
        found = expect_same(steps, whole.step(slice(0, P), delta), f"pieces of {COLUMNS} and the whole")
    shapes = {slot: array.shape for slot, array in cut.state.items()}
    expect(shapes == dict.fromkeys(kind.slots, (P,)), f"state has {shapes}, slots are {kind.slots} of P numbers")
    return found


def round_trip(name: str) -> str:
    """What a wire format has rounded arrives as it is, in as many bytes as it says."""
    codec = registry.wire_formats[name](settings("comm", wire=name).comm)
    values = np.random.default_rng(12).standard_normal((3, 1000)).astype(np.float32) * np.array(
        [[1], [1e-6], [1e6]], dtype=np.float32
    )
    rounded = codec.quantise(values)
    packed, arrived = codec.pack(rounded), np.empty_like(rounded)
    expected = (3, codec.bytes_of(1000))
    right = packed.shape == expected and packed.dtype == np.uint8
    expect(right, f"pack returns {packed.dtype} {packed.shape}, bytes_of says {expected}")
    codec.unpack(packed, arrived)
    expect_same(codec.quantise(rounded), rounded, "rounded twice and once")
    expect_same(arrived, rounded, "what arrives and what was rounded")
    off = float((np.abs(rounded - values).max(axis=1) / np.abs(values).max(axis=1)).max())
    expect(not codec.exact or off == 0, f"states exact, but rounds by {off:.1e}")
    return f"{expected[1] / 1000:.3g} bytes a number, rounds by at most {off:.1e} of the largest"


def deals_out(name: str) -> str:
    """A partition gives each example to one client, leaves none empty, and depends on the seed alone."""
    rng = np.random.default_rng(13)
    labels, users = rng.integers(0, 3, 400), [f"user {number}" for number in rng.integers(0, 50, 400)]
    sizes = []
    for alpha in (0.1, 1.0, 100.0):
        options = settings("federation", clients=K, partition=name, alpha=alpha).federation
        try:
            once, again = (partition(options, labels, users, seed=3).indices for _ in range(2))
        except SettingsError as error:
            raise BrokenError(str(error)) from error
        same = all(np.array_equal(one, other) for one, other in zip(once, again, strict=True))
        expect(same, f"alpha {alpha:g}: the same seed, another partition")
        sizes.append(f"{min(map(len, once))} to {max(map(len, once))}")
    return f"examples of a client at alpha 0.1, 1 and 100: {', '.join(sizes)}"


def measures(name: str) -> str:
    """A metric is a finite number that does not depend on the order of the texts."""
    rng, found = np.random.default_rng(14), []
    options = settings("output", metrics=[name]).output
    labels = rng.integers(0, 3, 200)
    answers = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 3, 200))
    for order in (np.arange(200), rng.permutation(200)):
        own = Answers(labels=labels[order], answers=answers[order], classes=3)
        found.append(float(registry.metrics[name](own, options)))
    expect(np.isfinite(found).all(), f"returns {found[0]}")
    return expect_same(np.array(found[1]), np.array(found[0]), f"{found[0]:.4f}; another order of texts", 1e-12)


def examples(name: str) -> str:
    """A task has a cloze question; if it makes its examples, they fit together and are the same every time."""
    made = registry.tasks[name](settings("task").task)
    given = {} if made.examples is not None else {"data": "somewhere"}
    options = settings("task", name=name, **given).task
    try:
        task = resolve(options)
        if task.examples is None:
            return f"{len(task.classes)} classes; examples from files"
        once, again = (load(task, options, seed=0) for _ in range(2))
    except SettingsError as error:
        raise BrokenError(str(error)) from error
    same = list(once.train.texts) == list(again.train.texts) and np.array_equal(once.train.labels, again.train.labels)
    return expect(same, f"{len(once.train)} and {len(once.test)} examples, the same again: {same}")
