"""Skip work in the first and last layer of a BERT-like encoder that does not change the result.

Last layer: only the hidden state at the answer position is read, so only the query of that position is computed. For a
single query, the keys and values of the other positions are not needed: with h_j the hidden state of position j, the
score q.(W_k h_j + b_k) is (W_k^T q).h_j plus a constant that cancels in the softmax, and the mean of W_v h_j + b_v
under the attention is W_v times the mean of h_j, plus b_v. One product of H vectors with the text replaces two products
of the whole text with D x D matrices.

First layer: the text's part of its input is frozen, so the backward pass through its query, key and value
matrices is needed for the virtual tokens alone.

Both give the same result up to rounding. The parameters keep their names and values.

Legend: B batch, T tokens, V virtual tokens, D width, H heads, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fedprompt_mpi.plm.adapting import Adapting
from fedprompt_mpi.plm.own_dtype import multiply
from fedprompt_mpi.plm.quantised import is_quantised

BERT_LIKE = ("bert", "roberta", "electra", "xlm-roberta", "camembert")


def applies_to(model: Any) -> bool:
    """Return whether a masked language model is of a kind that these shortcuts know, and its weights are not packed."""
    is_known = model.config.model_type in BERT_LIKE and not getattr(model.config, "is_decoder", False)
    return is_known and not is_quantised(model.config)


def narrow_last_layer(model: Any, answers: Callable[[], torch.Tensor], adapting: Adapting) -> None:
    """Let the last layer compute the answer position alone; hidden states then are `[B, 1, D]`.

    Args:
        model: a model that this `applies_to`.
        answers: returns the answer positions `[B]` of the forward pass in progress.
        adapting: what is added to its keys and values, whose matrices are not multiplied by the text here.
    """
    layer = model.base_model.encoder.layer[-1]
    attention = layer.attention.self
    heads, width = attention.num_attention_heads, attention.attention_head_size
    key, value = (adapting.name_of(part) for part in (attention.key, attention.value))

    def forward(hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
        here = hidden[torch.arange(len(hidden), device=hidden.device), answers()]  # [B, D]
        query = attention.query(here).view(-1, heads, width) * attention.scaling
        key_matrix = attention.key.weight.to(query.dtype).view(heads, width, -1)
        value_matrix = attention.value.weight.to(query.dtype).view(heads, width, -1)
        into_text = torch.einsum("bhd,hdw->bhw", query, key_matrix)
        if (added := adapting.product_of(key)) is not None:
            low = torch.einsum("bhd,bhdr->bhr", query, added[1].unflatten(1, (heads, width)).to(query.dtype))
            into_text = into_text + low @ added[0].to(query.dtype)
        scores = into_text @ hidden.to(query.dtype).transpose(1, 2)  # [B, H, T]
        if attention_mask is not None:  # every position sees the same ones
            scores = scores.masked_fill(~attention_mask[:, 0, :1], -torch.inf)
        mean = functional.softmax(scores, dim=-1).to(query.dtype) @ hidden.to(query.dtype)  # [B, H, D]
        seen = torch.einsum("bhw,hdw->bhd", mean, value_matrix)
        if (added := adapting.product_of(value)) is not None:
            low = mean @ added[0].to(mean.dtype).mT
            seen = seen + torch.einsum("bhr,bhdr->bhd", low, added[1].unflatten(1, (heads, width)).to(mean.dtype))
        seen = seen.flatten(1) + attention.value.bias
        if (shift := adapting.shift_of(value)) is not None:
            seen = seen + shift
        return layer.feed_forward_chunk(layer.attention.output(seen, here)).unsqueeze(1)

    layer.forward = forward


def spare_first_layer(model: Any, virtual_tokens: Callable[[], int]) -> None:
    """Let the first layer's query, key and value pass no gradient to the text.

    Args:
        model: a model that this `applies_to`, with frozen embeddings.
        virtual_tokens: returns V of the forward pass in progress.
    """
    attention = model.base_model.encoder.layer[0].attention.self
    for linear in (attention.query, attention.key, attention.value):

        def forward(hidden: torch.Tensor, linear: Any = linear) -> torch.Tensor:
            virtual = virtual_tokens()
            if hidden.ndim < 3 or virtual == 0:
                return multiply(hidden, linear.weight, linear.bias)
            parts = (hidden[:, :virtual], hidden[:, virtual:].detach())
            # as matrices: slices of the batch would be multiplied row by row
            flat = [multiply(part.reshape(-1, part.shape[2]), linear.weight, linear.bias) for part in parts]
            done = [rows.unflatten(0, part.shape[:2]) for rows, part in zip(flat, parts, strict=True)]
            return torch.cat(done, dim=1)

        linear.forward = forward


def undo(model: Any) -> None:
    """Restore the model's own computation."""
    attention = model.base_model.encoder.layer[0].attention.self
    for module in (model.base_model.encoder.layer[-1], attention.query, attention.key, attention.value):
        module.__dict__.pop("forward", None)
