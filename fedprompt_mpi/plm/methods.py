"""Tuning methods: soft prompt, P-tuning, prefix tuning, or the whole PLM.

A method lays its parameters out in one flat vector `[P]`, gives each of K clients its own set (views into `[K, P]`, so
that nothing is packed before it is sent), and computes from a set the input that it adds to the PLM.

Legend: K clients, P parameters, V virtual tokens, D width of the word embeddings, L layers, H key-value
heads, d width of a head, M hidden width of the prefix perceptron.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedprompt_mpi.config import PromptConfig
from fedprompt_mpi.plm.backbone import Injection
from fedprompt_mpi.plm.flat import FlatLayout
from fedprompt_mpi.plm.hugging_face import Geometry
from fedprompt_mpi.plm.late_imports import on_meta
from fedprompt_mpi.rules.registry import methods

Parameters = dict[str, torch.Tensor]


class Method:
    """Base of the methods that leave the PLM frozen."""

    shares_passes = True
    """Whether several clients may go through the PLM in one pass."""
    adds_tokens = True
    """Whether the virtual tokens take positions of the PLM's input."""
    trains_model = False
    """Whether the parameters are the PLM's own."""

    def __init__(self, config: PromptConfig, geometry: Geometry, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Lay out parameters of the given shapes."""
        self.config, self.geometry = config, geometry
        self.layout = FlatLayout.of(shapes)

    def initial(self, embeddings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the untrained vector `[P]` float32.

        The virtual tokens start as the embeddings of random words (`prompt.init vocab`: Lester et al., The Power
        of Scale for Parameter-Efficient Prompt Tuning, 2021, arXiv:2104.08691, Section 3.2) or as normal noise of
        the embeddings' standard deviation; all other parameters as torch initialises its layers.

        Args:
            embeddings: the PLM's word embeddings `[vocabulary, D]` float32.
            rng: the only source of randomness.
        """
        vector = np.empty(self.layout.size, dtype=np.float32)
        for name, values in self.layout.views(torch.from_numpy(vector)).items():
            values.copy_(torch.from_numpy(self._initial_parameter(name, tuple(values.shape), embeddings, rng)))
        return vector

    def _initial_parameter(
        self, name: str, shape: tuple[int, ...], embeddings: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        if name != "virtual_tokens":
            bound = 1 / math.sqrt(self._fan_in(name))
            return rng.uniform(-bound, bound, shape).astype(np.float32)
        if self.config.init == "vocab":
            return embeddings[rng.choice(len(embeddings), size=shape[0], replace=shape[0] > len(embeddings))]
        return rng.normal(0.0, float(embeddings.std()), shape).astype(np.float32)

    def _fan_in(self, name: str) -> int:
        raise KeyError(name)

    def leaves(self, vectors: torch.Tensor) -> list[Parameters]:
        """Return K sets of trainable parameters that are views into `vectors` `[K, P]`."""
        return [
            {name: view.detach().requires_grad_() for name, view in self.layout.views(vector).items()}
            for vector in vectors
        ]

    def named(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parameters of `vector` `[P]` by name, and the prompt computed from them as `effective_prompt`.

        That is `[V, D]`, or for the prefix method keys and values `[L, 2, H, V, d]`; `full` has none.
        """
        tensor = torch.from_numpy(vector)
        with torch.no_grad():
            injection = self.inject([dict(self.layout.views(tensor))])
        named = {name: view.numpy() for name, view in self.layout.views(tensor).items()}
        if injection.virtual_tokens is not None:
            named["effective_prompt"] = injection.virtual_tokens[0].numpy()
        elif injection.prefix is not None:
            named["effective_prompt"] = injection.prefix[:, :, 0].numpy()
        return named

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return the input that K sets of parameters add to the PLM."""
        raise NotImplementedError


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
    adds_tokens = False
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
