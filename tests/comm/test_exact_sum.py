"""Sums in whole numbers: one result in every order, near the exact one, and no overflow."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedprompt_mpi.comm.exact_sum import SMALLEST_UNIT, in_units, unit_of

DELTAS = arrays.arrays(np.float32, (7, 5), elements=st.floats(-(2.0**50), 2.0**50, width=32))
FACTORS = arrays.arrays(np.float64, 7, elements=st.floats(0, 10))


@settings(max_examples=300, deadline=None)
@example(deltas=np.eye(7, 5, dtype=np.float32)[::-1], factors=np.array([1.0] + [1e-308] * 6), split=3)
@given(deltas=DELTAS, factors=FACTORS, split=st.integers(0, 7))
def test_any_split_gives_the_same_near_the_exact_sum(deltas: np.ndarray, factors: np.ndarray, split: int) -> None:
    largest = np.abs(deltas).max(axis=1).astype(np.float64)
    unit = unit_of(factors, largest)
    whole = in_units(deltas, factors, unit)
    parts = in_units(deltas[:split], factors[:split], unit) + in_units(deltas[split:], factors[split:], unit)
    np.testing.assert_array_equal(parts, whole)
    exact = (deltas.astype(np.float64) * factors[:, None]).sum(axis=0)
    bound = 7 * unit / 2 + 1e-12 * (factors @ largest)
    assert np.abs(unit * whole - exact).max() <= bound
    assert factors @ largest == 0 or unit <= max((factors @ largest) / 2**29, SMALLEST_UNIT)


def test_as_much_as_31_bits_hold() -> None:
    """Clients that all have the same largest number fill the range and do not leave it."""
    deltas = np.full((1000, 1), -3.0, dtype=np.float32)
    factors = np.ones(1000)
    unit = unit_of(factors, np.full(1000, 3.0))
    total = in_units(deltas, factors, unit)
    assert 2**29 <= -int(total[0]) <= 2**30 + 500
    assert unit * total[0] == -3000


def test_a_factor_of_zero_takes_nothing() -> None:
    deltas = np.array([[np.nan, np.inf], [1.0, 2.0]], dtype=np.float32)
    factors = np.array([0.0, 0.5])
    unit = unit_of(factors, np.array([np.nan, 2.0]))
    assert unit < 2.0**-28
    np.testing.assert_array_equal(unit * in_units(deltas, factors, unit), [0.5, 1.0])


def test_nothing_at_all() -> None:
    unit = unit_of(np.zeros(0), np.zeros(0))
    np.testing.assert_array_equal(in_units(np.zeros((0, 3), dtype=np.float32), np.zeros(0), unit), np.zeros(3))
