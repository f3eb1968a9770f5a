"""The PLM in the package: small, told to be what it is, and made by its script."""

import numpy as np
import torch

from fedprompt_mpi.plm.backbone import EMBEDDED
from fedprompt_mpi.plm.embedded import make
from fedprompt_mpi.text import embedded


def test_it_is_small_and_its_tokenizer_is_the_script_s() -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 4_000_000
    tokenizer = make.make_tokenizer()
    assert (EMBEDDED / "tokenizer.json").read_text() == tokenizer.to_str(pretty=True)
    for word in embedded.vocabulary():
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1


def test_any_word_can_be_tokenised() -> None:
    ids = make.make_tokenizer().encode("Xylophone 42%!", add_special_tokens=False).tokens
    assert "[UNK]" not in ids


def test_the_seed_decides_the_weights_whatever_the_threads() -> None:
    """Some steps of the pre-training with one and with two threads: float64 keeps rounding from growing."""
    made = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        model = make.new_model(make.make_tokenizer().get_vocab_size())
        losses = make.train(model, make.make_tokenizer(), make.STEPS, stop=6)
        made.append((losses, {name: p.detach().clone() for name, p in model.named_parameters()}))
    torch.set_num_threads(threads)
    np.testing.assert_allclose(made[0][0], made[1][0], rtol=1e-10)
    for name, weight in made[0][1].items():
        torch.testing.assert_close(weight, made[1][1][name], atol=1e-9, rtol=0)
    assert made[0][0][-1] < made[0][0][0]


def test_a_line_answers_its_question() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        before, message, closing = make.sample(rng, asked=1.0)
        aspect = next(name for name, question in embedded.QUESTIONS.items() if question in before)
        assert closing in embedded.LABEL_WORDS[aspect]
        words = set(message.replace(".", " ").split())
        if aspect == "topic":
            assert words & set(embedded.TOPICS[closing][0].split())
        if aspect == "sentiment":
            assert words & set(embedded.OPINIONS[embedded.SENTIMENT_WORDS.index(closing)][0].split())
