"""Codecs of the vectors that travel: float32, bfloat16, or int8 with a scale for every chunk.

A short codec rounds once: `quantise` rounds to numbers that the codec represents, and these travel without loss. So the
sender knows what arrives, to the bit, and one process that sends nothing computes the same as many ranks. The sender
keeps the rounding errors and sends them later (error feedback).

Legend: n numbers of one vector.
"""

from typing import Any

import numpy as np

from fedprompt_mpi.config import CommConfig
from fedprompt_mpi.rules.registry import wire_formats

INT8_CHUNK = 256
"""Numbers that share a scale."""
_LARGEST_INT8 = 127
_EXPONENTS = (-126, 127)
_BF16_NAN = 0x7FC0


class Codec:
    """Base of the codecs."""

    exact = False
    """True if the codec represents every float32."""

    def __init__(self, options: Any = None) -> None:
        """Keep the options: the section `comm` of the settings."""
        self.options = options

    def bytes_of(self, n: int) -> int:
        """Return how many bytes n numbers take."""
        raise NotImplementedError

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest numbers that the codec represents `[..., n]` float32."""
        raise NotImplementedError

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return finite numbers `[..., n]` float32 as bytes `[..., bytes_of(n)]` uint8; exact for quantised ones."""
        raise NotImplementedError

    def unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Write the numbers of `packed` `[..., bytes_of(n)]` uint8 into `out` `[..., n]` float32."""
        raise NotImplementedError


@wire_formats.register("float32")
class Float32(Codec):
    """Four bytes a number, without loss."""

    exact = True

    def bytes_of(self, n: int) -> int:
        """Return 4 n."""
        return 4 * n

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers themselves."""
        return values

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers' own bytes."""
        return np.ascontiguousarray(values).view(np.uint8)

    def unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Copy the bytes."""
        out[...] = packed.view(np.float32)


@wire_formats.register("bfloat16")
class BFloat16(Codec):
    """Two bytes a number: the upper half of a float32, rounded to nearest even (relative error at most 2^-9)."""

    def bytes_of(self, n: int) -> int:
        """Return 2 n."""
        return 2 * n

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest bfloat16 numbers, as float32."""
        return (self._short(values).astype(np.uint32) << 16).view(np.float32)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return the upper halves."""
        return self._short(values).view(np.uint8)

    def unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Fill the lower halves with zeros."""
        out[...] = (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    @staticmethod
    def _short(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(np.uint32)
        short = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(_BF16_NAN), short)


@wire_formats.register("int8")
class Int8(Codec):
    """One byte a number and one for each `INT8_CHUNK` of them: integers from -127 to 127 times a power of two.

    The scale is the least power of two with which the chunk's largest number fits; the error is at most 1/127 of that
    number. Powers of two keep the arithmetic exact, as in the Open Compute Project's Microscaling Formats (MX)
    Specification 1.0, 2023 (there with blocks of 32).
    """

    def bytes_of(self, n: int) -> int:
        """Return n and the number of chunks."""
        return n + -(-n // INT8_CHUNK)

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest multiples of each chunk's scale."""
        exponents, integers = self._integers(values)
        return self._numbers(exponents, integers)[..., : values.shape[-1]]

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return the chunks' exponents, then the integers."""
        exponents, integers = self._integers(values)
        flat = _flat(integers)[..., : values.shape[-1]]
        return np.concatenate([exponents.astype(np.int8), flat.astype(np.int8)], axis=-1).view(np.uint8)

    def unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Multiply integers and scales."""
        n = out.shape[-1]
        chunks = -(-n // INT8_CHUNK)
        signed = packed.view(np.int8)
        integers = self._in_chunks(signed[..., chunks:].astype(np.float32))
        out[...] = self._numbers(signed[..., :chunks].astype(np.int32), integers)[..., :n]

    def _integers(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return exponents `[..., chunks]` int32 and whole numbers `[..., chunks, INT8_CHUNK]` float32."""
        chunked = self._in_chunks(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))
        mantissas, exponents = np.frexp(np.abs(chunked).max(axis=-1).astype(np.float64) / _LARGEST_INT8)
        exponents = np.clip(np.where(mantissas == 0.5, exponents - 1, exponents), *_EXPONENTS)
        return exponents, np.rint(np.ldexp(chunked, -exponents[..., None]))

    @staticmethod
    def _numbers(exponents: np.ndarray, integers: np.ndarray) -> np.ndarray:
        return _flat(np.ldexp(integers, exponents[..., None]))

    @staticmethod
    def _in_chunks(values: np.ndarray) -> np.ndarray:
        """Return `[..., chunks, INT8_CHUNK]`, the last chunk padded with zeros."""
        n = values.shape[-1]
        chunked = np.zeros((*values.shape[:-1], -(-n // INT8_CHUNK), INT8_CHUNK), dtype=values.dtype)
        _flat(chunked)[..., :n] = values
        return chunked


def _flat(chunked: np.ndarray) -> np.ndarray:
    """Return `[..., chunks, INT8_CHUNK]` as a view `[..., chunks * INT8_CHUNK]`."""
    return chunked.reshape(*chunked.shape[:-2], chunked.shape[-2] * chunked.shape[-1])


FLOAT32 = Float32()


def make_codec(config: CommConfig) -> Codec:
    """Return the codec that the settings name."""
    return wire_formats[config.wire](config)
