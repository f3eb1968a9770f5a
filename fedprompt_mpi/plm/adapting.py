"""What clients add to the outputs of the frozen PLM's modules: products of low rank, and shifts.

The frozen matrix multiplies all rows of a batch at once; what is a client's own is multiplied for its rows alone.

Legend: K clients, B rows, T tokens, r rank.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

LowRank = tuple[torch.Tensor, torch.Tensor]
"""A `[K, r, in]` and B `[K, out, r]`: x A^T B^T is added to what a module makes of x."""


class Adapting:
    """Adds to the outputs of a model's modules, in the forward pass in progress."""

    def __init__(self, model: Any) -> None:
        """Leave a model as it is until something is added."""
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._low_rank: Mapping[str, LowRank] = {}
        self._shifts: Mapping[str, torch.Tensor] = {}
        self._owners: torch.Tensor | None = None
        self._rows, self._grouped = 0, False

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
        self._low_rank, self._shifts, self._owners, self._rows = low_rank, shifts, owners, rows
        if owners is not None and low_rank:
            self._grouped = _by_client(owners, len(next(iter(low_rank.values()))[0]), rows)
        try:
            yield
        finally:
            self._low_rank, self._shifts = {}, {}

    def name_of(self, module: Any) -> str:
        """Return the name of a module."""
        return next(name for name, other in self._modules.items() if other is module)

    def product_of(self, name: str) -> LowRank | None:
        """Return what is added to a matrix for each row, A `[B, r, in]` and B `[B, out, r]`; None if nothing is."""
        if name not in self._low_rank:
            return None
        a, b = (part.expand(self._rows, -1, -1) if self._owners is None else part[self._owners]
                for part in self._low_rank[name])  # fmt: skip
        return a, b

    def shift_of(self, name: str) -> torch.Tensor | None:
        """Return what is added to a module's output for each row `[B, out]`; None if nothing."""
        shift = self._shifts.get(name)
        return shift if shift is None or self._owners is None else shift[self._owners]

    def _hook_of(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if name in self._low_rank:
                output = output + self._product(inputs[0], *self._low_rank[name]).to(output.dtype)
            if name in self._shifts:
                output = output + self._of_rows(self._shifts[name], output).to(output.dtype)
            return output

        return hook

    def _product(self, given: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return x A^T B^T of x `[B, ..., in]`."""
        if not torch.is_autocast_enabled(given.device.type):
            given = given.to(a.dtype)
        if self._owners is None:
            return torch.nn.functional.linear(torch.nn.functional.linear(given, a[0]), b[0])
        if not self._grouped:
            a, b = a[self._owners], b[self._owners]
        rows = given.reshape(len(a), -1, given.shape[-1])  # [K or B, ., in]
        return (rows @ a.mT @ b.mT).reshape(*given.shape[:-1], -1)

    def _of_rows(self, shift: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return what is added to an output `[B, ..., out]`, or `[B * T, out]`."""
        if self._owners is None:
            return shift[0]
        owners = self._owners
        if len(output) != self._rows:  # all positions of all rows, one below the other
            owners = owners.repeat_interleave(len(output) // self._rows)
        return shift[owners].reshape(len(output), *(1 for _ in range(output.dim() - 2)), -1)


def _by_client(owners: torch.Tensor, clients: int, rows: int) -> bool:
    """Return whether the rows of each client stand together, as many of each."""
    each = rows // clients
    expected = torch.arange(clients, device=owners.device).repeat_interleave(each)
    return each * clients == rows and bool(torch.equal(owners, expected))
