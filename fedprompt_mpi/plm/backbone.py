"""The frozen PLM: load it, and score the label words at the answer position.

Three families behind one interface: masked (the answer stands at the mask token), seq2seq (T5: the
decoder answers for its sentinel) and causal (the answer is the next token).

Legend: B batch, T tokens, V virtual tokens, D width of the word embeddings, C classes, U tokens of
their label words, K clients, L layers, H key-value heads, d width of a head.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedprompt_mpi.config import Family, ModelConfig, RunConfig, SettingsError
from fedprompt_mpi.plm import own_dtype, shortcuts
from fedprompt_mpi.plm.adapting import Adapting, LowRank
from fedprompt_mpi.plm.hugging_face import as_one_message, family_of, geometry_of, model_class, read_config
from fedprompt_mpi.plm.late_imports import with_shapes
from fedprompt_mpi.plm.model_folder import Weights
from fedprompt_mpi.plm.own_dtype import has_plain_weight
from fedprompt_mpi.plm.quantised import is_quantised, keep_one_arithmetic, one_place
from fedprompt_mpi.rules import registry

WORDS_AT_ONCE = 1 << 14
BF16_PAYS_FROM_WIDTH = 256  # below, casting costs more than the faster arithmetic gains


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """The trained input of the frozen PLM, for K clients."""

    virtual_tokens: torch.Tensor | None = None
    """`[K, V, D]`: put in front of the text's embeddings."""
    prefix: torch.Tensor | None = None
    """`[L, 2, K, H, V, d]`: keys and values put in front of each layer's own."""
    low_rank: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)
    """Name of a module -> A `[K, r, in]` and B `[K, out, r]`, whose product is added to its matrix."""
    shifts: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Name of a module -> `[K, out]`, added to its output."""


class LabelWordHead(nn.Module):
    """The output embedding, restricted to the rows of the label words' tokens.

    The vocabulary projection is over half of a small PLM's work, and only U of its rows are used. The parameters stay
    whole (and tied), so that full fine-tuning trains the right ones.
    """

    def __init__(self, head: Any, label_ids: torch.Tensor) -> None:
        """Take over the weight `[vocabulary, D]` and bias of `head`; `label_ids` is `[U]` int64."""
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.register_buffer("label_ids", label_ids, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[..., U]` logits of hidden states `[..., D]`."""
        bias = None if self.bias is None else self.bias[self.label_ids]
        rows = self.weight[self.label_ids]
        return nn.functional.linear(hidden, rows.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


class Backbone:
    """A frozen PLM that scores the label words."""

    def __init__(self, model: Any, family: Family, label_ids: torch.Tensor, *, bf16: bool, sentinel: int = 0) -> None:
        """Freeze a model.

        Args:
            model: language model in Hugging Face form, on the device where it runs; in evaluation mode from here on.
            family: how it answers.
            label_ids: `[U]` int64 token ids; U = C unless `weigh` says more.
            bf16: compute in bfloat16 (by autocast: weights and what is trained stay as they are).
            sentinel: id of T5's sentinel token.
        """
        self.model = model.eval().requires_grad_(False)
        self.family: Family = family
        self.bf16 = bf16
        self.weights: Weights | None = None
        """The files that the model's weights are mapped from."""
        self.geometry = geometry_of(model.config, model)
        self._embedding = self.model.get_input_embeddings()
        self.device: torch.device = self._embedding.weight.device
        self.model.set_output_embeddings(LabelWordHead(self.model.get_output_embeddings(), label_ids.to(self.device)))
        if getattr(model, "final_logits_bias", None) is not None:  # BART's, a column a word
            model.final_logits_bias = model.final_logits_bias[:, label_ids.to(self.device)]
        self._shares: torch.Tensor | None = None
        self._rates: list[tuple[Any, str, float]] = []  # of dropout, which layers that compute again have set to 0
        self._answers = torch.zeros(0, dtype=torch.long)
        self._virtual_tokens = 0
        self.recomputes = False
        """True if the backward pass computes activations again: then it must follow the forward pass at once."""
        self._adapting = Adapting(self.model)
        self._shortcuts = family == "masked" and shortcuts.applies_to(self.model)
        if self._shortcuts:
            shortcuts.narrow_last_layer(self.model, lambda: self._answers, self._adapting)
            shortcuts.spare_first_layer(self.model, lambda: self._virtual_tokens)
        start = getattr(model.config, "decoder_start_token_id", None)
        self._decoder_ids = torch.tensor([[start or 0, sentinel]], device=self.device)

    @property
    def vocabulary(self) -> int:
        """Number of words that have an embedding."""
        return self._embedding.weight.shape[0]

    @torch.no_grad()
    def word_embeddings(self) -> np.ndarray:
        """Return what the model makes of each word `[vocabulary, D]` float32: Gemma scales its embeddings."""
        ids = torch.arange(self.vocabulary, device=self.device)
        return np.concatenate([self._embedding(part).float().cpu().numpy() for part in ids.split(WORDS_AT_ONCE)])

    @property
    def embedding_name(self) -> str:
        """Name of the word embeddings among the PLM's parameters."""
        return next(name for name, own in self.model.named_parameters() if own is self._embedding.weight)

    @property
    def num_parameters(self) -> int:
        """Parameters of the PLM, tied ones counted once."""
        return self.model.num_parameters()

    def weigh(self, shares: np.ndarray) -> None:
        """Let the logit of a class be the sum of its tokens' logits, each times its share: `[U, C]` float32."""
        is_one_each = shares.shape[0] == shares.shape[1] and (shares == np.eye(len(shares))).all()
        self._shares = None if is_one_each else torch.from_numpy(shares).to(self.device)

    def recompute_activations(self) -> None:
        """Keep the activations between layers alone, and compute the others again in the backward pass.

        The library does so in training mode; here only the layers themselves are told so, and drop nothing out unless
        `dropping_out` says so.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers: list[Any] = [
            module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        if not layers:
            raise SettingsError(
                f"model.checkpoint_activations is true, which a {self.model.config.model_type} model cannot do: "
                "leave it out, and take smaller parts (client.accumulate)"
            )
        self.recomputes = True
        for layer in layers:
            for name, value in list(vars(layer).items()):
                if "dropout" in name and isinstance(value, float):
                    self._rates.append((layer, name, value))
                    setattr(layer, name, 0.0)
            layer.gradient_checkpointing = layer.training = True
            again = functools.partial(checkpoint, use_reentrant=False, context_fn=self._adapting.both_passes)
            layer._gradient_checkpointing_func = again

    @contextlib.contextmanager
    def dropping_out(self, seed: int) -> Iterator[None]:
        """Within, drop out at the rates of the model's config; what is dropped depends on the seed alone."""
        before = {module: module.training for module in self.model.modules()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model.train()
            for layer, name, rate in self._rates:
                setattr(layer, name, rate)
            try:
                yield
            finally:
                for layer, name, _ in self._rates:
                    setattr(layer, name, 0.0)
                for module, training in before.items():
                    module.training = training

    def take_no_shortcuts(self) -> None:
        """Compute every position and every gradient, as a prefix and dropout require."""
        if self._shortcuts:
            shortcuts.undo(self.model)
            self._shortcuts = False

    def score(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        answers: torch.Tensor,
        injection: Injection,
        owners: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the label words' logits at each row's answer position.

        Args:
            ids: `[B, T]` int64 token ids.
            mask: `[B, T]` bool, False at padding.
            answers: `[B]` int64 answer positions.
            injection: the trained input of K clients.
            owners: `[B]` int64, the client of each row; None if K is 1.

        Returns:
            `[B, C]` float32.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self._embedding(ids)
            virtual = _of_rows(injection.virtual_tokens, owners, len(ids), axis=0)
            self._virtual_tokens = 0 if virtual is None else virtual.shape[1]
            if virtual is not None:
                embeddings = torch.cat([virtual.to(embeddings.dtype), embeddings], dim=1)
                mask = nn.functional.pad(mask, (virtual.shape[1], 0), value=True)
                answers = answers + virtual.shape[1]
            prefix = _of_rows(injection.prefix, owners, len(ids), axis=2)
            with self._adapting.adding(injection.low_rank, injection.shifts, owners, len(ids)):
                logits = self._logits(embeddings, mask, answers, prefix).float()
        return logits if self._shares is None else logits @ self._shares

    def _logits(
        self, embeddings: torch.Tensor, mask: torch.Tensor, answers: torch.Tensor, prefix: torch.Tensor | None
    ) -> torch.Tensor:
        inputs: dict[str, Any] = {
            "inputs_embeds": embeddings,
            "attention_mask": mask.long(),
            "use_cache": False,
            "return_dict": True,
        }
        if self.family == "seq2seq":
            inputs["decoder_input_ids"] = self._decoder_ids.expand(len(embeddings), -1)
        elif self.family == "masked":
            del inputs["use_cache"]
        elif prefix is not None:  # the prefix holds the first positions
            inputs["position_ids"] = torch.arange(embeddings.shape[1], device=self.device)[None] + prefix.shape[4]
        self._answers = answers
        if prefix is not None:  # it is added to the keys and values of every layer
            self.take_no_shortcuts()
        with self._steered(prefix):
            logits = self.model(**inputs).logits
        if self.family == "seq2seq":
            return logits[:, 1]
        if self._shortcuts:
            return logits[:, 0]
        return logits[torch.arange(len(logits), device=self.device), answers]

    def _steered(self, prefix: torch.Tensor | None) -> Any:
        if prefix is None:
            return contextlib.nullcontext()
        from fedprompt_mpi.plm.prefix import ATTENTION, prefixed

        if self.model.config._attn_implementation != ATTENTION:
            self.model.set_attn_implementation(ATTENTION)
        return prefixed(prefix, decoder_only=self.family == "seq2seq")


def _of_rows(injected: torch.Tensor | None, owners: torch.Tensor | None, rows: int, axis: int) -> torch.Tensor | None:
    """Repeat each client's injection for its rows."""
    if injected is None:
        return None
    if owners is None:
        shape = list(injected.shape)
        shape[axis] = rows
        return injected.expand(shape)
    return injected.index_select(axis, owners)


def load_backbone(
    config: ModelConfig, folder: str, label_ids: torch.Tensor, device: torch.device, sentinel: int
) -> Backbone:
    """Load a PLM's weights, memory-mapped, so that a node's ranks share one copy.

    Raises:
        SettingsError: if weights are missing or damaged, or the model has no language-model head.
    """
    plm_config = read_config(folder)
    family = family_of(plm_config)
    weights = Weights(Path(folder))
    with as_one_message(f"model.name is {folder!r}, whose weights cannot be read as safetensors"):
        load = functools.partial(
            model_class(plm_config).from_pretrained,
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **(one_place(device) if is_quantised(plm_config) else {}),
        )
        model, info = with_shapes(load)  # it builds the model on the meta device
    if info["missing_keys"]:
        raise SettingsError(
            f"model.name is {folder!r}, which lacks the weights {sorted(info['missing_keys'])[:3]}: "
            "use a checkpoint with its language-model head"
        )
    if not has_plain_weight(model.get_output_embeddings()):
        raise SettingsError(
            f"model.name is {folder!r}, whose output embedding is quantised, so that the label words cannot be scored "
            "alone: use a checkpoint that leaves it as it was (llm_int8_skip_modules)"
        )
    own_dtype.keep(model)
    text = plm_config.get_text_config(decoder=True)  # of a model of pictures and text
    bf16 = use_bf16(config.dtype, device, getattr(text, "hidden_size", 0))
    placed = model if is_quantised(plm_config) else model.to(device)
    backbone = Backbone(placed, family, label_ids, bf16=bf16, sentinel=sentinel)
    backbone.weights = weights
    keep_one_arithmetic(backbone.model)
    if config.checkpoint_activations:
        backbone.recompute_activations()
    return backbone


def check_fit(config: RunConfig, backbone: Backbone, largest_id: int) -> None:
    """Check that texts fit into a model.

    Args:
        config: lengths of text and prompt.
        backbone: the model.
        largest_id: the largest token id of the texts.

    Raises:
        SettingsError: if they have more tokens than the model has positions, or an id without an embedding.
    """
    virtual = config.prompt.num_virtual_tokens if registry.methods[config.prompt.method].takes_positions else 0
    positions, rows = backbone.geometry.max_positions, backbone.vocabulary
    if positions is not None and config.model.max_length + virtual > positions:
        longest = f"a max_length of at most {positions - virtual}" if positions > virtual else "fewer virtual tokens"
        raise SettingsError(
            f"model.max_length is {config.model.max_length} and prompt.num_virtual_tokens {virtual}, but the model has "
            f"{positions} positions: give {longest}"
        )
    if largest_id >= rows:
        raise SettingsError(
            f"model.name is {config.model.name!r}, whose tokenizer makes the token {largest_id}, but the model has "
            f"{rows} embeddings: take the tokenizer that belongs to it"
        )


def use_bf16(dtype: str, device: torch.device, width: int) -> bool:
    """Return whether to compute in bfloat16: as set, or if the hardware has it and the model is wide enough."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and width >= BF16_PAYS_FROM_WIDTH


def _matrices(backbone: Backbone) -> dict[str, Any]:
    """Return the modules that multiply by a matrix, by name, but those of bfloat16; they do nearly all of the work."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and has_plain_weight(module) and module.weight.dtype != torch.bfloat16
    }


def save_matrices(backbone: Backbone, file: Path) -> None:
    """Write the matrices' weights in bfloat16, for all ranks of a node to map."""
    from safetensors.torch import save_file

    weights = {name: module.weight.to(torch.bfloat16).contiguous() for name, module in _matrices(backbone).items()}
    save_file(weights, file)


def map_matrices(backbone: Backbone, file: Path) -> None:
    """Replace the weights of the matrices by those of `file`.

    Autocast would cast every matrix in every step and keep the copies until the backward pass: half the PLM's size on
    each rank of a node. Norms, embeddings and label words stay in float32.
    """
    from safetensors.torch import load_file

    weights = load_file(file)
    for name, module in _matrices(backbone).items():
        module.weight = nn.Parameter(weights[name], requires_grad=False)


def cast_matrices(backbone: Backbone) -> None:
    """Convert the weights of the matrices to bfloat16 in place; see `map_matrices`."""
    for module in _matrices(backbone).values():
        module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
