"""What clients add to the outputs of the frozen PLM's modules: products of low rank, and shifts.

The frozen matrix multiplies all rows of a batch at once; what is a client's own is multiplied for its rows alone.

Legend: K clients, B rows, T tokens, r rank.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

LowRank = tuple[torch.Tensor, torch.Tensor]
"""A `[K, r, in]` and B `[K, out, r]`: x A^T B^T is added to what a module makes of x."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    """What one forward pass adds."""

    low_rank: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)
    """Module -> A and B."""
    shifts: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Module -> `[K, out]`."""
    owners: torch.Tensor | None = None
    """`[B]` int64, the client of each row; None if K is 1."""
    rows: int = 0
    """B."""
    grouped: bool = False
    """The rows of each client stand together, as many of each."""


class Adapting:
    """Adds to the outputs of a model's modules, in the forward pass in progress."""

    def __init__(self, model: Any) -> None:
        """Leave a model as it is until something is added."""
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._added = _Added()

    @contextlib.contextmanager
    def adding(
        self,
        low_rank: Mapping[str, LowRank],
        shifts: Mapping[str, torch.Tensor],
        owners: torch.Tensor | None,
        rows: int,
    ) -> Iterator[None]:
        """Add to the modules' outputs within the block.

        Args:
            low_rank: module -> A and B.
            shifts: module -> `[K, out]`.
            owners: `[B]` int64, the client of each row; None if K is 1.
            rows: B.
        """
        for name in {*low_rank, *shifts} - self._hooked:
            self._modules[name].register_forward_hook(self._hook_of(name))
            self._hooked.add(name)
        clients = [len(a) for a, _ in low_rank.values()]
        grouped = owners is not None and bool(clients) and _by_client(owners, clients[0], rows)
        with self._adding(_Added(low_rank=low_rank, shifts=shifts, owners=owners, rows=rows, grouped=grouped)):
            yield

    @contextlib.contextmanager
    def _adding(self, added: _Added) -> Iterator[None]:
        before, self._added = self._added, added
        try:
            yield
        finally:
            self._added = before

    def both_passes(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Return the contexts of a layer's forward pass now, and of the same computed again in the backward pass.

        By then the forward pass is over, and another may have gone through the model.
        """
        return contextlib.nullcontext(), self._adding(self._added)

    def name_of(self, module: Any) -> str:
        """Return the name of a module."""
        return next(name for name, other in self._modules.items() if other is module)

    def product_of(self, name: str) -> LowRank | None:
        """Return what is added to a matrix for each row, A `[B, r, in]` and B `[B, out, r]`; None if nothing is."""
        added = self._added
        if name not in added.low_rank:
            return None
        a, b = (part.expand(added.rows, -1, -1) if added.owners is None else part[added.owners]
                for part in added.low_rank[name])  # fmt: skip
        return a, b

    def shift_of(self, name: str) -> torch.Tensor | None:
        """Return what is added to a module's output for each row `[B, out]`; None if nothing."""
        shift, owners = self._added.shifts.get(name), self._added.owners
        return shift if shift is None or owners is None else shift[owners]

    def _hook_of(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            added = self._added
            if name in added.low_rank:
                output = output + self._product(inputs[0], *added.low_rank[name]).to(output.dtype)
            if name in added.shifts:
                output = output + self._of_rows(added.shifts[name], output).to(output.dtype)
            return output

        return hook

    def _product(self, given: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return x A^T B^T of x `[B, ..., in]`."""
        if not torch.is_autocast_enabled(given.device.type):
            given = given.to(a.dtype)
        added = self._added
        if added.owners is None:
            return torch.nn.functional.linear(torch.nn.functional.linear(given, a[0]), b[0])
        if not added.grouped:
            a, b = a[added.owners], b[added.owners]
        rows = given.reshape(len(a), -1, given.shape[-1])  # [K or B, ., in]
        return (rows @ a.mT @ b.mT).reshape(*given.shape[:-1], -1)

    def _of_rows(self, shift: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return what is added to an output `[B, ..., out]`, or `[B * T, out]`."""
        owners, rows = self._added.owners, self._added.rows
        if owners is None:
            return shift[0]
        if len(output) != rows:  # all positions of all rows, one below the other
            owners = owners.repeat_interleave(len(output) // rows)
        return shift[owners].reshape(len(output), *(1 for _ in range(output.dim() - 2)), -1)


def _by_client(owners: torch.Tensor, clients: int, rows: int) -> bool:
    """Return whether the rows of each client stand together, as many of each."""
    each = rows // clients
    expected = torch.arange(clients, device=owners.device).repeat_interleave(each)
    return each * clients == rows and bool(torch.equal(owners, expected))
