"""Convert between trainable parameters and one flat vector, the only form in which they are sent."""

import dataclasses
import math
import zlib
from collections.abc import Mapping

import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """Name, shape and offset of each trainable parameter in the flat vector `[P]` float32."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    """One more than there are parameters; the last is P."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "FlatLayout":
        """Lay parameters out one after the other, in the mapping's order."""
        offsets = [0]
        for shape in shapes.values():
            offsets.append(offsets[-1] + math.prod(shape))
        return cls(names=tuple(shapes), shapes=tuple(map(tuple, shapes.values())), offsets=tuple(offsets))

    @property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return self.offsets[-1]

    @property
    def fingerprint(self) -> int:
        """31-bit checksum of names and shapes, to tell a vector of another layout."""
        return zlib.crc32(repr((self.names, self.shapes)).encode()) >> 1

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parameters as views into `vector` `[P]`: writing one writes the vector."""
        if vector.shape != (self.size,):
            raise ValueError(f"expecting a vector of shape ({self.size},), got {tuple(vector.shape)}")
        return {
            name: vector[first:last].view(shape)
            for name, shape, first, last in zip(
                self.names, self.shapes, self.offsets[:-1], self.offsets[1:], strict=True
            )
        }
