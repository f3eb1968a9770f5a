"""Local training of one client, or of several clients in one pass through the frozen PLM.

The PLM is frozen, so clients differ only in their injection: the minibatches of k clients go through it as one batch
whose rows carry their own client's prompt. The loss is the sum of the clients' mean losses, so each client's gradient
is that of its own mean loss. Gradient clipping and optimiser states are per client. The result is the same as that of
one client after the other.

Legend: k clients of a pass, P parameters, B rows, C classes.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector, is_on_host
from fedprompt_mpi.config import ClientConfig
from fedprompt_mpi.plm.backbone import Backbone, Injection
from fedprompt_mpi.plm.method_base import Method, Parameters
from fedprompt_mpi.plm.quantised import keep_kernels_out
from fedprompt_mpi.text.batches import Batch

ROWS_OF_A_PIECE = 16
"""Rows of several clients that go through the PLM at once on a CPU."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The local training of one client in a round."""

    client: int
    steps: Sequence[np.ndarray]
    """Rows of the training table, step by step."""
    constrain: Callable[[np.ndarray], np.ndarray] | None = None
    """Constrains an attacker's delta `[P]` float32 after each step; None for honest clients."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """The result of one pass of k clients."""

    deltas: Vector
    """`[k, P]` float32, local minus global; a tensor on the device if the global vector is one."""
    losses: np.ndarray
    """`[k]` float64, mean training loss over the round's steps."""
    seconds: float
    """Of the whole pass."""
    copy_s: float
    """Of these, the copies of the vectors to the GPU and back; 0 on a CPU."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What the local training of all clients of a rank has in common."""

    backbone: Backbone
    """The frozen PLM; for full fine-tuning, the PLM that is trained."""
    method: Method
    config: ClientConfig
    """Optimiser, learning rate, clipping."""
    make_batch: Callable[[np.ndarray], Batch]
    """Rows of the training table -> a padded batch."""
    rounds: int = 1
    """Rounds of the run, for the learning rate schedule."""


def learning_rate(config: ClientConfig, rounds: int, progress: float) -> float:
    """Return the learning rate at a point of the run.

    Args:
        config: base rate, warm-up (rounds) and schedule.
        rounds: rounds of the whole run.
        progress: rounds done so far, the done share of the current round included.
    """
    if progress < config.warmup:
        return config.lr * max(progress, 1e-3) / config.warmup
    left = (rounds - progress) / max(rounds - config.warmup, 1)
    if config.schedule == "linear":
        return config.lr * left
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 - float(np.cos(np.pi * left)))
    return config.lr


def make_optimizer(config: ClientConfig, clients: Sequence[Parameters]) -> torch.optim.Optimizer:
    """Build the local optimiser over k clients: a parameter group for each, with its own learning rate and state."""
    groups = [{"params": list(client.values())} for client in clients]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=decay, fused=True)
    if config.optimizer == "adafactor":
        return _adafactor(groups, lr, decay)
    return torch.optim.SGD(groups, lr=lr, weight_decay=decay, fused=True)


def _adafactor(groups: list[dict[str, Any]], lr: float, decay: float) -> torch.optim.Optimizer:
    """Return Adafactor as it is used for T5: a learning rate of its own, which no size of a parameter scales.

    References:
        Shazeer and Stern, Adafactor, ICML 2018, arXiv:1804.04235, Algorithm 4 without relative step sizes; OpenPrompt
        and the T5 guide of transformers (scale_parameter=False, relative_step=False, warmup_init=False).
    """
    keep_kernels_out()  # this import brings bitsandbytes along
    from transformers.optimization import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(groups, lr=lr, weight_decay=decay, **fixed)


