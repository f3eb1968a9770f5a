"""Tables of token ids: what the cloze questions of a split become, for the ranks of a node to map."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """Token ids of N examples, one after the other in flat arrays that processes of a node can share."""

    ids: np.ndarray
    """`[sum of lengths]` int32."""
    starts: np.ndarray
    """`[N + 1]` int64: example i is `ids[starts[i]:starts[i + 1]]`."""
    answers: np.ndarray
    """`[N]` int64: where in its example the answer is read."""
    labels: np.ndarray
    """`[N]` int64."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self.ids.max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` int64: tokens of each example."""
        return np.diff(self.starts)

    def save(self, folder: Path, name: str) -> None:
        """Write the arrays as `<name>.<field>.npy`."""
        for field in dataclasses.fields(self):
            np.save(folder / f"{name}.{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def map(cls, folder: Path, name: str) -> "TokenTable":
        """Open saved arrays without copying them into this process."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{f: np.load(folder / f"{name}.{f}.npy", mmap_mode="r", allow_pickle=False) for f in fields})

    @classmethod
    def build(cls, rows: Sequence[tuple[list[int], int]], labels: np.ndarray) -> "TokenTable":
        """Join rows of (token ids, answer position)."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in rows], out=starts[1:])
        return cls(
            ids=np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            starts=starts,
            answers=np.array([answer for _, answer in rows], dtype=np.int64),
            labels=np.asarray(labels, dtype=np.int64),
        )
