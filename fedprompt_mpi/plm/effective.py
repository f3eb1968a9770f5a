"""The prompt that a small network makes, as parameters of their own.

P-tuning and prefixes are trained through a network, of which all examples share one. The gradients of single examples
are small where the network's output is, and the network's derivative takes a direction of its parameters there.

Legend: P parameters, E numbers of the effective prompt, d directions.
"""

import torch

from fedprompt_mpi.plm.backbone import Injection
from fedprompt_mpi.plm.flat import FlatLayout
from fedprompt_mpi.plm.method_base import Method, Parameters

NAME = "effective_prompt"


class EffectivePrompt(Method):
    """A method whose parameters are what another one injects: `[V, D]`, or of a prefix `[L, 2, H, V, d]`."""

    def __init__(self, method: Method, vector: torch.Tensor) -> None:
        """Take the other method's prompt at `vector` `[P]`."""
        self.config, self.geometry, self._method = method.config, method.geometry, method
        self.adds_tokens, self.takes_positions = method.adds_tokens, method.takes_positions
        self._start = {name: view.detach().requires_grad_() for name, view in method.layout.views(vector).items()}
        self._made = self._make()
        self.layout = FlatLayout.of({NAME: tuple(self._made.shape)})

    @property
    def vector(self) -> torch.Tensor:
        """The prompt `[E]`."""
        return self._made.detach().reshape(-1)

    def _make(self) -> torch.Tensor:
        injection = self._method.inject([self._start])
        if injection.prefix is not None:
            return injection.prefix[:, :, 0]
        assert injection.virtual_tokens is not None
        return injection.virtual_tokens[0]

    def inject(self, clients: list[Parameters]) -> Injection:
        """Return the prompts of K clients."""
        prompts = torch.stack([client[NAME] for client in clients])
        if prompts.dim() == 3:
            return Injection(virtual_tokens=prompts)
        return Injection(prefix=prompts.permute(1, 2, 0, 3, 4, 5))

    def directions(self, directions: torch.Tensor) -> torch.Tensor:
        """Return how the prompt moves if the other method's parameters move along directions `[d, P]`: `[d, E]`.

        It is the derivative by u of the product of a direction and the gradient for the cotangent u.
        """
        u = torch.zeros_like(self._made, requires_grad=True)
        parameters = list(self._start.values())
        backward = torch.autograd.grad(self._made, parameters, u, create_graph=True, retain_graph=True)
        flat = torch.cat([part.reshape(-1) for part in backward])
        moved = [torch.autograd.grad(flat @ one, u, retain_graph=True)[0].reshape(-1) for one in directions]
        return torch.stack(moved)
