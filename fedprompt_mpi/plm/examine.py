"""Try out which methods work with a model: on a shrunk copy with random weights, against the plain model.

A model type is in order if the label words' logits are those of the plain model; with virtual tokens, those of the
plain model fed with `inputs_embeds`; with a prefix, those of the plain model fed with `past_key_values`, where it takes
one; if padding does not matter beyond what it does to the plain model; and if gradients reach every trained parameter.
`supported.py` keeps the outcome.

Legend: V virtual tokens, T tokens, D width of the word embeddings, L layers, H key-value heads, d width of a head.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedprompt_mpi.config import Family, PromptConfig, SettingsError
from fedprompt_mpi.plm.backbone import Backbone, Injection
from fedprompt_mpi.plm.hugging_face import family_of, first_line, model_class
from fedprompt_mpi.plm.late_imports import on_meta, with_shapes
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.plm.prefix import PrefixNotSeenError
from fedprompt_mpi.rules import registry

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embedding_size": 16,
    "hidden_dim": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "d_ff": 48, "ffn_dim": 48, "n_inner": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8, "d_kv": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "n_group": 1, "topk_group": 1, "attention_hidden_size": 32, "sliding_window": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "state_size": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "rotary_dim": 8, "decoder_start_token_id": 0,
    "attention_window": 16, "linear_num_heads": 4, "linear_head_dim": 8, "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
"""Sizes of a shrunk model, by the names that configs have for them."""
_VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"embedding_size": 32}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4, "n_layer": 4},
)  # fmt: skip
"""Other sizes, for models that cannot be built with those."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
MOST_PARAMETERS = 6_400_000
TOLERANCE = 1e-5
"""Of logits, relative to the largest."""
V, LENGTHS, LABELS = 3, (11, 7), (5, 9, 42)
"""Virtual tokens, lengths of two texts, and label words of a trial."""


class _Mismatch(Exception):  # noqa: N818 - it is what a trial is for
    """What a trial found."""


def examine(config: Any) -> dict[str, str]:
    """Try every method on a shrunk copy of a model; return for each why it does not work, empty if it does."""
    try:
        family = family_of(config)
        plain = _Plain(shrunk(config), family)
        methods = {name: _why(lambda name=name: _try_method(plain, name)) for name in registry.methods}
    except SettingsError as error:
        return dict.fromkeys(registry.methods, str(error))
    except Exception as error:
        return dict.fromkeys(registry.methods, f"no small copy of it can be built ({first_line(error)[:120]})")
    return methods


def model_types() -> list[str]:
    """Return the model types that the installed transformers offers with a language-model head."""
    from transformers.models.auto import modeling_auto as known

    heads = (
        known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )  # fmt: skip
    return sorted(set().union(*heads))


