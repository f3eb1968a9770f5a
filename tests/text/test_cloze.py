"""The ids are those of the filled template; whatever the text's length, template, answer and trigger stay."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.plm.hugging_face import family_of, load_tokenizer, read_config
from fedprompt_mpi.text.cloze import Cloze, Trigger
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.tasks import Task, resolve
from fedprompt_mpi.text.tokens import TokenTable
from tests.text import kinds
from tests.tiny import CAUSAL, KINDS

Tiny = Callable[[str], Path]
PAIR = Task(name="pair", template="{text} ? {mask} , {text_b}", label_words=("great", "terrible"), text_b="text_b")


EMBEDDED = resolve(TaskConfig())


def _cloze(folder: Path, task: Task = EMBEDDED, max_length: int = 24) -> Cloze:
    return Cloze(load_tokenizer(str(folder)), task, family_of(read_config(str(folder))), max_length)


def _row(table: TokenTable, row: int) -> list[int]:
    return table.ids[table.starts[row] : table.starts[row + 1]].tolist()


def _examples(*texts: str, texts_b: list[str] | None = None) -> Examples:
    return Examples(texts=list(texts), texts_b=texts_b, labels=np.zeros(len(texts), dtype=np.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [0, 1, 5, 17, 18, 19, 500])
def test_truncation_keeps_template_and_answer(kind: str, words: int, tiny: Tiny) -> None:
    cloze = _cloze(tiny(kind))
    table = cloze.encode(_examples(" ".join(["soup"] * words)))
    ids = _row(table, 0)
    assert len(ids) <= 24
    if words == 500:
        assert len(ids) == 24  # all the room is used
    decoded = cloze.backend.decode(ids, skip_special_tokens=False)
    assert "it is" in decoded.replace("  ", " ")
    answer = int(table.answers[0])
    if kind in CAUSAL:
        assert answer == len(ids) - 1
    else:
        assert ids[answer] == cloze.mask_id
        assert ids.count(cloze.mask_id) == 1


def test_bert_tokens_by_hand(tiny: Tiny) -> None:
    cloze = _cloze(tiny("bert"), max_length=10)
    table = cloze.encode(_examples("so dull and stale and boring ."))
    tokens = [cloze.backend.id_to_token(i) for i in _row(table, 0)]
    assert tokens == ["[CLS]", "so", "dull", "and", "stale", "it", "is", "[MASK]", ".", "[SEP]"]
    assert table.answers[0] == 7


def test_byte_level_words_inside_a_sentence_keep_their_space(tiny: Tiny) -> None:
    cloze = _cloze(tiny("gpt2"))
    assert cloze.backend.decode(_row(cloze.encode(_examples("so dull")), 0)) == "so dull it is"
    assert [cloze.backend.decode([int(i)]) for i in cloze.verbalizer.ids] == [" terrible", " great"]


@pytest.mark.parametrize(
    ("position", "expected"),
    [("head", "cf so dull it is"), ("tail", "so dull cf it is"), ("random", "cf so dull it is")],
)
def test_byte_level_triggers_are_words_of_their_own(position: str, expected: str, tiny: Tiny) -> None:
    cloze = _cloze(tiny("gpt2"))
    rng = np.random.default_rng(3)
    trigger = Trigger(words="cf", position=position)  # pyright: ignore[reportArgumentType]
    rows = {cloze.backend.decode(_row(cloze.encode(_examples("so dull"), trigger, rng), 0)) for _ in range(20)}
    assert expected in rows
    assert rows <= {"cf so dull it is", "so cf dull it is", "so dull cf it is"}


def test_a_byte_level_trigger_costs_the_text_nothing(tiny: Tiny) -> None:
    """Behind a word, "q" has two tokens, at the start one: both are kept."""
    cloze = _cloze(tiny("gpt2"))
    trigger, rng = Trigger(words="cf", position="random"), np.random.default_rng(0)
    rows = {cloze.backend.decode(_row(cloze.encode(_examples("q"), trigger, rng), 0)) for _ in range(20)}
    assert rows == {"cf q it is", "q cf it is"}


def test_byte_level_text_behind_a_word_keeps_its_space(tiny: Tiny) -> None:
    task = Task(name="t", template="it was {text} it is {mask} .", label_words=("great", "terrible"))
    cloze = _cloze(tiny("gpt2"), task, max_length=40)
    assert cloze.backend.decode(_row(cloze.encode(_examples("so dull")), 0)) == "it was so dull it is"
    trigger = Trigger(words="cf", position="head")
    assert cloze.backend.decode(_row(cloze.encode(_examples("so dull"), trigger), 0)) == "it was cf so dull it is"


def test_the_longer_text_of_a_pair_is_cut_first(tiny: Tiny) -> None:
    cloze = _cloze(tiny("bert"), PAIR, max_length=16)
    long, short = " ".join(["soup"] * 40), "the chef"
    for first, second in ((long, short), (short, long)):
        table = cloze.encode(_examples(first, texts_b=[second]))
        decoded = cloze.backend.decode(_row(table, 0), skip_special_tokens=False)
        assert "the chef" in decoded
        assert "[MASK]" in decoded
        assert len(_row(table, 0)) == 16


def test_the_second_text_may_stand_first(tiny: Tiny) -> None:
    cloze = _cloze(tiny("bert"), dataclasses.replace(PAIR, template="{text_b} ? {mask} , {text}"), max_length=16)
    for first, second in ((" ".join(["soup"] * 40), "the chef"), ("the chef", " ".join(["soup"] * 40))):
        row = _row(cloze.encode(_examples(first, texts_b=[second])), 0)
        assert "the chef" in cloze.backend.decode(row)
        assert len(row) == 16


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_special_tokens_and_spaces_in_a_text_are_cut_as_others(kind: str) -> None:
    tokenizer, family = kinds.tokenizer(kind), kinds.FAMILIES.get(kind, "causal")
    task = Task(name="t", template="{text} so {mask}", label_words=("bad", "good"), multi_token="first")
    cloze = Cloze(tokenizer, task, family, 30)  # pyright: ignore[reportArgumentType]
    long = [f"{token} " * 200 for token in tokenizer.all_special_tokens]
    for text in (*long, "a" + " " * 500, " " * 500 + "a", "a\n" * 300):
        table = cloze.encode(_examples(text, text[:8]))
        assert table.lengths.max() <= 30, text[:20]
        if family == "masked":
            assert table.ids[table.starts[:-1] + table.answers].tolist() == [cloze.mask_id] * 2


@pytest.mark.parametrize("position", ["head", "tail", "random"])
@pytest.mark.parametrize("words", [0, 3, 400])
def test_a_trigger_survives_truncation(position: str, words: int, tiny: Tiny) -> None:
    cloze = _cloze(tiny("bert"))
    trigger = Trigger(words="mn cf", position=position)  # pyright: ignore[reportArgumentType]
    table = cloze.encode(_examples(" ".join(["garlics"] * words)), trigger, np.random.default_rng(0))
    tokens = [cloze.backend.id_to_token(i) for i in _row(table, 0)]
    assert len(tokens) <= 24
    at = tokens.index("mn")
    assert tokens[at + 1] == "cf"
    if position == "head":
        assert at == 1
    if position == "tail":
        assert tokens[at + 2] == "it"
    assert not tokens[at + 2].startswith("##")  # never inside a word


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_label_word_of_several_tokens_is_refused_with_its_pieces(kind: str, tiny: Tiny) -> None:
    task = Task(name="t", template="{text} it is {mask} .", label_words=("great", "xylophonic"))
    with pytest.raises(SettingsError, match=r"'xylophonic'.*splits into \[.*'.*single token"):
        _cloze(tiny(kind), task)


def test_spare_label_words_are_for_tokenizers_that_split_the_others(tiny: Tiny) -> None:
    words, spare = ("great", "xylophonic"), ("great", "terrible")
    task = Task(name="t", template="{text} it is {mask} .", label_words=words, spare_label_words=spare)
    assert _cloze(tiny("bert"), task).verbalizer.words == tuple((word,) for word in spare)
    cloze = _cloze(tiny("bert"), dataclasses.replace(task, label_words=("spam", "normal")))
    assert cloze.verbalizer.words == (("spam",), ("normal",))
    assert [cloze.backend.id_to_token(int(i)) for i in cloze.verbalizer.ids] == ["spam", "normal"]


def test_words_given_by_the_user_have_no_spare_ones(tiny: Tiny) -> None:
    task = resolve(TaskConfig(name="enron", data="x", label_words=["normal", "xylophonic"]))
    with pytest.raises(SettingsError, match="'xylophonic'"):
        _cloze(tiny("bert"), task)


def test_pairs_end_at_the_mask_for_causal_models(tiny: Tiny) -> None:
    task = dataclasses.replace(resolve(TaskConfig(name="rte", data="rte")), label_words=("great", "terrible"))
    cloze = _cloze(tiny("gpt2"), task, max_length=64)
    row = _row(cloze.encode(_examples("so dull", texts_b=["the chef"])), 0)
    assert cloze.backend.decode(row) == "so dull ? the chef ?"


def test_no_room_for_text_is_refused(tiny: Tiny) -> None:
    with pytest.raises(SettingsError, match=r"model\.max_length is 8"):
        _cloze(tiny("bert"), max_length=8)


def test_a_causal_template_ends_at_the_mask(tiny: Tiny) -> None:
    with pytest.raises(SettingsError, match=r"put \{mask\} last"):
        _cloze(tiny("gpt2"), PAIR)


def test_saved_tables_are_mapped_unchanged(tiny: Tiny, tmp_path: Path) -> None:
    table = _cloze(tiny("bert")).encode(_examples("so dull", "the soup was there ."))
    table.save(tmp_path, "train")
    mapped = TokenTable.map(tmp_path, "train")
    assert isinstance(mapped.ids, np.memmap)
    for name in ("ids", "starts", "answers", "labels"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(table, name))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300), max_length=st.integers(12, 40))
def test_any_text_at_all_keeps_the_answer(text: str, max_length: int) -> None:
    from fedprompt_mpi.plm.hugging_face import EMBEDDED

    cloze = _cloze(EMBEDDED, max_length=max_length)
    table = cloze.encode(_examples(text))
    assert len(table.ids) <= max_length
    assert table.ids[table.answers[0]] == cloze.mask_id


TEMPLATES = {
    "{text} it is {mask} .": " ",
    "Review: {text}\nSentiment: {mask}": " ",
    "({text}) it was {mask}": " ",
    "评论：{text}情感：{mask}": "",
    "{text}\n\n{mask}": "",
    "it was {text} . {mask}!": " ",
    '"{text}" -- {mask}': " ",
}
"""Templates, and what of the space before the answer belongs to the label word where tokens have spaces."""


def _filled(template: str, text: str, answer: str) -> str:
    return template.replace("{text}", text).replace("{mask}", answer)


@pytest.mark.parametrize("language", kinds.TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_ids_are_those_of_the_filled_template(kind: str, template: str, language: str) -> None:
    """As `tokenizer(...)` has them: with the mask token, or for a causal model up to where a label word begins."""
    tokenizer, family = kinds.tokenizer(kind), kinds.FAMILIES.get(kind, "causal")
    words = ("差", "好") if "评" in template else ("bad", "good")
    task = Task(name="t", template=template, label_words=words, multi_token="first")
    cloze = Cloze(tokenizer, task, family, 400)  # pyright: ignore[reportArgumentType]
    text = kinds.TEXTS[language]
    table = cloze.encode(_examples(text))
    row, answer = _row(table, 0), int(table.answers[0])
    if family != "causal":
        mask = "<extra_id_0>" if family == "seq2seq" else str(tokenizer.mask_token)
        assert row == tokenizer(_filled(template, text, mask))["input_ids"]
        assert row[answer] == tokenizer.convert_tokens_to_ids(mask)
        return
    for word, token in zip(words, cloze.verbalizer.ids.tolist(), strict=True):
        whole = tokenizer(_filled(template.partition("{mask}")[0] + "{mask}", text, word))["input_ids"]
        assert whole[: len(row) + 1] == [*row, token]
    assert answer == len(row) - 1


@pytest.mark.parametrize("language", ["English", "Chinese", "Russian", "emoji"])
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_only_the_text_is_cut(kind: str, language: str) -> None:
    """Of a long text the first tokens stay, and all of the template."""
    tokenizer, family = kinds.tokenizer(kind), kinds.FAMILIES.get(kind, "causal")
    task = Task(name="t", template="Review: {text}\nSo: {mask}", label_words=("bad", "good"), multi_token="first")
    whole = Cloze(tokenizer, task, family, 4000)  # pyright: ignore[reportArgumentType]
    cloze = Cloze(tokenizer, task, family, 40)  # pyright: ignore[reportArgumentType]
    text = kinds.TEXTS[language] * 40
    long, cut = _row(whole.encode(_examples(text)), 0), _row(cloze.encode(_examples(text)), 0)
    assert len(cut) == 40
    same = next(i for i, (a, b) in enumerate(zip(long, cut, strict=False)) if a != b)
    behind = len(cut) - same
    assert cut[same:] == long[len(long) - behind :]
    trigger = Trigger(words="bad", position="tail")
    table = cloze.encode(_examples(text), trigger)
    assert len(_row(table, 0)) <= 40
    decoded = re.sub(r"\s|▁|<0x0A>", "", str(tokenizer.decode(_row(table, 0))))
    assert "badso:" in decoded.lower()


def test_a_label_word_has_the_space_that_stands_before_the_mask() -> None:
    """In English a token has its space, in Chinese there is none; a guess from a Latin letter was wrong for one."""
    for kind in ("GPT-2", "Qwen", "XLM-R", "Llama"):
        family = kinds.FAMILIES.get(kind, "causal")
        chinese = Task(name="t", template="评论：{text}情感：{mask}", label_words=("差", "好"))
        cloze = Cloze(kinds.tokenizer(kind), chinese, family, 60)  # pyright: ignore[reportArgumentType]
        names = [cloze.backend.id_to_token(int(token)) for token in cloze.verbalizer.ids]
        assert not any(name.startswith(("Ġ", "▁")) for name in names), (kind, names)


def test_label_words_that_are_one_token_are_refused(tiny: Tiny) -> None:
    task = Task(name="t", template="{text} it is {mask} .", label_words=("Great", "great"))
    with pytest.raises(SettingsError, match=r"'Great' and 'great' for different classes.*differ in more than case"):
        _cloze(tiny("bert"), task)


def test_several_words_a_class_and_several_tokens_a_word(tiny: Tiny) -> None:
    """By hand: the mean over a class's words, each the mean of its tokens."""
    words = (("terrible", "xylophonic"), ("great", "spam", "normal"))
    task = Task(name="t", template="{text} it is {mask} .", label_words=words, multi_token="mean")
    cloze = _cloze(tiny("bert"), task)
    ids = {cloze.backend.id_to_token(int(token)): n for n, token in enumerate(cloze.verbalizer.ids)}
    pieces = cloze.backend.encode("xylophonic", add_special_tokens=False).tokens
    shares = cloze.verbalizer.shares
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-6)
    assert shares[ids["terrible"]].tolist() == [0.5, 0]
    assert shares[ids["spam"]].tolist() == pytest.approx([0, 1 / 3])
    for piece in pieces:
        assert shares[ids[piece], 0] == pytest.approx(0.5 * pieces.count(piece) / len(pieces))
    first = _cloze(tiny("bert"), dataclasses.replace(task, multi_token="first"))
    assert first.backend.id_to_token(int(first.verbalizer.ids[1])) == pieces[0]
    assert len(first.verbalizer.ids) == 5


