"""LoRA and BitFit: what is added to the matrices of the frozen PLM, or to its biases.

Legend: K clients, P parameters, r rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedprompt_mpi import seeds
from fedprompt_mpi.config import PromptConfig, SettingsError
from fedprompt_mpi.plm.backbone import Injection
from fedprompt_mpi.plm.hugging_face import Geometry
from fedprompt_mpi.plm.method_base import Method, Parameters
from fedprompt_mpi.rules.low_rank import Pair
from fedprompt_mpi.rules.registry import methods

ATTENTION = (
    ("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("query_key_value",), ("q_lin", "v_lin"), ("c_attn",),
    ("qkv_proj",), ("Wqkv",), ("query_proj", "value_proj"), ("q_b_proj", "kv_b_proj"), ("Wq", "Wv"), ("in_proj_qkv",),
    ("in_proj_qkvz",), ("in_proj", "x_proj"),
)  # fmt: skip
"""Names of the matrices of queries and values, or of those that hold them; the first that a model has are adapted."""
OTHERS = {
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
}
"""Model type -> what PEFT adapts there by default, if that is not queries and values."""
A, B = "lora_A", "lora_B"


class NotThereError(SettingsError):
    """The model has nothing that the method could train."""


def targets_of(model: Any, named: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Return the modules that get a product of two matrices, by name, with the sizes of their outputs and inputs.

    Args:
        model: the PLM.
        named: ends of their names, as PEFT's target_modules; None for those of queries and values.

    Raises:
        SettingsError: if the model has none of a name, or one is no matrix.
    """
    sizes = {name: _sizes(module) for name, module in model.named_modules() if name}
    matrices = {name: size for name, size in sizes.items() if size is not None}
    if named is None:
        kind = model.config.model_type
        groups = [OTHERS[kind]] if kind in OTHERS else ATTENTION
        named = next((group for group in groups if any(_is_named(name, group) for name in matrices)), None)
        if named is None:
            raise NotThereError(
                f"a {kind} model has no queries and values of a known name: name its matrices by prompt.lora.targets"
            )
        return {name: size for name, size in matrices.items() if _is_named(name, named)}
    for target in named:
        found = [name for name in sizes if _is_named(name, [target])]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in matrices})
            raise SettingsError(
                f"prompt.lora.targets names {target[:60]!r}, which the model does not have; its matrices are "
                f"{', '.join(ends)[:300]}"
            )
        for name in found:
            if name not in matrices:
                raise SettingsError(f"prompt.lora.targets names {target[:60]!r}, but {name} is no matrix: take it out")
    return {name: size for name, size in matrices.items() if _is_named(name, named)}


def _is_named(module: str, targets: Sequence[str]) -> bool:
    """Return whether a module has one of these names, or ends in one."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _sizes(module: Any) -> tuple[int, int] | None:
    """Return the sizes of a matrix's outputs and inputs; None if the module is none."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    from transformers.pytorch_utils import Conv1D

    return (module.nf, module.weight.shape[0]) if isinstance(module, Conv1D) else None