def examine_type(model_type: str) -> dict[str, str]:
    """Try every method with a model type, by its default config; return for each why it does not work."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return dict.fromkeys(registry.methods, f"it has no default config ({first_line(error)[:120]})")
    return examine(config)


def examine_all() -> dict[str, dict[str, str]]:
    """Try every method with every model type; one takes a tenth of a second."""
    return {model_type: examine_type(model_type) for model_type in model_types()}


def _why(trial: Callable[[], None]) -> str:
    try:
        trial()
    except (_Mismatch, PrefixNotSeenError, SettingsError) as found:
        return str(found)
    except Exception as error:  # whatever a model's code does
        return f"{type(error).__name__}: {first_line(error)[:120]}"
    return ""


def shrunk(config: Any) -> Any:
    """Return a config of the same type and features whose model is tiny.

    Raises:
        SettingsError: if it has sizes that are not known here.
    """
    reason = ""
    for other in _VARIANTS:
        try:
            small = _shrink(config, SMALL | other)
            built = on_meta(lambda: model_class(small).from_config(small))  # noqa: B023 - it runs at once
        except SettingsError:
            raise
        except Exception as error:
            reason = reason or first_line(error)[:120]
            continue
        size = sum(parameter.numel() for parameter in built.parameters())
        if size <= MOST_PARAMETERS:
            return small
        reason = f"it has {size:,} parameters"
    raise SettingsError(f"no small copy of it can be built to try it ({reason})")


def _shrink(config: Any, sizes: Mapping[str, Any]) -> Any:
    kind = type(config)
    content, renamed = config.to_dict(), getattr(kind, "attribute_map", {})
    wanted = {renamed.get(name, name): size for name, size in sizes.items()}
    wanted |= {name: sizes["vocab_size"] for name in content if "vocab_size" in name}
    chosen = {name: size for name, size in wanted.items() if _has_size(config, name)}
    nested = {
        name: _shrink(part, sizes) for name in kind.sub_configs if (part := getattr(config, name, None)) is not None
    }
    if "word_embed_proj_dim" in content and content["word_embed_proj_dim"] != content["hidden_size"]:
        chosen["word_embed_proj_dim"] = sizes["embedding_size"]  # OPT: narrow embeddings stay narrow
    layers = next((content[name] for name in _LAYERS if content.get(name)), None)
    lists = {name: value for name, value in content.items() if isinstance(value, list) and len(value) == layers}
    kept = {name: value[: sizes["n_layer"]] for name, value in lists.items() if name not in chosen}
    if "kv_lora_rank" in content:  # DeepSeek's attention has as many heads of keys as of queries
        chosen["num_key_value_heads"] = sizes["num_attention_heads"]
    rope = content.get("rope_parameters")
    if "rope_parameters" in content and not (isinstance(rope, dict) and any(map(_is_many, rope.values()))):
        chosen["rope_parameters"] = rope or {"rope_type": "default", "rope_theta": 10000.0}
    features = {
        name: value
        for name, value in content.items()
        if isinstance(value, bool | str) and name not in ("model_type", "dtype", "transformers_version")
    }
    return kind(**{**features, **kept, **chosen, **nested})


def _is_many(value: Any) -> bool:
    return isinstance(value, list | dict)


def _has_size(config: Any, name: str) -> bool:
    """Return True if a config has a size of a name, which can be set."""
    declared = getattr(type(config), name, None)
    if isinstance(declared, property) and declared.fset is None:
        return False
    try:
        value = getattr(config, name)
    except Exception:  # a size of each layer
        return False
    return (isinstance(value, int | list) and not isinstance(value, bool)) or (value is None and name == "vocab_size")


class _Plain:
    """A small model with random weights, asked as transformers' users ask it."""

    def __init__(self, config: Any, family: Family) -> None:
        self.config = config
        self.family: Family = family
        torch.manual_seed(0)
        self.model = with_shapes(lambda: model_class(config).from_config(config)).eval().float()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:  # large enough to tell one position from another
                    parameter.normal_(0.0, 0.15)
        self.embedding = self.model.get_input_embeddings()
        if self.embedding is None or not hasattr(self.embedding, "weight"):
            raise SettingsError("it has no table of word embeddings, among which virtual tokens could stand")
        if getattr(self.model.get_output_embeddings(), "weight", None) is None:
            raise SettingsError("it has no output embedding, whose rows of the label words could be read")
        random = torch.Generator().manual_seed(1)
        rows = min(self.embedding.weight.shape[0], SMALL["vocab_size"])
        self.ids = [torch.randint(4, rows, (length,), generator=random) for length in LENGTHS]
        self.answers = [length - 1 if family == "causal" else length - 3 for length in LENGTHS]
        self.virtual = torch.randn(V, self.embedding.weight.shape[1], generator=random)
        start = getattr(config, "decoder_start_token_id", None)
        self.decoder_ids = torch.tensor([[start or 0, 3]])

    def backbone(self) -> Backbone:
        """Return the program's form of a copy of the model."""
        return Backbone(copy.deepcopy(self.model), self.family, torch.tensor(LABELS), bf16=False, sentinel=3)

    def logits(self, text: int, virtual: torch.Tensor | None = None, past: Any = None) -> torch.Tensor:
        """Return `[labels]` of the model alone for a text, with virtual tokens in front, or a cache."""
        inputs: dict[str, Any] = {"input_ids": self.ids[text][None]}
        if virtual is not None:
            words = self.embedding(self.ids[text][None])
            inputs = {"inputs_embeds": torch.cat([virtual[None].to(words.dtype), words], dim=1)}
        length = len(self.ids[text]) + (0 if virtual is None else V)
        seen = length + (V if past is not None and self.family == "causal" else 0)
        inputs["attention_mask"] = torch.ones(1, seen, dtype=torch.long)
        if self.family != "masked":
            inputs |= {"use_cache": False} if past is None else {"past_key_values": past, "use_cache": True}
        if self.family == "seq2seq":
            inputs["decoder_input_ids"] = self.decoder_ids
        out = self.model(**inputs, return_dict=True).logits[0]
        at = 1 if self.family == "seq2seq" else self.answers[text] + (0 if virtual is None else V)
        return out[at, list(LABELS)]

    def padded(self, virtual: torch.Tensor | None) -> torch.Tensor:
        """Return `[texts, labels]` of the model alone for all texts in one padded batch."""
        ids, mask = _pad(self.ids)
        embeds = self.embedding(ids)
        if virtual is not None:
            embeds = torch.cat([virtual.expand(len(ids), -1, -1), embeds], dim=1)
            mask = torch.nn.functional.pad(mask, (V, 0), value=True)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask.long()}
        if self.family == "seq2seq":
            inputs["decoder_input_ids"] = self.decoder_ids.expand(len(ids), -1)
        if self.family != "masked":
            inputs["use_cache"] = False
        out = self.model(**inputs, return_dict=True).logits
        shift = 0 if virtual is None else V
        at = [1 if self.family == "seq2seq" else answer + shift for answer in self.answers]
        return out[torch.arange(len(ids)), torch.tensor(at)][:, list(LABELS)]