def train(
    trainer: Trainer,
    global_vector: Vector,
    jobs: Sequence[Job],
    round_: int = 1,
    report: Callable[[int], None] = lambda step: None,
) -> PassResult:
    """Train k clients from the global vector, in one pass.

    Args:
        trainer: PLM, method, optimiser, data.
        global_vector: `[P]` float32; if it is a tensor on the device, the deltas stay there too.
        jobs: k clients and their steps; a client that has fewer steps than another stops earlier.
        round_: current round, from 1.
        report: called with the number of steps done.
    """
    start = time.perf_counter()
    backbone, method, config = trainer.backbone, trainer.method, trainer.config
    device = backbone.device
    start_vector = to_device(global_vector, device)
    copy_s = _elapsed(start, device)
    vectors = start_vector.repeat(len(jobs), 1)
    is_restricted = method.restrict(vectors, [job.client for job in jobs])
    starts = vectors.clone() if config.proximal and is_restricted else start_vector.expand(len(jobs), -1)
    clients = method.leaves(vectors)
    optimizer = make_optimizer(config, clients)
    steps = max(len(job.steps) for job in jobs)
    losses = torch.zeros(len(jobs), device=device)
    for step in range(steps):
        for group, job in zip(
            optimizer.param_groups, jobs, strict=True
        ):  # independent of the other clients in the pass
            group["lr"] = learning_rate(config, trainer.rounds, round_ - 1 + min(step / len(job.steps), 1.0))
        active = [k for k, job in enumerate(jobs) if step < len(job.steps)]
        rows = [jobs[k].steps[step] for k in active]
        optimizer.zero_grad(set_to_none=True)
        step_losses = _backward(trainer, [clients[k] for k in active], rows)
        if config.proximal:
            _pull_back([(clients[k], method.layout.views(starts[k])) for k in active], config.proximal)
        if config.clip_norm is not None:
            for k in active:
                torch.nn.utils.clip_grad_norm_(list(clients[k].values()), config.clip_norm)
        optimizer.step()
        for k in active:
            if (constrain := jobs[k].constrain) is not None:
                _constrain(vectors[k], start_vector, constrain)
                method.restrict(vectors[k : k + 1], [jobs[k].client])
        losses[active] += step_losses
        report(step + 1)
    mean_losses = losses.double().cpu().numpy() / np.array([len(job.steps) for job in jobs])  # waits for the device
    back = time.perf_counter()
    deltas = vectors.sub_(start_vector)
    if is_on_host(global_vector):
        deltas = to_host(deltas)
    copy_s += _elapsed(back, device)
    return PassResult(deltas=deltas, losses=mean_losses, seconds=time.perf_counter() - start, copy_s=copy_s)


def gradients(trainer: Trainer, vector: torch.Tensor, rows: Sequence[np.ndarray], into: torch.Tensor) -> torch.Tensor:
    """Return the gradients of k mean losses at a vector, in one pass `[k, P]` float32 on the device.

    A row of its own for each is the gradient of each example: it goes through the PLM as if it were a client's batch.

    Args:
        trainer: PLM, method, data.
        vector: `[P]` float32, on the device.
        rows: k index arrays; one alone where a method's clients share no pass.
        into: `[k or more, P]` float32, to be overwritten: fresh pages of a whole model take as long as its gradient.
    """
    vectors = vector.expand(len(rows), -1)  # nobody writes them
    clients = trainer.method.leaves(vectors)
    found = into[: len(rows)].zero_()
    for client, own in zip(clients, found, strict=True):
        for name, view in trainer.method.layout.views(own).items():
            client[name].grad = view
    _backward(trainer, clients, list(rows))
    for client in clients:  # a whole model's parameters are used again
        for parameter in client.values():
            parameter.grad = None
    return found


def _elapsed(start: float, device: torch.device) -> float:
    """Return the seconds since `start`, once a GPU has finished its work; 0 on a CPU, where nothing is copied."""
    if device.type == "cpu":
        return 0.0
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _pull_back(clients: list[tuple[Parameters, Parameters]], proximal: float) -> None:
    """Add the gradient of mu / 2 * ||w - w_t||^2 to each client's, of its parameters and those it began with.

    References:
        Li et al., Federated Optimization in Heterogeneous Networks, 2018, arXiv:1812.06127, Equation 2 (FedProx).
    """
    with torch.no_grad():
        for client, start in clients:
            for name, parameter in client.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - start[name], alpha=proximal)


