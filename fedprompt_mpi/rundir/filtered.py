"""filtered.json: the examples that the example filter has left out, and how well that fits the truth."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """Examples of one label, of all clients, whose gradients point the same way."""

    label: int
    examples: int
    clients: int
    """That have some of them."""
    cosine: float | None
    """Between it and the largest group of its label; None if another label is opposite to that."""
    is_odd: bool
    """Taken for poison, before its label was parted in two: see left_out."""
    counterpart: float | None = None
    """How common it is in the opposite labels, in times how common it is in its own; None if there are none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """The examples that a client leaves out."""

    client: int
    examples: list[int]
    """Places among its own examples, poisoned copies included."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FilterRecord:
    """What the example filter did."""

    round: int
    """From this round on the examples are left out."""
    examples: int
    """Of all clients, before."""
    poisoned: int
    """Of these, how many are poison in truth."""
    recall: float | None
    """Share of the poisoned examples that is left out; None if there are none."""
    precision: float | None
    """Share of what is left out that is poisoned; None if nothing is."""
    f1: float | None
    """Harmonic mean of the two; None if nothing is poisoned."""
    label_cosines: list[list[float]] = dataclasses.field(default_factory=list)
    """Between the mean directions of the labels: at -0.8 and below two labels are opposite. [] in an older file."""
    groups: list[GroupRecord]
    """Label by label: those without an opposite label, the largest first; then the kinds of the others."""
    left_out: list[LeftOut]
    """Of clients that leave some out."""
    bytes_up: int
    """Centroids, sums and counts, of all clients."""
    bytes_down: int
    """Sums over clients, directions of kinds, verdicts; and the first prompt, if that came back."""
    seconds: float
    """As rank 0 waited for them."""
    restarted: bool = False
    """The global prompt then began again."""

    @property
    def num_left_out(self) -> int:
        """How many examples are left out."""
        return sum(len(part.examples) for part in self.left_out)