@methods.register("lora")
class LoRA(Method):
    """A product of two small matrices, added to each of some matrices: x W + alpha / r x A^T B^T.

    With `prompt.lora.aggregation` freeze_a the vector holds B alone, and A is drawn from `prompt.lora.seed`.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685, Section 4.1.
        Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv:2403.12313 (FFA-LoRA).
        Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
        arXiv:2401.06432 (clients of different ranks: truncation and zero-padding).
    """

    adds_tokens = takes_positions = False

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any) -> None:
        """Lay out A `[r, in]` and B `[out, r]` of each module.

        Raises:
            SettingsError: if the model has not these modules, or the rank is above a matrix's.
        """
        self._targets, rank = targets_of(model, config.lora.targets), config.lora.rank
        for name, sizes in self._targets.items():
            if rank > min(sizes):
                raise SettingsError(
                    f"prompt.lora.rank is {rank}, but {name} is a matrix of {sizes[0]} x {sizes[1]}: give at most "
                    f"{min(sizes)}"
                )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in self._targets.items():
            shapes |= {f"{name}.{A}": (rank, inputs), f"{name}.{B}": (outputs, rank)}
        self._frozen: dict[str, torch.Tensor] = {}
        if config.lora.aggregation == "freeze_a":
            rng = seeds.generator(config.lora.seed, "lora A")
            drawn = {name: _uniform(shape, rng) for name, shape in shapes.items() if name.endswith(A)}
            self._frozen = {name: torch.from_numpy(a) for name, a in drawn.items()}
            shapes = {name: shape for name, shape in shapes.items() if name.endswith(B)}
        super().__init__(config, geometry, shapes)
        if not self._frozen:
            starts = dict(zip(self.layout.names, self.layout.offsets[:-1], strict=True))
            self.pairs = [
                Pair(start=starts[f"{name}.{A}"], rank=rank, inputs=inputs, outputs=outputs)
                for name, (outputs, inputs) in self._targets.items()
            ]

    def _initial_parameter(
        self, name: str, shape: tuple[int, ...], embeddings: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return zeros for B, and for A what PEFT begins with."""
        return np.zeros(shape, dtype=np.float32) if name.endswith(B) else _uniform(shape, rng)

    def restrict(self, vectors: torch.Tensor, clients: Sequence[int]) -> bool:
        """Set to zero what is beyond each client's own rank: rows of A, columns of B. There no gradient moves them."""
        ranks = self.config.lora.ranks
        for vector, client in zip(vectors, clients, strict=True):
            rank = ranks[client % len(ranks)] if ranks is not None else self.config.lora.rank
            if rank < self.config.lora.rank:
                for name, values in self.layout.views(vector).items():
                    values.narrow(*((0, rank) if name.endswith(A) else (1, rank)), self.config.lora.rank - rank).zero_()
        return ranks is not None

    def named(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return A and B of each module by name, an A that is not trained too."""
        return super().named(vector) | {name: a.numpy(force=True) for name, a in self._frozen.items()}

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return A `[K, r, in]` and B `[K, out, r]` of each module."""
        scale = self.config.lora.alpha / self.config.lora.rank
        b = {name: torch.stack([client[f"{name}.{B}"] for client in clients]) for name in self._targets}
        return Injection(low_rank={name: (self._a(name, clients, b[name]), scale * b[name]) for name in b})

    def _a(self, name: str, clients: list[Parameters], b: torch.Tensor) -> torch.Tensor:
        """Return a module's A `[K, r, in]`, on the device of B."""
        if not self._frozen:
            return torch.stack([client[f"{name}.{A}"] for client in clients])
        self._frozen[f"{name}.{A}"] = own = self._frozen[f"{name}.{A}"].to(b.device)
        return own.expand(len(clients), -1, -1)


def _uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return A `[r, in]` as PEFT begins with it: uniform within 1 / sqrt(in), float32."""
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


@methods.register("bitfit")
class BitFit(Method):
    """The biases of the PLM, but that of its output embedding, of which a few rows are used.

    References:
        Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
        2021, arXiv:2106.10199.
    """

    adds_tokens = takes_positions = False

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any) -> None:
        """Lay out the biases.

        Raises:
            SettingsError: if the model has none.
        """
        self._biases = biases_of(model)
        if not self._biases:
            raise NotThereError(f"a {model.config.model_type} model has no biases, which prompt.method bitfit trains")
        super().__init__(config, geometry, {name: tuple(bias.shape) for name, bias in self._biases.items()})

    def initial(self, embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the pre-trained biases `[P]` float32."""
        return np.concatenate([bias.detach().float().cpu().numpy().ravel() for bias in self._biases.values()])

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return what is added to the output of each module `[K, out]`: its biases' distance from the pre-trained."""
        return Injection(
            shifts={
                name.removesuffix(".bias"): torch.stack([client[name] for client in clients]) - bias.detach().float()
                for name, bias in self._biases.items()
            }
        )


def biases_of(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the biases of a PLM by name, without that of its output embedding."""
    head = model.get_output_embeddings()
    without = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    named = dict(model.named_parameters())
    found = {name: bias for name, bias in named.items() if name.endswith(".bias") and id(bias) not in without}
    ends = {name.removesuffix(".bias") for name in found}
    kept = {name for name, module in model.named_modules() if name in ends and module.bias is not None}
    return {name: bias for name, bias in found.items() if name.removesuffix(".bias") in kept and bias.dim() == 1}
