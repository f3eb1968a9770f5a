"""Local training: several clients in one pass are as if one by one, and the PLM stays as it is."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt_mpi.config import ClientConfig, LoRAConfig, ModelConfig, PromptConfig, RunConfig, TaskConfig
from fedprompt_mpi.federation.client_training import Job, Trainer, learning_rate, train
from fedprompt_mpi.federation.evaluate import summarise
from fedprompt_mpi.plm.backbone import Backbone, load_backbone
from fedprompt_mpi.plm.hugging_face import load_tokenizer
from fedprompt_mpi.plm.method_base import Method
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.text.batches import Own, collate, local_steps
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.tasks import resolve
from tests.jobs import read_rounds, run_here

Tiny = Callable[[str], Path]


def _setup(folder: Path, method: str, **more: Any) -> tuple[Corpus, Backbone, Method, np.ndarray]:
    config = RunConfig(
        task=TaskConfig(max_train=120, max_test=10),
        prompt=PromptConfig(method=method, num_virtual_tokens=4, prefix_hidden_size=8, **more),  # pyright: ignore
    )
    corpus = build(config, resolve(config.task), load_tokenizer(str(folder)), "masked")
    backbone = load_backbone(
        ModelConfig(dtype="float32"), str(folder), torch.from_numpy(corpus.label_ids), torch.device("cpu"), 0
    )
    made = make_method(config.prompt, backbone.geometry, backbone.model)
    vector = made.initial(backbone.word_embeddings(), np.random.default_rng(0))
    return corpus, backbone, made, vector


def _jobs(corpus: Corpus, clients: list[int], batch_sizes: list[int], steps: list[int]) -> list[Job]:
    jobs = []
    for client, size, count in zip(clients, batch_sizes, steps, strict=True):
        rows = corpus.client_rows(client)
        config = ClientConfig(batch_size=size, steps=count)
        own = Own(lengths=corpus.train.lengths[rows], labels=corpus.train.labels[rows])
        chosen = local_steps(own, config, seed=0, round_=1, client=client)
        jobs.append(Job(client=client, steps=[rows[c] for c in chosen]))
    return jobs


def _train(setup: Any, config: ClientConfig, jobs: list[Job]) -> Any:
    corpus, backbone, method, vector = setup
    trainer = Trainer(
        backbone=backbone, method=method, config=config, make_batch=lambda rows: collate(corpus.train, rows)
    )
    return train(trainer, vector, jobs)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "adafactor", "sgd"])
@pytest.mark.parametrize("method", ["soft", "p_tuning", "prefix"])
def test_one_pass_equals_one_by_one(method: str, optimizer: str, tiny: Tiny) -> None:
    """Clients of different batch sizes and numbers of steps, with clipping that bites and a rate that falls."""
    setup = _setup(tiny("bert"), method)
    lr = {"adam": 1e-3, "sgd": 0.5}.get(optimizer, 0.02)
    config = ClientConfig(lr=lr, clip_norm=0.05, optimizer=optimizer, weight_decay=0.01, schedule="linear")  # pyright: ignore
    jobs = _jobs(setup[0], [0, 4, 7], [8, 3, 8], [4, 4, 2])
    together = _train(setup, config, jobs)
    assert np.abs(together.deltas).max() > 1e-3
    for k, job in enumerate(jobs):
        alone = _train(setup, config, [job])
        # Adam divides a gradient by its own size: where that is nothing but rounding, so is the step's direction
        scale, off = np.abs(alone.deltas).max(), np.abs(together.deltas[k] - alone.deltas[0])
        assert np.quantile(off, 0.999) < 1e-5 * max(1.0, scale / lr)
        assert off.max() < (1e-5 * max(1.0, scale / lr) if optimizer in ("sgd", "adafactor") else 0.05 * lr)
        assert together.losses[k] == pytest.approx(alone.losses[0], abs=1e-5)


def test_clients_do_not_leak_into_each_other(tiny: Tiny) -> None:
    """A client's delta does not depend on the clients that share its pass."""
    setup = _setup(tiny("bert"), "soft")
    a, b, c = _jobs(setup[0], [0, 1, 2], [8, 8, 8], [3, 3, 3])
    config = ClientConfig(lr=0.05, optimizer="sgd")
    with_b, with_c = _train(setup, config, [a, b]), _train(setup, config, [a, c])
    np.testing.assert_allclose(with_b.deltas[0], with_c.deltas[0], atol=1e-6)
    assert np.abs(with_b.deltas[1] - with_c.deltas[1]).max() > 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("constrain", [None, lambda delta: 0.5 * delta])
