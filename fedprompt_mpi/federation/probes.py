"""Probes: the task's question about a text of one word, for each of the common words and each class.

They are made from token ids alone, of what all questions have in common. Legend: W words, C classes.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.text.tokens import TokenTable

ENOUGH = 64
"""Questions of which what all have in common is the template."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Questions about single words."""

    words: np.ndarray
    """`[W]` int64 tokens, the most common first."""
    odds: np.ndarray
    """`[W]` float64, logarithms of the odds with which a text has each word."""
    table: TokenTable
    """`W * C` questions: word by word, and for each the classes."""
    known: set[int]
    """Tokens of the template and the label words, which everybody knows."""


def make_probes(setup: Setup, rows: np.ndarray) -> Probes | None:
    """Return the probes for the most common words of some rows of the evaluation split.

    Returns:
        None if the questions have no part that is their text alone, or there is no word.
    """
    table, most = setup.corpus.test, setup.config.privacy.audit_words
    questions = [table.ids[table.starts[row] : table.starts[row + 1]].tolist() for row in rows]
    some = questions[:ENOUGH]
    before = _in_common(some)
    shortest = min(map(len, some))
    after = min(_in_common([question[::-1] for question in some]), shortest - before)
    lengths, answers = table.lengths[rows[: len(some)]], table.answers[rows[: len(some)]]
    if len(set(answers.tolist())) == 1 and answers[0] <= before:
        answer = int(answers[0])
    elif len(set((lengths - answers).tolist())) == 1:
        answer = before + 1 + after - int(lengths[0] - answers[0])
    else:
        return None
    head, tail = some[0][:before], some[0][len(some[0]) - after :]
    known = {*head, *tail, *setup.corpus.label_ids.tolist()}
    counts = np.zeros(table.largest_id + 1, dtype=np.int64)
    for question in questions:
        counts[np.unique(question)] += 1
    counts[[token for token in known if token < len(counts)]] = 0
    words = np.argsort(-counts, kind="stable")[: min(most, int((counts > 0).sum()))]
    if not len(words):
        return None
    classes = np.arange(len(setup.corpus.label_words))
    built = [([*head, int(word), *tail], answer) for word in words for _ in classes]
    share = (counts[words] + 0.5) / (len(questions) + 1)
    odds = np.log(share) - np.log1p(-share)
    return Probes(words=words, odds=odds, table=TokenTable.build(built, np.tile(classes, len(words))), known=known)


def _in_common(questions: list[list[int]]) -> int:
    """Return with how many tokens all questions begin."""
    at = 0
    while all(len(question) > at and question[at] == questions[0][at] for question in questions):
        at += 1
    return at
