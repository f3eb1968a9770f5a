"""A round of ten clients: a soft prompt, LoRA and BitFit in one pass each, and PEFT's LoRA client by client.

    OMP_NUM_THREADS=1 python tests/bench/lora.py MODEL_FOLDER DATA_FOLDER [--rounds N] [--steps S] [--rank R]

All have the same minibatches of similar length, and score the label words alone. PEFT's LoRA stands in the same model,
trained by the same optimiser. The rounds are taken in turn within one process; the table has medians and ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedprompt_mpi.config import ClientConfig, LoRAConfig, ModelConfig, PromptConfig, RunConfig, TaskConfig
from fedprompt_mpi.federation.client_training import Job, Trainer, make_optimizer, train
from fedprompt_mpi.plm.backbone import Backbone, Injection, cast_matrices, load_backbone
from fedprompt_mpi.plm.hugging_face import load_tokenizer
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.text.batches import Own, collate, local_steps
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.tasks import resolve

CLIENTS = 10
CLIP = 1.0


def ours(name: str, rank: int, backbone: Backbone, corpus: Corpus, jobs: list[Job]) -> Callable[[], Any]:
    """Return a round of all clients in one pass."""
    method = make_method(PromptConfig(method=name, lora=LoRAConfig(rank=rank)), backbone.geometry, backbone.model)
    vector = method.initial(backbone.word_embeddings(), np.random.default_rng(0))
    client = ClientConfig(lr=1e-3)
    trainer = Trainer(backbone=backbone, method=method, config=client, make_batch=lambda r: collate(corpus.train, r))
    return lambda: train(trainer, vector, jobs)


def pefts(rank: int, backbone: Backbone, corpus: Corpus, jobs: list[Job]) -> Callable[[], Any]:
    """Return a round of PEFT's LoRA, one client after the other."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(backbone.model, LoraConfig(r=rank))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}

    def round_() -> None:
        for job in jobs:
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(start[name])
            optimizer = make_optimizer(ClientConfig(lr=1e-3), [trained])
            for rows in job.steps:
                batch = collate(corpus.train, rows)
                optimizer.zero_grad()
                ids, mask, answers = map(torch.from_numpy, (batch.ids, batch.mask, batch.answers))
                logits = backbone.score(ids, mask, answers, Injection())
                torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels)).backward()
                torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)
                optimizer.step()

    return round_


def main() -> None:
    """Time the rounds in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    config = RunConfig(task=TaskConfig(name="sst2", data=given.data))
    corpus = build(config, resolve(config.task), load_tokenizer(given.model), "masked")
    client = ClientConfig(steps=given.steps)
    parts = np.array_split(np.random.default_rng(0).permutation(len(corpus.train.labels)), CLIENTS)
    jobs = []
    for number, rows in enumerate(parts):
        own = Own(lengths=corpus.train.lengths[rows], labels=corpus.train.labels[rows])
        steps = [rows[places] for places in local_steps(own, client, seed=0, round_=1, client=number)]
        jobs.append(Job(client=number, steps=steps))

    def backbone() -> Backbone:
        settings = ModelConfig(name=given.model, dtype=given.dtype)
        made = load_backbone(settings, given.model, torch.from_numpy(corpus.label_ids), torch.device("cpu"), 0)
        if made.bf16:
            cast_matrices(made)
        return made

    one_by_one = backbone()
    one_by_one.take_no_shortcuts()
    rounds: dict[str, Callable[[], Any]] = {
        **{name: ours(name, given.rank, backbone(), corpus, jobs) for name in ("soft", "lora", "bitfit")},
        "PEFT's LoRA, one by one": pefts(given.rank, one_by_one, corpus, jobs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(given.rounds + 1):  # the first warms up
        for name, run in rounds.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"{given.rounds} rounds of {CLIENTS} clients, {given.steps} steps of 8, rank {given.rank}; medians")
    print(f"{'':<28}{'seconds':>9}{'to soft':>10}{'to PEFT':>10}")
    for name, median in medians.items():
        to_peft = median / medians["PEFT's LoRA, one by one"]
        print(f"{name:<28}{median:>9.3f}{median / medians['soft']:>10.2f}{to_peft:>10.2f}")


if __name__ == "__main__":
    main()
