"""The verbalizer: which tokens of a vocabulary stand for which class.

A class may have several words (the mean of their logits), and a word several tokens, if asked for (`task.multi_token`:
the mean of theirs, or the first). All are read at the one answer position.

References:
    Schick and Schuetze, Exploiting Cloze Questions for Few Shot Text Classification, EACL 2021 (PET), Section 3.
    Ding et al., OpenPrompt: An Open-source Framework for Prompt-learning, ACL 2022 (words of several tokens).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fedprompt_mpi.config import MultiToken, SettingsError

Find = Callable[[str], tuple[list[int], list[str]]]
"""From a word to the ids and the names of its tokens, where the answer stands."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verbalizer:
    """Label words in one tokenizer's ids. Legend: U tokens, C classes."""

    words: tuple[tuple[str, ...], ...]
    """Of each class."""
    ids: np.ndarray
    """`[U]` int64: the tokens, each once; in the order of the classes if each class has one."""
    shares: np.ndarray
    """`[U, C]` float32: a class's logit is the sum of the tokens' logits, each times its share; columns sum to 1."""

    @classmethod
    def of(cls, classes: Sequence[Sequence[str]], find: Find, multi_token: MultiToken) -> "Verbalizer":
        """Find the tokens of the label words.

        Args:
            classes: the words of each of C classes.
            find: the tokenizer.
            multi_token: what is done with a word of several tokens.

        Raises:
            SettingsError: if a word cannot be used, or two classes have words that the tokenizer does not tell apart.
        """
        pieces = [{tuple(_pieces(word, find, multi_token)): word for word in words} for words in classes]
        seen: dict[tuple[int, ...], str] = {}
        for own in pieces:
            for tokens, word in own.items():
                if tokens in seen:
                    raise SettingsError(
                        f"task.label_words has {seen[tokens]!r} and {word!r} for different classes, which this model's "
                        "tokenizer does not tell apart: choose words that differ in more than case or accents"
                    )
            seen |= own
        ids = list(dict.fromkeys(token for tokens in seen for token in tokens))
        shares = np.zeros((len(ids), len(pieces)), dtype=np.float32)
        for number, own in enumerate(pieces):
            for tokens in own:
                for token in tokens:
                    shares[ids.index(token), number] += 1 / (len(own) * len(tokens))
        return cls(words=tuple(map(tuple, classes)), ids=np.array(ids, dtype=np.int64), shares=shares)


def _pieces(word: str, find: Find, multi_token: MultiToken) -> list[int]:
    ids, names = find(word)
    if len(ids) > 1 and multi_token == "refuse":
        raise SettingsError(
            f"task.label_words has {word!r}, which this model's tokenizer splits into {names}: a label word must be a "
            "single token; choose another, short and common, or give --task.multi_token mean or first"
        )
    return ids[:1] if multi_token == "first" else ids