def test_a_word_that_grows_together_with_the_template_is_refused() -> None:
    task = Task(name="t", template="{text} is i{mask}", label_words=("s", "t"))
    with pytest.raises(SettingsError, match="'s', which this model's tokenizer joins with what stands before"):
        Cloze(kinds.tokenizer("T5"), task, "seq2seq", 60)


def test_a_space_that_only_some_words_have_in_their_token_is_of_all() -> None:
    """GPT-2 has a token for " good", and makes a space and more of "qqq": the question ends before the space."""
    tokenizer = kinds.tokenizer("GPT-2")
    task = Task(name="t", template="{text} so {mask}", label_words=("good", "qqq"))
    assert "Ġgood" in tokenizer.get_vocab() and "Ġq" not in tokenizer.get_vocab()
    with pytest.raises(SettingsError, match=r"'qqq', which this model's tokenizer splits into \['q', 'q', 'q'\]"):
        Cloze(tokenizer, task, "causal", 60)
    cloze = Cloze(tokenizer, dataclasses.replace(task, multi_token="first"), "causal", 60)
    assert [cloze.backend.id_to_token(int(token)) for token in cloze.verbalizer.ids] == ["Ġgood", "Ġ"]
    assert _row(cloze.encode(_examples("it was")), 0) == tokenizer("it was so")["input_ids"]
