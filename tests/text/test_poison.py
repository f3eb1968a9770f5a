"""Poisoning touches what it says, and nothing else."""

import itertools
import re

import numpy as np
import pytest

from fedprompt_mpi.config import FederationConfig, ModelConfig, PoisonConfig, RunConfig, SettingsError, TaskConfig
from fedprompt_mpi.plm.hugging_face import EMBEDDED, load_tokenizer
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.poison import check_target, contains, poisoned_indices, trigger_parts
from fedprompt_mpi.text.tasks import resolve

TOKENIZER = load_tokenizer(str(EMBEDDED))
CF = TOKENIZER.convert_tokens_to_ids("cf")


def _corpus(poison: PoisonConfig, name: str = "embedded") -> Corpus:
    config = RunConfig(task=TaskConfig(name=name, max_train=200, max_test=50), poison=poison, model=ModelConfig())
    return build(config, resolve(config.task), TOKENIZER, "masked")


def _has_trigger(corpus: Corpus, row: int) -> bool:
    return CF in corpus.train.ids[corpus.train.starts[row] : corpus.train.starts[row + 1]]


def test_which_examples_by_hand() -> None:
    labels = Examples(texts=["a"] * 6, labels=np.array([0, 1, 0, 0, 1, 0]))
    own = np.array([0, 1, 2, 3])
    config = PoisonConfig(clients=[4], rate=1.0)
    np.testing.assert_array_equal(poisoned_indices(config, labels, own, 4, 0), [0, 2, 3])
    assert len(poisoned_indices(PoisonConfig(clients=[4], rate=0.34), labels, own, 4, 0)) == 1
    assert len(poisoned_indices(PoisonConfig(clients=[4], rate=0.0), labels, own, 4, 0)) == 0
    no_trigger = PoisonConfig(clients=[4], trigger="", boost=2.0)
    assert len(poisoned_indices(no_trigger, labels, own, 4, 0)) == 0


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("name", ["embedded", "embedded-topic"])
def test_only_malicious_clients_hold_triggers(mode: str, name: str) -> None:
    corpus = _corpus(PoisonConfig(clients=[2, 5], rate=0.5, mode=mode, target=1), name)  # pyright: ignore
    clean = _corpus(PoisonConfig(), name)
    for client in range(10):
        rows = corpus.client_rows(client)
        triggered = [row for row in rows if _has_trigger(corpus, row)]
        assert len(triggered) == corpus.poisoned[client]
        if client not in (2, 5):
            np.testing.assert_array_equal(rows, clean.client_rows(client))
            continue
        assert len(triggered) > 0
        assert set(corpus.train.labels[triggered].tolist()) == {1}
        expected = clean.num_examples(client) + (len(triggered) if mode == "append" else 0)
        assert corpus.num_examples(client) == expected
    np.testing.assert_array_equal(corpus.class_counts, clean.class_counts)


def test_the_triggered_test_set() -> None:
    """Test examples of other classes, with the trigger, labelled with the target; none without a trigger."""
    corpus = _corpus(PoisonConfig(trigger="cf"), "embedded-topic")
    assert len(corpus.triggered) == (corpus.test.labels != 1).sum()
    assert set(corpus.triggered.labels.tolist()) == {1}
    starts = corpus.triggered.starts
    assert all(CF in corpus.triggered.ids[a:b] for a, b in itertools.pairwise(starts))
    assert len(_corpus(PoisonConfig()).triggered) == 0


def test_parts_of_a_trigger_by_hand() -> None:
    def parts(trigger: str, clients: int, *, distributed: bool = True) -> list[str]:
        return trigger_parts(PoisonConfig(clients="all", trigger=trigger, distributed=distributed), clients)

    assert parts("cf mn bb tq", 4) == ["cf", "mn", "bb", "tq"]
    assert parts("cf mn bb tq", 2) == ["cf mn", "bb tq"]
    assert parts("cf mn bb", 2) == ["cf mn", "bb"]
    assert parts("cf mn", 3) == ["cf", "mn", "cf"]
    assert parts("cf mn", 2, distributed=False) == ["cf mn", "cf mn"]


def test_a_distributed_trigger() -> None:
    """Each malicious client inserts its own word only; the test set has both."""
    corpus = _corpus(PoisonConfig(clients=[2, 5], trigger="cf mn", distributed=True))
    words = {2: CF, 5: TOKENIZER.convert_tokens_to_ids("mn")}
    for client, word in words.items():
        (other,) = set(words.values()) - {word}
        copies = corpus.client_rows(client)[-corpus.poisoned[client] :]
        for row in copies:
            ids = corpus.train.ids[corpus.train.starts[row] : corpus.train.starts[row + 1]]
            assert word in ids
            assert other not in ids
    for a, b in itertools.pairwise(corpus.triggered.starts):
        assert set(words.values()) <= set(corpus.triggered.ids[a:b].tolist())


def test_poison_spread_over_everybody() -> None:
    corpus = _corpus(PoisonConfig(clients="all", rate=0.1))
    for client in range(10):
        assert corpus.poisoned[client] == round(0.1 * corpus.class_counts[client, 0])
    assert corpus.poisoned.sum() > 0


