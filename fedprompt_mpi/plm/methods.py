"""Tuning methods: soft prompt, P-tuning, prefix tuning, or the whole PLM; LoRA and BitFit have files of their own.

Legend: K clients, P parameters, V virtual tokens, D width of the word embeddings, L layers, H key-value
heads, d width of a head, M hidden width of the prefix perceptron.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from fedprompt_mpi.config import PromptConfig
from fedprompt_mpi.plm import lora  # noqa: F401 - registers its methods
from fedprompt_mpi.plm.backbone import Injection
from fedprompt_mpi.plm.hugging_face import Geometry
from fedprompt_mpi.plm.late_imports import on_meta
from fedprompt_mpi.plm.method_base import Method, Parameters
from fedprompt_mpi.rules.registry import methods


@methods.register("soft")
class SoftPrompt(Method):
    """Virtual tokens, trained directly.

    References:
        Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv:2104.08691.
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 3.
    """

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any = None) -> None:
        """Lay out `virtual_tokens` `[V, D]`."""
        super().__init__(config, geometry, {"virtual_tokens": (config.num_virtual_tokens, geometry.embedding_width)})

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return the virtual tokens `[K, V, D]`."""
        return Injection(virtual_tokens=torch.stack([client["virtual_tokens"] for client in clients]))


class _Reparametrised(Method):
    """A method whose parameters are those of a small network, run once for each client and step."""

    def __init__(self, config: PromptConfig, geometry: Geometry, network: nn.Module) -> None:
        super().__init__(
            config, geometry, {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        )
        self._network = network

    def _run(self, clients: list[Parameters]) -> list[torch.Tensor]:
        return [torch.func.functional_call(self._network, client, ()) for client in clients]


class _PTuningNetwork(nn.Module):
    """Virtual tokens `[V, D]` through a bidirectional LSTM of 2 layers and a perceptron, to `[V, D]`."""

    def __init__(self, virtual_tokens: int, width: int) -> None:
        super().__init__()
        self.virtual_tokens = nn.Parameter(torch.empty(virtual_tokens, width))
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> torch.Tensor:
        return self.mlp(self.lstm(self.virtual_tokens)[0])


@methods.register("p_tuning")
class PTuning(_Reparametrised):
    """Virtual tokens computed by an LSTM and a perceptron, which are trained with them.

    References:
        Liu et al., GPT Understands, Too, 2021, arXiv:2103.10385, Section 3.2.
    """

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any = None) -> None:
        """Lay out the network's parameters."""
        sizes = config.num_virtual_tokens, geometry.embedding_width
        super().__init__(config, geometry, on_meta(lambda: _PTuningNetwork(*sizes)))

    def _fan_in(self, name: str) -> int:
        return self.geometry.embedding_width * (2 if name.startswith("mlp.0") else 1)

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return the network's virtual tokens `[K, V, D]`."""
        return Injection(virtual_tokens=torch.stack(self._run(clients)))


class _PrefixNetwork(nn.Module):
    """Virtual tokens `[V, D]` through a two-layer tanh perceptron, to `[V, L * 2 * H * d]`."""

    def __init__(self, virtual_tokens: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.virtual_tokens = nn.Parameter(torch.empty(virtual_tokens, width))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def forward(self) -> torch.Tensor:
        return self.mlp(self.virtual_tokens)


@methods.register("prefix")
class Prefix(_Reparametrised):
    """Keys and values in front of those of every layer (in T5: of every decoder layer).

    References:
        Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021, arXiv:2101.00190, Section 4.3.
    """

    adds_tokens = False

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any = None) -> None:
        """Lay out the network's parameters."""
        out = geometry.layers * 2 * geometry.kv_heads * geometry.head_width
        sizes = config.num_virtual_tokens, geometry.embedding_width, config.prefix_hidden_size, out
        super().__init__(config, geometry, on_meta(lambda: _PrefixNetwork(*sizes)))

    def _fan_in(self, name: str) -> int:
        return self.geometry.embedding_width if name.startswith("mlp.0") else self.config.prefix_hidden_size

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return keys and values `[L, 2, K, H, V, d]`."""
        made = torch.stack(self._run(clients))  # [K, V, L * 2 * H * d]
        geometry = self.geometry
        split = made.unflatten(2, (geometry.layers, 2, geometry.kv_heads, geometry.head_width))
        return Injection(prefix=split.permute(2, 3, 0, 4, 1, 5))


@methods.register("full")
class FullModel(Method):
    """Every parameter of the PLM: the baseline that prompts are compared with. Nothing is injected."""

    shares_passes = False
    adds_tokens = takes_positions = False
    trains_model = True

    def __init__(self, config: PromptConfig, geometry: Geometry, model: Any) -> None:
        """Lay out the PLM's parameters, tied ones once; they are float32 from here on."""
        model.float()
        self._parameters = dict(model.named_parameters())
        super().__init__(config, geometry, {name: tuple(p.shape) for name, p in self._parameters.items()})

    def initial(self, embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the pre-trained weights `[P]` float32."""
        vector = np.empty(self.layout.size, dtype=np.float32)
        for name, values in self.layout.views(torch.from_numpy(vector)).items():
            values.copy_(self._parameters[name].detach())
        return vector

    def leaves(self, vectors: torch.Tensor) -> list[Parameters]:
        """Let the PLM's own parameters be views into the one row of `vectors` `[1, P]`."""
        (vector,) = vectors
        for name, view in self.layout.views(vector).items():
            self._parameters[name].data = view
            self._parameters[name].grad = None
            self._parameters[name].requires_grad_()
        return [self._parameters]

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return an empty injection: the parameters are already in the PLM."""
        return Injection()


def make_method(config: PromptConfig, geometry: Geometry, model: Any = None) -> Method:
    """Build the method that the settings name; `full` needs the PLM (on the meta device is enough to count)."""
    return methods[config.method](config, geometry, model)