def _constrain(vector: torch.Tensor, start: torch.Tensor, constrain: Callable[[np.ndarray], np.ndarray]) -> None:
    """Apply an attack's constraint to a client's vector `[P]`, in place."""
    delta = constrain(to_host(vector - start))
    vector.copy_(start + to_device(delta, vector.device))


def _backward(trainer: Trainer, clients: list[Parameters], rows: list[np.ndarray]) -> torch.Tensor:
    """Add the gradients of each client's mean loss over its own rows to its parameters; return the losses `[k]`."""
    sizes, parts = [len(own) for own in rows], min(trainer.config.accumulate, max(map(len, rows)))
    losses = torch.zeros(len(clients), device=trainer.backbone.device)
    for part in range(parts):
        chosen = [own[part::parts] for own in rows]
        batch = trainer.make_batch(np.concatenate(chosen))
        owners = torch.repeat_interleave(torch.arange(len(clients)), torch.tensor([len(own) for own in chosen]))
        mean = _mean_losses(trainer, clients, batch, owners, sizes)
        mean.sum().backward()
        losses += mean.detach()
    return losses


def _mean_losses(
    trainer: Trainer, clients: list[Parameters], batch: Batch, owners: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """Return what a batch adds to each client's mean loss `[k]`.

    Args:
        trainer: PLM and method.
        clients: k sets of parameters.
        batch: B rows.
        owners: `[B]` int64, the client of each row.
        sizes: k numbers of rows over which the means are taken.
    """
    device, injection = trainer.backbone.device, trainer.method.inject(clients)
    means, shares = torch.zeros(len(clients), device=device), torch.tensor([1 / size for size in sizes], device=device)
    for rows in _pieces(trainer.backbone, batch, len(clients)):
        piece, own = batch.take(rows), owners[torch.from_numpy(rows)].to(device)
        logits = score_batch(trainer.backbone, piece, injection, own if len(clients) > 1 else None)
        losses = torch.nn.functional.cross_entropy(logits, to_device(piece.labels, device), reduction="none")
        means = means.index_add(0, own, losses * shares[own])
    return means


def _pieces(backbone: Backbone, batch: Batch, clients: int) -> list[np.ndarray]:
    """Return the rows of a batch in pieces that go through the PLM one after the other.

    A CPU computes a few rows of similar length in less time than all of several clients at once.
    """
    if clients == 1 or backbone.device.type != "cpu" or backbone.recomputes:
        return [np.arange(len(batch.labels))]
    order = np.argsort(batch.mask.sum(axis=1), kind="stable")
    return np.array_split(order, -(-len(order) // ROWS_OF_A_PIECE))


def score_batch(
    backbone: Backbone, batch: Batch, injection: Injection, owners: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the label words' logits `[B, C]` of a padded batch under the injection of K clients.

    Args:
        backbone: the PLM.
        batch: B rows.
        injection: of K clients.
        owners: `[B]` int64, the client of each row; None if K is 1.
    """
    ids, mask, answers = (to_device(part, backbone.device) for part in (batch.ids, batch.mask, batch.answers))
    return backbone.score(ids, mask, answers, injection, owners)


def to_device(array: Vector, device: torch.device) -> torch.Tensor:
    """Copy an array to a device: to a GPU through pinned memory, asynchronously; on the CPU nothing is copied.

    A tensor is on its device already.
    """
    if isinstance(array, torch.Tensor):
        return array
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array, from a GPU through pinned memory, once all work on it is done."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staged.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize(tensor.device)  # before any clock is read
    return staged.numpy()