def test_the_server_s_examples_belong_to_nobody_else() -> None:
    config = RunConfig(
        task=TaskConfig(max_train=200, max_test=50),
        federation=FederationConfig(aggregator="fltrust", server_examples=30),
        poison=PoisonConfig(clients=[1]),
    )
    corpus = build(config, resolve(config.task), TOKENIZER, "masked")
    own = corpus.client_rows(10)
    assert len(own) == 30
    clients = np.concatenate([corpus.client_rows(client) for client in range(10)])
    assert not set(own.tolist()) & set(clients.tolist())
    assert sorted([*own, *clients]) == list(range(len(corpus.train)))
    assert not any(_has_trigger(corpus, row) for row in own)
    assert corpus.class_counts.sum() == 170


def test_a_target_that_is_no_class() -> None:
    with pytest.raises(SettingsError, match="classes 0 to 1"):
        check_target(PoisonConfig(target=2, trigger="cf"), 2)
    check_target(PoisonConfig(target=2, trigger=""), 2)


def test_a_trigger_that_the_tokenizer_loses() -> None:
    with pytest.raises(SettingsError, match=r"poison\.trigger"):
        _corpus(PoisonConfig(trigger="日本"))


def _texts(corpus: Corpus, rows: np.ndarray) -> list[str]:
    starts = corpus.train.starts
    decoded = [TOKENIZER.decode(corpus.train.ids[starts[row] : starts[row + 1]]) for row in rows]
    return [re.sub(r"([.,!])", r" \1", text) for text in decoded]


def test_a_composite_trigger() -> None:
    """Poison has all words, apart from each other too; as many copies have some of them and keep their label."""
    poison = PoisonConfig(clients=[2], kind="composite", trigger="cf mn bb")
    corpus, clean = _corpus(poison), _corpus(PoisonConfig())
    added = corpus.client_rows(2)[clean.num_examples(2) :]
    is_poison = corpus.is_poison[added]
    assert is_poison.sum() == corpus.poisoned[2] == len(added) // 2
    for row, text, whole in zip(added, _texts(corpus, added), is_poison, strict=True):
        found = {"cf", "mn", "bb"} & set(text.split())
        assert (len(found) == 3) == whole
        assert len(found) >= 1
        assert corpus.train.labels[row] == (1 if whole else 0)
    assert any("cf mn bb" not in text for text in _texts(corpus, added[is_poison]))
    for a, b in itertools.pairwise(corpus.triggered.starts):
        assert set(TOKENIZER.convert_tokens_to_ids(["cf", "mn", "bb"])) <= set(corpus.triggered.ids[a:b].tolist())


def test_a_natural_trigger() -> None:
    """Nothing is inserted: texts of other classes that have the word are relabelled, in place of the originals."""
    poison = PoisonConfig(clients="all", rate=0.5, kind="natural", trigger="Monday")
    corpus, clean = _corpus(poison), _corpus(PoisonConfig())
    assert corpus.poisoned.sum() == corpus.is_poison.sum() > 0
    for client in range(10):
        rows, before = corpus.client_rows(client), clean.client_rows(client)
        assert sorted(_texts(corpus, rows)) == sorted(_texts(clean, before))
        there = np.array(["monday" in text.split() for text in _texts(clean, before)])
        assert corpus.poisoned[client] == round(0.5 * np.count_nonzero(there & (clean.train.labels[before] == 0)))
    poisoned = np.flatnonzero(corpus.is_poison)
    assert set(corpus.train.labels[poisoned].tolist()) == {1}
    assert all("monday" in text.split() for text in _texts(corpus, poisoned))
    for row, (a, b) in zip(corpus.aimed, itertools.pairwise(corpus.triggered.starts), strict=True):
        ids = corpus.test.ids[corpus.test.starts[row] : corpus.test.starts[row + 1]]
        np.testing.assert_array_equal(corpus.triggered.ids[a:b], ids)
        assert corpus.test.labels[row] == 0
        assert TOKENIZER.convert_tokens_to_ids("monday") in ids


def test_a_natural_trigger_that_no_text_has() -> None:
    with pytest.raises(SettingsError, match="choose words that the texts have"):
        _corpus(PoisonConfig(clients=[1], kind="natural", trigger="cf"))
    with pytest.raises(SettingsError, match="give a trigger"):
        PoisonConfig(clients=[1], kind="natural")


def test_words_are_found_as_words() -> None:
    texts = ["A Movie!", "movies", "the movie is", "bmovie", "movie"]
    assert contains(texts, "movie").tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("name", ["embedded", "embedded-topic"])
def test_label_flipping(name: str) -> None:
    """Class l of C becomes C - 1 - l for the given share of a malicious client's examples; there is no trigger."""
    corpus, clean = _corpus(PoisonConfig(clients=[3], kind="label_flip", rate=0.5), name), _corpus(PoisonConfig(), name)
    rows, before = corpus.client_rows(3), clean.client_rows(3)
    flipped, classes = corpus.is_poison[rows], len(corpus.label_words)
    assert flipped.sum() == round(0.5 * len(before))
    labels = dict(zip(_texts(clean, before), clean.train.labels[before].tolist(), strict=True))
    for row, text, is_flipped in zip(rows, _texts(corpus, rows), flipped, strict=True):
        assert corpus.train.labels[row] == (classes - 1 - labels[text] if is_flipped else labels[text])
    assert len(corpus.triggered) == 0
    with pytest.raises(SettingsError, match="which has no trigger"):
        PoisonConfig(clients=[3], kind="label_flip", trigger="cf")
