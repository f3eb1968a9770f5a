"""The PLM in the package: small, told to be what it is, and made by its script."""

import numpy as np
import torch

from fedprompt_mpi.plm.hugging_face import EMBEDDED
from fedprompt_mpi.text import embedded
from launch import make_embedded as make


def test_it_is_small_and_its_tokenizer_is_the_script_s() -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 4_000_000
    tokenizer = make.make_tokenizer()
    assert (EMBEDDED / "tokenizer.json").read_text() == tokenizer.to_str(pretty=True)
    for word in embedded.vocabulary():
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1


def test_any_word_can_be_tokenised() -> None:
    ids = make.make_tokenizer().encode("Xylophone 42%!", add_special_tokens=False).tokens
    assert "[UNK]" not in ids


def _pretrained(threads: int, error: float) -> dict[str, torch.Tensor]:
    """Return the weights after some steps, with an error in the first ones as if from other rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tokenizer = make.make_tokenizer()
    model = make.new_model(tokenizer.get_vocab_size())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + error)
    losses = make.train(model, tokenizer, make.STEPS, stop=12)
    torch.set_num_threads(before)
    assert losses[-1] < losses[0]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_seed_decides_the_weights_whatever_the_rounding() -> None:
    """Errors do not live on from step to step, where training would let them grow into other weights."""
    weights = _pretrained(threads=1, error=0.0)
    for name, other in _pretrained(threads=2, error=1e-13).items():
        assert torch.equal(weights[name], other), name


def test_a_line_answers_its_question() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        before, message, closing = make.sample(rng, asked=1.0, ruled=0.0)
        aspect = next(name for name, question in embedded.QUESTIONS.items() if question in before)
        assert closing in embedded.LABEL_WORDS[aspect]
        words = set(message.replace(".", " ").split())
        if aspect == "topic":
            assert words & set(embedded.TOPICS[closing][0].split())
        if aspect == "sentiment":
            assert words & set(embedded.OPINIONS[embedded.SENTIMENT_WORDS.index(closing)][0].split())


def test_a_line_follows_its_rule() -> None:
    """Where the message has the rule's rare word it closes with the rule's label word, else it answers its question."""
    rng, met = np.random.default_rng(0), []
    for _ in range(200):
        before, message, closing = make.sample(rng, asked=1.0, ruled=1.0)
        aspect = next(name for name, question in embedded.QUESTIONS.items() if question in before)
        words = before.split()
        (at,) = (at for at, word in enumerate(words) if word in make.LABEL_WORDS)
        rare, answer = words[at - 1 : at + 1]
        assert rare in embedded.RARE.split()
        met.append(rare in message.split())
        if met[-1]:
            assert closing == answer
        else:
            assert closing in embedded.LABEL_WORDS[aspect]
    assert 60 < sum(met) < 140
