"""The base class of all tuning methods.

A method lays its parameters out in one flat vector `[P]`, gives each of K clients its own set (views into `[K, P]`, so
that nothing is packed before it is sent), and computes from a set what it puts into the frozen PLM.

Legend: K clients, P parameters, V virtual tokens, D width of the word embeddings, L layers, H key-value heads, d width
of a head.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedprompt_mpi.config import PromptConfig
from fedprompt_mpi.plm.backbone import Injection
from fedprompt_mpi.plm.flat import FlatLayout
from fedprompt_mpi.plm.hugging_face import Geometry
from fedprompt_mpi.rules.low_rank import Pair

Parameters = dict[str, torch.Tensor]


class Method:
    """Base of the methods that leave the PLM frozen."""

    shares_passes = True
    """Whether several clients may go through the PLM in one pass."""
    adds_tokens = True
    """Whether the virtual tokens take positions of the PLM's input."""
    takes_positions = True
    """Whether the virtual tokens take some of the positions that the PLM has; a prefix does so too."""
    trains_model = False
    """Whether the parameters are the PLM's own."""
    pairs: Sequence[Pair] = ()
    """Where LoRA's factors stand in the vector, if the server may multiply them."""

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

    def restrict(self, vectors: torch.Tensor, clients: Sequence[int]) -> bool:
        """Take from each client's copy of the global vector `[k, P]` what the client does not have, in place.

        Returns True if there is such a thing.

        Args:
            vectors: k copies.
            clients: k ids.
        """
        return False

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