def test_a_client_of_a_smaller_rank_never_gets_more(constrain: Any, optimizer: str, tiny: Tiny) -> None:
    """Rows of A and columns of B beyond its own rank end as zeros, whatever moves the others."""
    corpus, backbone, method, _ = _setup(tiny("bert"), "lora", lora=LoRAConfig(rank=4, ranks=[3, 4]))
    vector = np.random.default_rng(0).normal(0, 0.1, method.layout.size).astype(np.float32)
    config = ClientConfig(lr=0.1, optimizer=optimizer, proximal=0.1, weight_decay=0.1)  # pyright: ignore
    jobs = [dataclasses.replace(job, constrain=constrain) for job in _jobs(corpus, [0, 1], [8, 8], [3, 3])]
    deltas = _train((corpus, backbone, method, vector), config, jobs).deltas
    for k, rank in enumerate((3, 4)):
        for name, values in method.layout.views(torch.from_numpy(vector + deltas[k])).items():
            own, others = values.split([rank, 4 - rank], dim=0 if name.endswith("lora_A") else 1)
            assert own.all()
            torch.testing.assert_close(others, torch.zeros_like(others), atol=1e-7, rtol=0)


def test_one_sgd_step_by_hand(tiny: Tiny) -> None:
    """Delta is minus the learning rate times the gradient of the mean loss."""
    corpus, backbone, method, vector = setup = _setup(tiny("bert"), "soft")
    job = _jobs(corpus, [3], [8], [1])[0]
    update = _train(setup, ClientConfig(lr=0.5, optimizer="sgd", clip_norm=None), [job])
    clients = method.leaves(torch.from_numpy(vector.copy())[None])
    batch = collate(corpus.train, job.steps[0])
    logits = backbone.score(
        torch.from_numpy(batch.ids),
        torch.from_numpy(batch.mask),
        torch.from_numpy(batch.answers),
        method.inject(clients),
    )
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
    (gradient,) = torch.autograd.grad(loss, clients[0]["virtual_tokens"])
    np.testing.assert_allclose(update.deltas[0], -0.5 * gradient.flatten().numpy(), atol=1e-6)
    assert update.losses[0] == pytest.approx(float(loss.detach()), abs=1e-6)