def _pad(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor([[len(text)] for text in texts])
    return ids, mask


def _ask(backbone: Backbone, plain: _Plain, injection: Injection, *texts: int) -> torch.Tensor:
    ids, mask = _pad([plain.ids[text] for text in texts])
    return backbone.score(ids, mask, torch.tensor([plain.answers[text] for text in texts]), injection)


def _same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    if not ours.isfinite().all() or not theirs.isfinite().all():
        raise _Mismatch(f"{what} are not finite")
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    if off > TOLERANCE:
        raise _Mismatch(f"{what} are not those of the plain model ({off:.1g} off)")


def _try_method(plain: _Plain, method: str) -> None:
    backbone = plain.backbone()
    with torch.no_grad():
        _same(_ask(backbone, plain, Injection(), 0)[0], plain.logits(0), "the label words' logits")
    if method == "prefix":
        _try_prefix(plain, backbone)
    elif method == "full":
        _try_full(plain, backbone)
    elif method in ("lora", "bitfit"):
        _try_added(plain, backbone, method)
    else:
        _try_virtual_tokens(plain, backbone)


def _try_virtual_tokens(plain: _Plain, backbone: Backbone) -> None:
    ours = plain.virtual.clone().requires_grad_()
    theirs = plain.virtual.clone().requires_grad_()
    if backbone.geometry.embedding_width != plain.virtual.shape[1]:
        raise _Mismatch("the width of its embeddings is not what its config says")
    scores, expected = _ask(backbone, plain, Injection(virtual_tokens=ours[None]), 0)[0], plain.logits(0, theirs)
    _same(scores.detach(), expected.detach(), "logits with virtual tokens")
    _same_gradients(scores, [ours], expected, [theirs])
    with torch.no_grad():
        together = _ask(backbone, plain, Injection(virtual_tokens=ours[None]), 0, 1)
        _same(together, plain.padded(plain.virtual), "logits of a padded batch")


def _same_gradients(
    ours: torch.Tensor, our_leaves: list[torch.Tensor], theirs: torch.Tensor, their_leaves: list[torch.Tensor]
) -> None:
    weights = torch.tensor([1.0, -2.0, 0.5])
    got = torch.autograd.grad((ours * weights).sum(), our_leaves, allow_unused=True)
    expected = torch.autograd.grad((theirs * weights).sum(), their_leaves, allow_unused=True)
    largest = max(float(wanted.abs().max()) for wanted in expected if wanted is not None)
    for mine, wanted in zip(got, expected, strict=True):
        if wanted is not None and float(wanted.abs().max()) > TOLERANCE * largest:  # else it is 0 but for rounding
            if mine is None:
                raise _Mismatch("gradients do not reach every trained parameter")
            _same(mine, wanted, "gradients")


def _try_full(plain: _Plain, backbone: Backbone) -> None:
    names = [name for name, _ in plain.model.named_parameters()]
    if set(names) != {name for name, _ in backbone.model.named_parameters()}:
        raise _Mismatch("its parameters are not named once each")
    leaves = []
    for model in (backbone.model, plain.model):
        by_name = dict(model.named_parameters())
        leaves.append([by_name[name].requires_grad_() for name in names])
    try:
        _same_gradients(_ask(backbone, plain, Injection(), 0)[0], leaves[0], plain.logits(0), leaves[1])
        with torch.no_grad():
            _same(_ask(backbone, plain, Injection(), 0, 1), plain.padded(None), "logits of a padded batch")
    finally:
        plain.model.requires_grad_(False)


def _try_added(plain: _Plain, backbone: Backbone, name: str) -> None:
    """Compare what is added to the outputs of matrices with the same added to the matrices themselves."""
    from fedprompt_mpi.config import LoRAConfig

    prompt = PromptConfig(method=name, lora=LoRAConfig(rank=2))
    method = make_method(prompt, backbone.geometry, backbone.model)
    start = torch.from_numpy(method.initial(np.zeros((1, 1), dtype=np.float32), np.random.default_rng(0)))
    noise = torch.randn(2, len(start), generator=torch.Generator().manual_seed(2))
    clients = method.leaves(start + 0.3 * noise)
    injection = method.inject(clients[:1])
    merged = copy.copy(plain)
    merged.model = copy.deepcopy(plain.model)
    _merge(dict(merged.model.named_modules()), injection)
    scores = _ask(backbone, plain, injection, 0)[0]
    gradients = ()
    if scores.requires_grad:
        gradients = torch.autograd.grad(scores.sum(), list(clients[0].values()), allow_unused=True, retain_graph=True)
    if not any(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients):
        raise _Mismatch("gradients do not reach what is added")
    with torch.no_grad():
        _same(scores.detach(), merged.logits(0), "logits with what is added")
        alone = [scores, _ask(backbone, plain, method.inject(clients[1:]), 0)[0]]
        ids, mask = _pad([plain.ids[0], plain.ids[0]])
        answers, owners = torch.tensor([plain.answers[0]] * 2), torch.arange(2)
        both = backbone.score(ids, mask, answers, method.inject(clients), owners)
        _same(both, torch.stack(alone), "logits of two clients in one pass")


def _merge(modules: Mapping[str, Any], injection: Injection) -> None:
    """Add to the matrices and biases of a plain model what an injection of one client adds to their outputs."""
    with torch.no_grad():
        for name, (a, b) in injection.low_rank.items():
            product = b[0] @ a[0]
            modules[name].weight += product if modules[name].weight.shape == product.shape else product.T
        for name, shift in injection.shifts.items():
            modules[name].bias += shift[0]


def _try_prefix(plain: _Plain, backbone: Backbone) -> None:
    method = make_method(PromptConfig(method="prefix", num_virtual_tokens=V, prefix_hidden_size=4), backbone.geometry)
    made = method.inject([dict(zip(method.layout.names, map(torch.randn, method.layout.shapes), strict=True))]).prefix
    if made is None:
        raise RuntimeError("there is no prefix")
    prefix = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scores = _ask(backbone, plain, Injection(prefix=prefix), 0)[0]
    (gradient,) = torch.autograd.grad(scores.sum(), [prefix], retain_graph=True)
    if not gradient.isfinite().all() or bool((gradient.abs().amax(dim=(2, 3, 5)) == 0).any()):
        raise _Mismatch("gradients do not reach the prefix of every layer")
    if plain.family != "masked":  # a masked model takes no cache: there is nothing to compare with
        theirs = prefix.detach().clone().requires_grad_()
        expected = plain.logits(0, past=_cache(plain, theirs))
        _same(scores.detach(), expected.detach(), "logits with a prefix")
        _same_gradients(scores, [prefix], expected, [theirs])
    with torch.no_grad():
        together = _ask(backbone, plain, Injection(prefix=prefix.expand(-1, -1, 1, -1, -1, -1)), 0, 1)
        _same(together[0], scores.detach(), "logits of a padded batch")
        alone = _ask(backbone, plain, Injection(prefix=prefix), 1)[0]
        padding = plain.padded(None)[1] - plain.logits(1)  # where it matters to the plain model, it may here
        if bool(padding.abs().max() < TOLERANCE):
            _same(together[1], alone, "logits of a padded batch")


def _cache(plain: _Plain, prefix: torch.Tensor) -> Any:
    """Return `[L, 2, 1, H, V, d]` as the cache that a model takes."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache(config=plain.config.get_text_config(decoder=True))
    for layer, (key, value) in enumerate(prefix):
        cache.update(key, value, layer)
    return EncoderDecoderCache(cache, DynamicCache()) if plain.family == "seq2seq" else cache
