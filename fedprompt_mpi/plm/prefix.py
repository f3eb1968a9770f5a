"""Prefix tuning: trained keys and values in front of those of every layer.

transformers calls a model's attention function by a registered name. The function here puts the prefix in front of keys
and values, widens the mask (and T5's position bias) accordingly, and calls the library's attention. The same function
serves encoders, causal models and T5's decoder.

Legend: L layers, B batch, H key-value heads, V virtual tokens, T tokens, d width of a head.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "fedprompt_prefix"


class PrefixNotSeenError(RuntimeError):
    """The model has other layers than the prefix, or attention that it cannot reach; the message says which."""


class _Active:
    """The prefix of the forward pass in progress, and the layer that comes next."""

    prefix: torch.Tensor | None = None
    decoder_only: bool = False
    layer: int = 0
    position_bias: torch.Tensor | None = None
    """Of the texts' positions among prefix and texts, where the first layer makes one for all (T5)."""


@contextlib.contextmanager
def prefixed(prefix: torch.Tensor | None, *, decoder_only: bool) -> Iterator[None]:
    """Let attention calls within the block see `prefix` `[L, 2, B, H, V, d]`, one layer a call.

    Args:
        prefix: keys and values; None leaves the model as it is.
        decoder_only: of an encoder-decoder, only the decoder's self-attention gets the prefix.
    """
    _Active.prefix, _Active.decoder_only, _Active.layer, _Active.position_bias = prefix, decoder_only, 0, None
    try:
        yield
        if prefix is not None and _Active.layer != len(prefix):
            raise PrefixNotSeenError(
                f"a prefix reaches {_Active.layer} of its {len(prefix)} layers: the attention of the others is its own"
            )
    finally:
        _Active.prefix = _Active.position_bias = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    prefix = _Active.prefix
    is_causal = bool(getattr(module, "is_causal", False))
    if prefix is None or (_Active.decoder_only and not is_causal):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("softcap") is not None:
        raise PrefixNotSeenError("its attention caps its scores, which torch's attention beside a prefix cannot")
    if _Active.layer == len(prefix) or prefix.shape[3] != key.shape[1] or prefix.shape[5] != key.shape[3]:
        raise PrefixNotSeenError("its layers, or their keys, are not as many or as wide as its config says")
    prefix_key, prefix_value = prefix[_Active.layer].to(key.dtype)
    _Active.layer += 1
    virtual = prefix_key.shape[2]
    key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    if attention_mask is not None:
        shown = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = torch.nn.functional.pad(attention_mask, (virtual, 0), value=shown)
    if options.get("position_bias") is not None:
        if getattr(module, "has_relative_attention_bias", False):  # the prefix stands before the texts, as in a cache
            lengths = query.shape[2], key.shape[2]
            make: Any = module.compute_bias
            _Active.position_bias = make(*lengths, device=query.device, past_seen_tokens=virtual)
        options["position_bias"] = _Active.position_bias
    options["is_causal"] = False  # the mask is complete
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _full_mask(**options: Any) -> torch.Tensor | None:
    """Always make the mask: the library leaves it out where it could tell the kernel "causal" instead."""
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(**options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _full_mask)
