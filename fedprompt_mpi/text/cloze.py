"""A task's cloze question in the ids of one tokenizer.

The ids are those of the filled template: `tokenizer(template with the text put in)`, with the mask token where the
answer belongs. A long text is truncated; the template, the answer position and the trigger of a backdoor never are.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedprompt_mpi.config import Family, MultiToken, Position, SettingsError
from fedprompt_mpi.text.examples import Examples
from fedprompt_mpi.text.tasks import Task
from fedprompt_mpi.text.tokens import TokenTable
from fedprompt_mpi.text.verbalizer import Verbalizer

SEQ2SEQ_MASK = "<extra_id_0>"
LEAST_ROOM = 4
"""Tokens of text for which a template must leave room."""
_SAMPLE = "a"
"""A text, where a template is looked at without one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """The words of a backdoor, and their position in the text."""

    words: str
    position: Position
    scattered: bool = False
    """Each word at a position of its own, not all together."""

    @property
    def pieces(self) -> list[str]:
        """What is inserted at one position each."""
        return self.words.split() if self.scattered else [self.words.strip()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A template with its texts put in."""

    string: str
    spans: dict[str, tuple[int, int]]
    """Field -> first character and the one behind the last."""


class Template:
    """Literal words and fields, in their order."""

    def __init__(self, template: str, mask: str) -> None:
        """Split a template at its fields; `mask` is what stands at {mask}."""
        self._parts = [part for part in re.split(r"({\w*})", template) if part]
        self._mask = mask

    def fill(self, texts: dict[str, str]) -> Filled:
        """Put texts into their fields."""
        string, spans = "", {}
        for part in self._parts:
            field = part[1:-1] if part.startswith("{") else None
            content = part if field is None else self._mask if field == "mask" else texts[field]
            if field is not None:
                spans[field] = len(string), len(string) + len(content)
            string += content
        return Filled(string=string, spans=spans)


class _Backend:
    """The tokenizer proper; what goes wrong in it, a panic of its Rust code included, is one message."""

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method of the tokenizer, whose errors are SettingsErrors."""
        method = getattr(self._backend, name)

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            except (MemoryError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic is no Exception
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                raise SettingsError(
                    f"the tokenizer of model.name cannot encode a text ({reason}): use another model, or other texts"
                ) from error

        return call


def find_mask(tokenizer: Any, family: Family) -> tuple[str, int]:
    """Return the token that stands where the answer belongs, and its id; ("", 0) for causal models.

    Raises:
        SettingsError: if the tokenizer has none.
    """
    if family == "causal":
        return "", 0
    mask = tokenizer.mask_token if family == "masked" else SEQ2SEQ_MASK
    mask_id = tokenizer.backend_tokenizer.token_to_id(mask or "")
    if mask is None or mask_id is None:
        raise SettingsError(f"the tokenizer of model.name has no {mask or 'mask token'}: use another model")
    return mask, mask_id


class Cloze:
    """A task's template in one tokenizer's ids."""

    def __init__(self, tokenizer: Any, task: Task, family: Family, max_length: int) -> None:
        """Tokenise the template and the label words, and check them.

        Args:
            tokenizer: a Hugging Face fast tokenizer.
            task: template and label words.
            family: how the model reads an answer.
            max_length: tokens of an example at most.

        Raises:
            SettingsError: if a label word cannot be used, or the template leaves no room for text.
        """
        self.backend = _Backend(tokenizer.backend_tokenizer)
        self.family: Family = family
        self._max_length = max_length
        self._unknown = {"[UNK]", "<unk>", tokenizer.unk_token} - {tokenizer.eos_token}
        mask, self.mask_id = find_mask(tokenizer, family)
        template = task.causal_template if family == "causal" and task.causal_template else task.template
        self._texts = re.findall(r"{(text(?:_b)?)}", template)
        self.verbalizer = self._choose_verbalizer(task, template.partition("{mask}")[0])
        self._template = Template(self._question(template, task.multi_token) if family == "causal" else template, mask)
        sample = self._template.fill(dict.fromkeys(self._texts, _SAMPLE))
        encoding = self.backend.encode(sample.string)
        own = sum(len(_tokens_in(encoding, sample, field)) for field in self._texts)
        if own == 0:
            raise SettingsError("the tokenizer of model.name does not leave a text as it is: use another model")
        special = encoding.special_tokens_mask
        self._behind = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)
        fixed = len(self._row(encoding, sample)[0]) - own
        self.room = max_length - fixed
        if self.room < LEAST_ROOM:
            raise SettingsError(
                f"model.max_length is {max_length}, of which the template takes {fixed} tokens: "
                f"give at least {fixed + LEAST_ROOM}"
            )

    @property
    def filled_template(self) -> str:
        """What the model sees of the template: with its mask token, and {text} and {text_b} where the texts go."""
        return self._template.fill({"text": "{text}", "text_b": "{text_b}"}).string

    @property
    def special_behind(self) -> int:
        """Special tokens that the tokenizer puts behind a text; a causal model does not get them."""
        return self._behind

    def encode(
        self, examples: Examples, trigger: Trigger | None = None, rng: np.random.Generator | None = None
    ) -> TokenTable:
        """Put every example into the template.

        Args:
            examples: N texts or pairs.
            trigger: inserted into the first text after that is truncated.
            rng: draws the position of a trigger, if it is random.

        Returns:
            A table of N rows, none longer than `max_length`.
        """
        seconds = examples.texts_b if examples.texts_b is not None else [""] * len(examples)
        filled = [self._template.fill({"text": a, "text_b": b}) for a, b in zip(examples.texts, seconds, strict=True)]
        encodings = self.backend.encode_batch([one.string for one in filled])
        if trigger is not None:
            cost = self._cost(trigger)
            filled = [self._triggered(a, b, trigger, cost, rng) for a, b in zip(encodings, filled, strict=True)]
            encodings = self.backend.encode_batch([one.string for one in filled])
        return TokenTable.build(list(map(self._row, encodings, filled)), examples.labels)

    def _row(self, encoding: Any, filled: Filled) -> tuple[list[int], int]:
        """Return the token ids of a filled template, cut to the largest length, and the answer position."""
        ids = encoding.ids
        if self.family == "causal":  # it continues the text: what a tokenizer puts behind would end it
            ids = ids[: len(ids) - self._behind]
        if len(ids) > self._max_length:
            left_out = set()
            for field, kept in self._cut(encoding, filled, 0).items():
                left_out |= set(_tokens_in(encoding, filled, field)) - set(kept)
            kept = [i for i in range(len(ids)) if i not in left_out]
        else:
            kept = range(len(ids))
        if self.family == "causal":
            return [ids[i] for i in kept], len(kept) - 1
        at = filled.spans["mask"][0]
        answers = (i for i, (start, end) in enumerate(encoding.offsets) if start <= at < end and ids[i] == self.mask_id)
        answer = next(answers, None)
        if answer is None:
            raise SettingsError("the tokenizer of model.name does not keep its mask token: use another model")
        return [ids[i] for i in kept], kept.index(answer)

    def _cut(self, encoding: Any, filled: Filled, spare: int) -> dict[str, list[int]]:
        """Return the tokens of each text that are kept, so that `spare` tokens more would fit; a trigger is kept."""
        tokens = {field: _tokens_in(encoding, filled, field) for field in self._texts}
        pieces = [span for span in filled.spans if span.startswith("trigger")]
        trigger = {i for span in pieces for i in _tokens_in(encoding, filled, span)}
        lengths = [len(tokens.get(field, ())) for field in ("text", "text_b")]
        behind = self._behind if self.family == "causal" else 0
        fixed = len(encoding.ids) - behind - sum(lengths)
        room = _share_room(lengths[0], lengths[1], self._max_length - fixed - spare)
        for field, most in zip(("text", "text_b")[: len(tokens)], room, strict=False):
            own = tokens[field]
            movable = [i for i in own if i not in trigger]
            left_out = set(movable[len(movable) - max(len(own) - most, 0) :])
            tokens[field] = [i for i in own if i not in left_out]
        return tokens

    def _triggered(
        self, encoding: Any, filled: Filled, trigger: Trigger, cost: int, rng: np.random.Generator | None
    ) -> Filled:
        """Return a filled template with a trigger of `cost` tokens in its first text, which is cut to make room."""
        texts = {field: filled.string[slice(*filled.spans[field])] for field in self._texts}
        first, text = filled.spans["text"][0], texts["text"]
        own = self._cut(encoding, filled, cost)["text"]
        starts = [_trimmed(filled.string, *encoding.offsets[i])[0] - first for i in own]
        end = encoding.offsets[own[-1]][1] - first if own else 0
        points = [_insertion_point(encoding, filled.string, own, trigger.position, rng) for _ in trigger.pieces]
        cuts = [starts[at] if at < len(own) else end for at in points]
        string, last, spans = "", 0, {}
        for n in sorted(range(len(cuts)), key=cuts.__getitem__):
            before = text[last : cuts[n]].strip() if last else text[: cuts[n]].rstrip()
            string = " ".join(filter(None, (string, before)))
            start = first + (len(string) + 1 if string else 0)
            string = " ".join(filter(None, (string, trigger.pieces[n])))
            spans[f"trigger{n}"] = start, start + len(trigger.pieces[n])
            last = cuts[n]
        texts["text"] = " ".join(filter(None, (string, text[last:end].lstrip())))
        refilled = self._template.fill(texts)
        return dataclasses.replace(refilled, spans={**refilled.spans, **spans})

    def _cost(self, trigger: Trigger) -> int:
        """Return the tokens that a trigger takes at most.

        Raises:
            SettingsError: if the tokenizer does not know its words, or they leave no room for text.
        """
        total = sum(max(self._piece_costs(trigger.words, piece)) for piece in trigger.pieces)
        if total > self.room // 2:
            raise SettingsError(
                f"poison.trigger is {total} tokens long and model.max_length leaves {self.room} for text: "
                "take a shorter trigger or a larger max_length"
            )
        return total

    def _piece_costs(self, trigger: str, piece: str) -> list[int]:
        """Return the tokens that a piece of a trigger takes at the head of a text and behind a word."""
        costs = []
        for before in ("", f"{_SAMPLE} "):
            filled = self._template.fill({**dict.fromkeys(self._texts, _SAMPLE), "text": before + piece})
            start = filled.spans["text"][0] + len(before)
            filled.spans["trigger"] = start, start + len(piece)
            encoding = self.backend.encode(filled.string)
            own = _tokens_in(encoding, filled, "trigger")
            tokens = [encoding.tokens[i] for i in own]
            if not own or not self._unknown.isdisjoint(tokens):
                raise SettingsError(
                    f"poison.trigger is {trigger!r}, of which this model's tokenizer makes {tokens}: "
                    "choose words that it knows"
                )
            costs.append(len(own))
        return costs

    def _choose_verbalizer(self, task: Task, question: str) -> Verbalizer:
        """Return the tokens of the task's label words, or of its spare ones if this tokenizer can take only those."""
        find = functools.partial(self._answer, self._context(question))
        try:
            return Verbalizer.of(task.classes, find, task.multi_token)
        except SettingsError:
            if not task.spare_label_words:
                raise
        return Verbalizer.of(task.spare_classes, find, task.multi_token)

    def _context(self, question: str) -> str:
        """Return what stands before {mask}, with a sample for each text."""
        if question.endswith("}"):  # a word there has nothing to do with a sample
            return ""
        return Template(question, "").fill(dict.fromkeys(self._texts, _SAMPLE)).string

    def _answer(self, context: str, word: str) -> tuple[list[int], list[str]]:
        """Return ids and names of the tokens of a word behind a context.

        Raises:
            SettingsError: if the tokenizer does not know it, or joins it with the context.
        """
        string = context + word
        encoding = self.backend.encode(string, add_special_tokens=False)
        own = [i for i, (_, end) in enumerate(encoding.offsets) if end > len(context)]
        names = [encoding.tokens[i] for i in own]
        if not own or not self._unknown.isdisjoint(names):
            raise SettingsError(
                f"task.label_words has {word!r}, which this model's tokenizer splits into {names}: choose one it knows"
            )
        if _trimmed(string, *encoding.offsets[own[0]])[0] < len(context):
            raise SettingsError(
                f"task.label_words has {word!r}, which this model's tokenizer joins with what stands before {{mask}} "
                f"in task.template ({names[0]!r}): put a space there, or choose another word"
            )
        return [encoding.ids[i] for i in own], names

    def _question(self, template: str, multi_token: MultiToken) -> str:
        """Return what a causal model sees of a template: what stands before {mask}.

        A space before {mask} belongs to the label words if the tokenizer has it in their tokens, or in those of some:
        then it is the first token of the others.

        Raises:
            SettingsError: if a text stands behind {mask}.
        """
        question, _, behind = template.partition("{mask}")
        if hidden := re.search(r"{text(?:_b)?}", behind):
            raise SettingsError(
                f"task.template {template!r} has {hidden[0]} behind {{mask}}, which a causal model never sees: "
                "put {mask} last"
            )
        context = self._context(question)
        bare = context.rstrip()
        if context == bare:
            return question
        seen = {cut: self.backend.encode(cut, add_special_tokens=False).ids for cut in (bare, context)}
        before = []
        for word in itertools.chain.from_iterable(self.verbalizer.words):
            encoding = self.backend.encode(context + word, add_special_tokens=False)
            before.append(
                [i for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end <= len(context)]
            )
        for cut, ids in seen.items():
            if all(own == ids for own in before):
                return question if cut == context else question.rstrip()
        space = context[len(bare) :]
        self.verbalizer = Verbalizer.of(
            self.verbalizer.words, lambda word: self._answer(bare, space + word), multi_token
        )
        return question.rstrip()


def _trimmed(string: str, start: int, end: int) -> tuple[int, int]:
    """Return the span of a token without the white space around it; unchanged if there is nothing else."""
    part = string[start:end]
    if not part.strip():
        return start, end
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _tokens_in(encoding: Any, filled: Filled, field: str) -> list[int]:
    """Return the tokens that lie in the span of a field; one that belongs to the template too does not."""
    first, last = filled.spans[field]
    found = []
    for i, (start, end) in enumerate(encoding.offsets):
        if end >= first and start <= last and not encoding.special_tokens_mask[i]:
            start, end = _trimmed(filled.string, start, end)
            if first <= start <= end <= last:  # a token of a space alone may have no width (RoBERTa)
                found.append(i)
    return list(range(found[0], found[-1] + 1)) if found else []


def _share_room(length: int, length_b: int, room: int) -> tuple[int, int]:
    """Return the lengths to which a pair of texts is truncated: first the longer one, then both alike."""
    over = length + length_b - room
    if over <= 0:
        return length, length_b
    half = room // 2
    cut = max(min(length, room - min(length_b, half)), 0)
    return cut, room - cut


def _insertion_point(
    encoding: Any, string: str, own: Sequence[int], position: Position, rng: np.random.Generator | None
) -> int:
    """Return the index in the tokens of a text at which a trigger is inserted, never inside a word.

    Args:
        encoding: of the filled template.
        string: the filled template.
        own: the text's tokens.
        position: of the trigger.
        rng: draws a random one.
    """
    if position == "head":
        return 0
    if position == "tail":
        return len(own)
    if rng is None:
        raise ValueError("a random position needs a random generator")
    words, offsets = encoding.word_ids, encoding.offsets
    spaced = [
        string[offsets[i][0] : offsets[i][0] + 1].isspace() or string[: offsets[i][0]][-1:].isspace() for i in own
    ]
    edges = [n for n, i in enumerate(own) if n == 0 or spaced[n] or words[i] != words[own[n - 1]]] + [len(own)]
    return edges[int(rng.integers(len(edges)))]
