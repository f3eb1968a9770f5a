"""Formats on the wire: on their grid nothing is lost, off it the error is bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedprompt_mpi.comm.codec import INT8_CHUNK, BFloat16, Codec, Int8
from fedprompt_mpi.rules import registry

FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
VECTORS = arrays.arrays(np.float32, st.integers(1, 600), elements=FINITE)


def _there_and_back(wire: Codec, values: np.ndarray) -> np.ndarray:
    packed = wire.pack(values)
    assert packed.dtype == np.uint8
    assert packed.shape[-1] == wire.bytes_of(values.shape[-1])
    arrived = np.empty_like(values)
    wire.unpack(packed, arrived)
    return arrived


@pytest.mark.parametrize("wire", [made() for made in registry.wire_formats.values()], ids=registry.wire_formats)
@settings(max_examples=200, deadline=None)
@given(values=VECTORS)
def test_what_is_on_the_grid_arrives_as_it_is(wire: Codec, values: np.ndarray) -> None:
    on_grid = wire.quantise(values)
    np.testing.assert_array_equal(wire.quantise(on_grid), on_grid)
    np.testing.assert_array_equal(_there_and_back(wire, on_grid), on_grid)


@settings(max_examples=200, deadline=None)
@given(values=VECTORS)
def test_int8_is_off_by_half_a_step_of_its_chunk(values: np.ndarray) -> None:
    on_grid = Int8().quantise(values)
    for at in range(0, len(values), INT8_CHUNK):
        chunk = values[at : at + INT8_CHUNK].astype(np.float64)
        most = max(np.abs(chunk).max() / 127, 2.0**-126)  # half of a scale that is less than two 127ths of the largest
        assert np.abs(on_grid[at : at + INT8_CHUNK] - chunk).max() <= most


@settings(max_examples=200, deadline=None)
@given(values=arrays.arrays(np.float32, 50, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_rounds_to_nearest_even(values: np.ndarray) -> None:
    import torch

    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(BFloat16().quantise(values), expected)


def test_bfloat16_ties_go_to_even() -> None:
    between = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8)], dtype=np.float32)  # 8 bits each, one too many
    np.testing.assert_array_equal(BFloat16().quantise(between), [1, 1 + 2.0**-6, -1])


def test_rows_travel_side_by_side() -> None:
    """A chunk belongs to one client: a large one spoils nobody else's."""
    rows = np.stack([np.linspace(-1, 1, 300), np.linspace(-1e6, 1e6, 300)]).astype(np.float32)
    for wire in (made() for made in registry.wire_formats.values()):
        both = wire.quantise(rows)
        for row, alone in zip(rows, both, strict=True):
            np.testing.assert_array_equal(wire.quantise(row), alone)
        np.testing.assert_array_equal(_there_and_back(wire, both), both)


@pytest.mark.parametrize(("wire", "expected"), [("float32", 61_440), ("bfloat16", 30_720), ("int8", 15_420)])
def test_bytes_of_a_prompt(wire: str, expected: int) -> None:
    """BERT-base with 20 tokens; int8 adds a byte for each 256."""
    assert registry.wire_formats[wire]().bytes_of(20 * 768) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_can_be_sent(bad: float) -> None:
    """It has to arrive somehow, since the server only then leaves it out; nothing is promised of its value."""
    values = np.array([1.0, bad, 2.0], dtype=np.float32)
    for wire in (made() for made in registry.wire_formats.values()):
        assert _there_and_back(wire, values).shape == (3,)
