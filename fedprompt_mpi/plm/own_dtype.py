"""Frozen weights stay in the checkpoint's dtype, whatever the arithmetic: a 7B model in bfloat16 takes 14 GB, not 28.

Matrices and word embeddings, nearly all of a model, stay as they are mapped from the files; where they are used in
another arithmetic, one of them at a time is converted, and again in the backward pass. The rest becomes float32.
"""

import functools
from typing import Any

import torch
from torch import nn


class _Product(torch.autograd.Function):
    """A product with a frozen matrix, which keeps the matrix itself for the backward pass and not its copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T` in the dtype of `x` `[..., in]`; `weight` is `[out, in]`."""
        ctx.save_for_backward(weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of `x`; the matrix has none."""
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight.to(gradient.dtype), None


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`, whatever the dtype of the frozen weight `[out, in]`."""
    if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):  # autocast converts by itself
        return nn.functional.linear(x, weight, bias)
    product = _Product.apply(x, weight)
    return product if bias is None else product + bias.to(x.dtype)  # pyright: ignore[reportOperatorIssue]


def keep(model: Any) -> None:
    """Let a model's matrices and word embeddings stay in their dtype; everything else becomes float32, in place."""
    from transformers.pytorch_utils import Conv1D

    kept: set[int] = set()
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear | Conv1D) and has_plain_weight(module)) and module is not words:
            continue
        if name.endswith(".wo"):  # T5 converts the other factor to its dtype
            continue
        if module.weight.dtype != torch.float32:
            kept.add(id(module.weight))
            make = _look_up if module is words else _multiply_transposed if isinstance(module, Conv1D) else _multiply
            module.forward = functools.partial(make, module)
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.float()


def has_plain_weight(module: nn.Module) -> bool:
    """Return True if a module's weight holds numbers as torch stores them, and not packed ones (`quantised.py`)."""
    return type(module.weight) is nn.Parameter


def _multiply(module: Any, x: torch.Tensor) -> torch.Tensor:
    return multiply(x, module.weight, module.bias)


def _multiply_transposed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return multiply(x, module.weight.T, module.bias)


def _look_up(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return word embeddings in float32, scaled where the model does so (Gemma, BART)."""
    rows = nn.functional.embedding(ids, module.weight).float()
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * scale
