"""What each lever of a local step gains, against the plain way, on one PLM and one stream of batches.

    OMP_NUM_THREADS=1 python tests/bench/local_step.py MODEL_FOLDER DATA_FOLDER [--steps N] [--batch_size B]

The plain way scores the whole vocabulary at every position and pads every example to max_length. All variants see
the same examples, in turn within one process; the table gives medians and their ratios to the plain way.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from fedprompt_mpi.config import ClientConfig, ModelConfig, PromptConfig, RunConfig, TaskConfig
from fedprompt_mpi.federation.client_training import score_batch
from fedprompt_mpi.plm.backbone import Backbone, load_backbone
from fedprompt_mpi.plm.hugging_face import load_tokenizer, model_class, read_config
from fedprompt_mpi.plm.methods import make_method
from fedprompt_mpi.text.batches import Batch, Own, collate, local_steps
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.tasks import resolve

MAX_LENGTH = 128


def padded(batch: Batch) -> Batch:
    """Pad a batch to MAX_LENGTH."""
    extra = ((0, 0), (0, MAX_LENGTH - batch.ids.shape[1]))
    return Batch(
        ids=np.pad(batch.ids, extra), mask=np.pad(batch.mask, extra), answers=batch.answers, labels=batch.labels
    )


def plain_step(model: torch.nn.Module, prompt: torch.Tensor, corpus: Corpus) -> Callable[[Batch], torch.Tensor]:
    """Return the loss as it is usually written: full vocabulary at every position."""
    label_ids = torch.from_numpy(corpus.label_ids)

    def loss(batch: Batch) -> torch.Tensor:
        count = len(batch.labels)
        virtual = prompt.expand(count, -1, -1)
        embeddings = torch.cat([virtual, model.get_input_embeddings()(torch.from_numpy(batch.ids))], dim=1)  # pyright: ignore
        mask = torch.cat([torch.ones(count, prompt.shape[0]), torch.from_numpy(batch.mask)], dim=1)
        logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
        answers = prompt.shape[0] + torch.from_numpy(batch.answers)
        return torch.nn.functional.cross_entropy(
            logits[torch.arange(count), answers][:, label_ids], torch.from_numpy(batch.labels)
        )

    return loss


def our_step(backbone: Backbone, prompt: torch.Tensor) -> Callable[[Batch], torch.Tensor]:
    """Return the loss as this program computes it."""
    method = make_method(PromptConfig(num_virtual_tokens=prompt.shape[0]), backbone.geometry)

    def loss(batch: Batch) -> torch.Tensor:
        logits = score_batch(backbone, batch, method.inject([{"virtual_tokens": prompt}]))
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))

    return loss


def main() -> None:
    """Time the variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()
    config = RunConfig(task=TaskConfig(name="sst2", data=arguments.data), model=ModelConfig(max_length=MAX_LENGTH))
    corpus = build(config, resolve(config.task), load_tokenizer(arguments.model), "masked")
    lengths = corpus.train.lengths
    client = ClientConfig(batch_size=arguments.batch_size, steps=arguments.steps)
    own = Own(lengths=lengths, labels=corpus.train.labels)
    bucketed = [collate(corpus.train, rows) for rows in local_steps(own, client, seed=0, round_=1, client=0)]
    rng = np.random.default_rng(0)
    unsorted = [collate(corpus.train, rng.choice(len(lengths), arguments.batch_size)) for _ in range(arguments.steps)]
    label_ids = torch.from_numpy(corpus.label_ids)

    def backbone(dtype: str, *, narrow: bool = True) -> Backbone:
        settings = ModelConfig(name=arguments.model, dtype=dtype)  # pyright: ignore[reportArgumentType]
        made = load_backbone(settings, arguments.model, label_ids, torch.device("cpu"), 0)
        if not narrow:
            made.take_no_shortcuts()
        return made

    plain_model = (
        model_class(read_config(arguments.model)).from_pretrained(arguments.model).eval().requires_grad_(False)
    )
    prompt = plain_model.get_input_embeddings().weight[1000:1020].clone().requires_grad_()
    wide, narrow = backbone("float32", narrow=False), backbone("float32")
    plain = plain_step(plain_model, prompt, corpus)
    variants: dict[str, tuple[Callable[[Batch], torch.Tensor], list[Batch]]] = {
        "plain: full vocabulary, padded to max_length": (plain, [padded(b) for b in unsorted]),
        "only: label words alone are scored": (our_step(wide, prompt), [padded(b) for b in unsorted]),
        "only: padded to the batch's longest": (plain, unsorted),
        "only: batches of similar length": (plain, bucketed),
        "label words + similar length": (our_step(wide, prompt), bucketed),
        " + shortcuts in the first and last layer": (our_step(narrow, prompt), bucketed),
    }
    if backbone("auto").bf16:
        variants[" + bfloat16 instead"] = our_step(backbone("bfloat16", narrow=False), prompt), bucketed
        variants["all: label words, lengths, shortcuts, bfloat16"] = our_step(backbone("bfloat16"), prompt), bucketed
    else:
        print("this CPU has no bfloat16 arithmetic: model.dtype auto computes in float32, and there is no row for it")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(arguments.steps):
        for name, (loss, batches) in variants.items():
            prompt.grad = None
            start = time.perf_counter()
            loss(batches[step]).backward()
            seconds[name].append(time.perf_counter() - start)
    print(f"{arguments.steps} steps of {arguments.batch_size} examples, {torch.get_num_threads()} thread(s); medians")
    base = statistics.median(seconds["plain: full vocabulary, padded to max_length"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<52}{1e3 * median:>9.0f} ms{base / median:>8.2f} x")


if __name__ == "__main__":
    main()
