"""Build the cloze question of each example as token ids.

The text and the literal parts of the template are tokenised separately and then joined: a long text is truncated; the
template, the answer position and the trigger of a backdoor never are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.config import Family, Position, SettingsError
from fedprompt_mpi.text.load import Examples
from fedprompt_mpi.text.tasks import Task

SEQ2SEQ_MASK = "<extra_id_0>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """Token ids of N examples, one after the other in flat arrays that processes of a node can share."""

    ids: np.ndarray
    """`[sum of lengths]` int32."""
    starts: np.ndarray
    """`[N + 1]` int64: example i is `ids[starts[i]:starts[i + 1]]`."""
    answers: np.ndarray
    """`[N]` int64: where in its example the answer is read."""
    labels: np.ndarray
    """`[N]` int64."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self.ids.max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` int64: tokens of each example."""
        return np.diff(self.starts)

    def save(self, folder: Path, name: str) -> None:
        """Write the arrays as `<name>.<field>.npy`."""
        for field in dataclasses.fields(self):
            np.save(folder / f"{name}.{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def map(cls, folder: Path, name: str) -> "TokenTable":
        """Open saved arrays without copying them into this process."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{f: np.load(folder / f"{name}.{f}.npy", mmap_mode="r", allow_pickle=False) for f in fields})

    @classmethod
    def build(cls, rows: Sequence[tuple[list[int], int]], labels: np.ndarray) -> "TokenTable":
        """Join rows of (token ids, answer position)."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids, _ in rows], out=starts[1:])
        return cls(
            ids=np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            starts=starts,
            answers=np.array([answer for _, answer in rows], dtype=np.int64),
            labels=np.asarray(labels, dtype=np.int64),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """The words of a backdoor, and their position in the text."""

    words: str
    position: Position


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
            SettingsError: if a label word is no single token, or the template leaves no room for text.
        """
        self.backend = _Backend(tokenizer.backend_tokenizer)
        self.family = family
        self._space = self._leading_space()
        mask_token = tokenizer.mask_token if family == "masked" else SEQ2SEQ_MASK
        mask_id = None if family == "causal" else self.backend.token_to_id(mask_token or "")
        if mask_id is None and family != "causal":
            raise SettingsError(f"the tokenizer of model.name has no {mask_token or 'mask token'}: use another model")
        self.mask_id = mask_id or 0
        self.label_words = self._label_words(task)
        self.label_ids = np.array([self._label_id(word) for word in self.label_words], dtype=np.int64)
        head, tail = self._special_tokens()
        template = task.causal_template if family == "causal" and task.causal_template else task.template
        self._parts: list[list[int] | str] = [head, *self._template_parts(template, mask_id), tail]
        self._text_comes_first = self._parts[1] == "text"
        fixed = sum(len(part) for part in self._parts if isinstance(part, list))
        self.room = max_length - fixed
        if self.room < 4:
            raise SettingsError(
                f"model.max_length is {max_length}, of which the template takes {fixed} tokens: "
                f"give at least {fixed + 4}"
            )

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
        lead = "" if self._text_comes_first else self._space
        at_head = trigger is not None and trigger.position == "head"
        first = self._encode(examples.texts, self._space if at_head else lead)
        second = self._encode(examples.texts_b, self._space) if examples.texts_b is not None else None
        leading = self._trigger_ids(trigger, lead) if trigger else []
        inner = self._trigger_ids(trigger, self._space) if trigger else []
        room = self.room - max(len(leading), len(inner))
        rows = []
        for row, encoding in enumerate(first):
            b_ids = second[row].ids if second is not None else []
            cut_a, cut_b = _share_room(len(encoding.ids), len(b_ids), room)
            at = _insertion_point(encoding.word_ids[:cut_a], trigger.position, rng) if trigger else None
            if at == 0 and not at_head:  # the text now follows a word
                (encoding,) = self._encode([examples.texts[row]], self._space)
                cut_a, cut_b = _share_room(len(encoding.ids), len(b_ids), room)
            ids = list(encoding.ids[:cut_a])
            if at is not None:
                ids[at:at] = inner if at else leading
            rows.append(self._assemble(ids, b_ids[:cut_b]))
        return TokenTable.build(rows, examples.labels)

    def _encode(self, texts: Sequence[str], lead: str) -> list[Any]:
        return self.backend.encode_batch([lead + text if text else text for text in texts], add_special_tokens=False)

    def _assemble(self, ids: list[int], ids_b: list[int]) -> tuple[list[int], int]:
        joined: list[int] = []
        answer = -1
        for part in self._parts:
            if isinstance(part, list):
                joined += part
            elif part == "mask":
                answer = len(joined) - 1
            else:
                joined += ids if part == "text" else ids_b
        return joined, len(joined) - 1 if self.family == "causal" else answer

    def _template_parts(self, template: str, mask_id: int | None) -> list[list[int] | str]:
        """Split the template at its fields; "mask" marks the answer, after the mask token itself."""
        parts: list[list[int] | str] = []
        rest = template
        while rest:
            literal, _, rest = rest.partition("{")
            field, _, rest = rest.partition("}") if rest else ("", "", "")
            after_space = literal[:1].isspace()
            if literal.strip():
                words = literal.strip()
                parts.append(self._ids(self._space + words if parts and after_space else words))
            if field == "mask":
                if self.family == "causal":
                    break  # the model continues from here
                parts += [[int(mask_id or 0)], "mask"]
            elif field:
                parts.append(field)
        if self.family == "causal" and "text_b" in template and "text_b" not in parts:
            raise SettingsError(
                f"task.template {template!r} has {{text_b}} behind {{mask}}, "
                "which a causal model never sees: put {mask} last"
            )
        return parts

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _leading_space(self) -> str:
        """Return " " if a word inside a sentence has a token of its own, with its space (byte-level BPE)."""
        spaced = self._ids(" a")
        return " " if len(spaced) == 1 and spaced != self._ids("a") else ""

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after a text; a causal model continues the text, so none after it."""
        inner = self._ids("a")
        full = self.backend.encode("a").ids
        at = next((i for i in range(len(full)) if inner and full[i : i + len(inner)] == inner), None)
        if at is None:
            raise SettingsError("the tokenizer of model.name does not leave a text as it is: use another model")
        return full[:at], [] if self.family == "causal" else full[at + len(inner) :]

    def _label_words(self, task: Task) -> tuple[str, ...]:
        """Return the task's label words, or its spare ones if this tokenizer can take only those."""
        if task.spare_label_words:
            try:
                for word in task.label_words:
                    self._label_id(word)
            except SettingsError:
                return task.spare_label_words
        return task.label_words

    def _label_id(self, word: str) -> int:
        encoding = self.backend.encode(self._space + word, add_special_tokens=False)
        if len(encoding.ids) != 1 or self.backend.id_to_token(encoding.ids[0]) in ("[UNK]", "<unk>"):
            raise SettingsError(
                f"task.label_words has {word!r}, which this model's tokenizer splits into {encoding.tokens}: "
                "a label word must be a single token; choose another with task.label_words, short and common"
            )
        return encoding.ids[0]

    def _trigger_ids(self, trigger: Trigger, lead: str) -> list[int]:
        encoding = self.backend.encode(lead + trigger.words.strip(), add_special_tokens=False)
        if not encoding.ids or any(token in ("[UNK]", "<unk>") for token in encoding.tokens):
            raise SettingsError(
                f"poison.trigger is {trigger.words!r}, of which this model's tokenizer makes {encoding.tokens}: "
                "choose words that it knows"
            )
        if len(encoding.ids) > self.room // 2:
            raise SettingsError(
                f"poison.trigger is {len(encoding.ids)} tokens long and model.max_length leaves {self.room} for text: "
                "take a shorter trigger or a larger max_length"
            )
        return encoding.ids


def _share_room(length: int, length_b: int, room: int) -> tuple[int, int]:
    """Return the lengths to which a pair of texts is truncated: first the longer one, then both alike."""
    over = length + length_b - room
    if over <= 0:
        return length, length_b
    half = room // 2
    cut = max(min(length, room - min(length_b, half)), 0)
    return cut, room - cut


def _insertion_point(words: Sequence[int | None], position: Position, rng: np.random.Generator | None) -> int:
    """Return the index in the tokens at which a trigger is inserted, never inside a word."""
    if position == "head":
        return 0
    if position == "tail":
        return len(words)
    if rng is None:
        raise ValueError("a random position needs a random generator")
    edges = [i for i in range(len(words)) if i == 0 or words[i] != words[i - 1]] + [len(words)]
    return edges[int(rng.integers(len(edges)))]