def _hash(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", ["soft", "p_tuning", "prefix"])
def test_the_plm_is_frozen(method: str, tiny: Tiny) -> None:
    setup = _setup(tiny("bert"), method)
    before = _hash(setup[1])
    _train(setup, ClientConfig(lr=0.1), _jobs(setup[0], [0, 1], [8, 8], [3, 3]))
    assert _hash(setup[1]) == before


@pytest.mark.parametrize("method", ["soft", "p_tuning"])
def test_an_attacker_stays_within_its_bounds_and_others_do_not_notice(method: str, tiny: Tiny) -> None:
    """After every step, though an honest client shares the pass; a bound that never bites changes nothing."""
    setup = _setup(tiny("bert"), method)
    jobs = _jobs(setup[0], [0, 4], [8, 8], [4, 4])
    config = ClientConfig(lr=0.05)
    free = _train(setup, config, jobs).deltas
    seen = []

    def halve(delta: np.ndarray) -> np.ndarray:
        seen.append(delta.copy())
        return delta / 2

    bound = _train(setup, config, [jobs[0], dataclasses.replace(jobs[1], constrain=halve)]).deltas
    np.testing.assert_allclose(bound[0], free[0], atol=1e-6)
    assert len(seen) == 4
    np.testing.assert_allclose(bound[1], seen[-1] / 2, atol=1e-6)
    assert np.abs(bound[1] - free[1]).max() > 1e-3
    unbound = dataclasses.replace(jobs[1], constrain=lambda delta: delta)
    np.testing.assert_allclose(_train(setup, config, [jobs[0], unbound]).deltas, free, atol=1e-6)


@pytest.mark.parametrize("method", ["soft", "full"])
def test_fedprox_by_hand(method: str, tiny: Tiny) -> None:
    """Two SGD steps: the first is at the global vector, where the penalty has no slope; the second is pulled back.

    g1 = grad(w0), d1 = -lr g1, d2 = d1 - lr (grad(w0 + d1) + mu d1): mu pulls by lr mu d1 exactly.
    """
    setup = _setup(tiny("bert"), method)
    (job,) = _jobs(setup[0], [3], [8], [2])
    first = dataclasses.replace(job, steps=job.steps[:1])
    lr, mu = 0.1, 2.0
    plain = ClientConfig(optimizer="sgd", lr=lr, clip_norm=None)
    proximal = dataclasses.replace(plain, proximal=mu)
    one = _train(setup, plain, [first]).deltas
    np.testing.assert_array_equal(_train(setup, proximal, [first]).deltas, one)
    pulled = _train(setup, plain, [job]).deltas - _train(setup, proximal, [job]).deltas
    np.testing.assert_allclose(pulled, lr * mu * one, atol=1e-6)
    assert np.abs(pulled).max() > 1e-4


def test_full_fine_tuning_trains_the_plm_and_nothing_of_other_clients(tiny: Tiny) -> None:
    setup = _setup(tiny("bert"), "full")
    job, other = _jobs(setup[0], [0, 1], [8, 8], [3, 3])
    config = ClientConfig(lr=1e-3)
    first = _train(setup, config, [job])
    _train(setup, config, [other])
    again = _train(setup, config, [job])
    assert np.abs(first.deltas).max() > 1e-4
    np.testing.assert_array_equal(first.deltas, again.deltas)


def test_schedules_by_hand() -> None:
    constant = ClientConfig(lr=0.4, warmup=2)
    assert learning_rate(constant, 10, 0.0) == pytest.approx(0.4 * 1e-3 / 2)
    assert learning_rate(constant, 10, 1.0) == pytest.approx(0.2)
    assert learning_rate(constant, 10, 7.0) == pytest.approx(0.4)
    linear = ClientConfig(lr=0.4, schedule="linear")
    assert learning_rate(linear, 10, 5.0) == pytest.approx(0.2)
    cosine = ClientConfig(lr=0.4, schedule="cosine")
    assert learning_rate(cosine, 10, 0.0) == pytest.approx(0.4)
    assert learning_rate(cosine, 10, 5.0) == pytest.approx(0.2)
    assert learning_rate(cosine, 10, 10.0) == pytest.approx(0.0)


def test_adafactor_moves_as_t5_users_mean(tiny: Tiny) -> None:
    """Its step is the learning rate, whatever the size of the parameter: 0.30 of root mean square at lr 0.3."""
    setup = _setup(tiny("bert"), "soft")
    config = ClientConfig(lr=0.3, clip_norm=None, optimizer="adafactor")
    (job,) = _jobs(setup[0], [0], [8], [1])
    for size in (1.0, 100.0):
        moved = _train((setup[0], setup[1], setup[2], size * setup[3]), config, [job]).deltas[0]
        assert np.sqrt(np.mean(moved.astype(np.float64) ** 2)) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("away", [0, 1])
def test_macro_f1_is_that_of_scikit_learn(away: int) -> None:
    """A class without labels and answers does not count as 0; one that is answered and is no label does."""
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra: flame")
    rng = np.random.default_rng(away)
    for _ in range(50):
        classes = int(rng.integers(2, 6))
        labels = rng.integers(0, max(1, classes - away), 20)
        answers = rng.integers(0, max(1, classes - int(rng.integers(0, 2))), 20)
        ours = summarise(np.append(answers, 1.0), labels, labels[:0], classes, RunConfig())
        assert ours.macro_f1 == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
        assert ours.answers == np.bincount(answers, minlength=classes).tolist()


def test_what_clients_count_for(tmp_path: Path) -> None:
    """Examples are claims: a malicious client may say that it has ten times as many; one may let all count alike."""
    flags = ["--federation.partition=quantity", "--federation.rounds=1", "--client.steps=1", "--poison.clients=[3]"]
    run_here(tmp_path / "honest", *flags)
    run_here(tmp_path / "liar", *flags, "--poison.claimed_examples=10")
    run_here(tmp_path / "equal", *flags, "--poison.claimed_examples=10", "--federation.weighting=equal")
    clients = json.loads((tmp_path / "honest" / "partition.json").read_text())["clients"]
    counts = np.array([client["num_examples"] + client["poisoned"] for client in clients], dtype=float)
    shares = {name: np.array(read_rounds(tmp_path / name)[1]["shares"]) for name in ("honest", "liar", "equal")}
    np.testing.assert_allclose(shares["honest"], counts / counts.sum())
    counts[3] *= 10
    np.testing.assert_allclose(shares["liar"], counts / counts.sum())
    np.testing.assert_allclose(shares["equal"], np.full(10, 0.1))
