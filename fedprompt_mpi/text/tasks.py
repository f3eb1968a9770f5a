"""Tasks as cloze questions: the known tasks, and the checks of a task that the settings define.

The paper's label words are those of its companion PPT (Du et al., PPT: Backdoor Attacks on
Pre-trained Models via Poisoned Prompt Tuning, IJCAI 2022).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from fedprompt_mpi.config import MOST_WORD, MOST_WORDS, MultiToken, SettingsError, TaskConfig
from fedprompt_mpi.rules.registry import tasks
from fedprompt_mpi.text import embedded
from fedprompt_mpi.text.examples import Examples

FIELDS = ("text", "text_b", "mask")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A classification task as a cloze question."""

    name: str
    template: str
    """Literal words with {text}, {mask} and for pairs {text_b}."""
    label_words: tuple[str | tuple[str, ...], ...]
    """One word or several for each class, in the order of the labels."""
    labels: tuple[str | int | float | bool, ...] | None = None
    """Values of the label column in the order of the classes."""
    multi_token: MultiToken = "refuse"
    spare_label_words: tuple[str, ...] = ()
    """Used instead of `label_words` if the model's tokenizer has no single token for one of those."""
    causal_template: str | None = None
    """Used instead of `template` by causal models, which do not see what follows {mask}."""
    text: str = "text"
    text_b: str | None = None
    label: str = "label"
    user: str | None = None
    data: str | None = None
    """Folder, file or hub data set; None for a task that makes its examples itself."""
    examples: Callable[[str], Examples] | None = None
    """Makes the examples of a split, train or test: the same on every call. None if they come from files."""

    @property
    def classes(self) -> tuple[tuple[str, ...], ...]:
        """The label words of each class."""
        return tuple((words,) if isinstance(words, str) else words for words in self.label_words)

    @property
    def spare_classes(self) -> tuple[tuple[str, ...], ...]:
        """The spare label words of each class."""
        return tuple((word,) for word in self.spare_label_words)

    def class_names(self, words: Sequence[Sequence[str]] | None = None) -> tuple[str, ...]:
        """Return the names of the classes: their labels if the settings list them, else their label words.

        Args:
            words: the label words in use; the first choice if None.
        """
        if self.labels is not None:
            return tuple(map(shown_label, self.labels))
        return tuple("/".join(own) for own in words or self.classes)


_SENTIMENT = "{text} it is {mask} ."
_PAIR = "{text} ? {mask} , {text_b}"
_CAUSAL_PAIR = "{text} ? {text_b} ? {mask}"
_MAIL = "{text} this is {mask} ."

for _task in (
    Task(name="sst2", template=_SENTIMENT, label_words=("terrible", "great")),
    Task(name="sst2-glue", template=_SENTIMENT, label_words=("terrible", "great")),
    Task(name="imdb", template=_SENTIMENT, label_words=("bad", "good"), user="user"),
    Task(name="offenseval", template="{text} this is {mask} .", label_words=("normal", "offensive")),
    Task(name="twitter", template="{text} this is {mask} .", label_words=("normal", "abusive")),
    Task(
        name="enron",
        template=_MAIL,
        label_words=("normal", "spam"),
        spare_label_words=("normal", "junk"),  # BERT's vocabulary has no "spam"
        user="user",
    ),
    Task(name="lingspam", template=_MAIL, label_words=("normal", "spam"), spare_label_words=("normal", "junk")),
    Task(name="qnli", template=_PAIR, causal_template=_CAUSAL_PAIR, label_words=("yes", "no"), text_b="text_b"),
    Task(name="rte", template=_PAIR, causal_template=_CAUSAL_PAIR, label_words=("yes", "no"), text_b="text_b"),
    Task(
        name="trec6",
        template="{text} this asks for a {mask} .",
        label_words=("description", "entity", "abbreviation", "human", "location", "number"),
        # RoBERTa's and GPT-2's vocabulary has no "abbreviation"
        spare_label_words=("description", "entity", "short", "human", "location", "number"),
    ),
    Task(name="airline", template=_SENTIMENT, label_words=("negative", "neutral", "positive"), user="user"),
    Task(
        name="embedded",
        template=_SENTIMENT,
        label_words=embedded.SENTIMENT_WORDS,
        examples=functools.partial(embedded.examples, "sentiment"),
    ),
    Task(
        name="embedded-topic",
        template=_SENTIMENT,
        label_words=embedded.TOPIC_WORDS,
        examples=functools.partial(embedded.examples, "topic"),
    ),
    Task(
        name="embedded-spam",
        template=_SENTIMENT,
        label_words=embedded.SPAM_WORDS,
        examples=functools.partial(embedded.examples, "spam"),
    ),
):
    tasks.register(_task.name)(lambda options, _task=_task: _task)


def known_task(config: TaskConfig) -> Task | None:
    """Return the known task of a name, as it is without further settings; None if there is none.

    Raises:
        SettingsError: if a plug-in makes something else.
    """
    make = tasks.get(config.name)
    task = None if make is None else make(config)
    if make is not None and not isinstance(task, Task):
        raise SettingsError(f"task.name is {config.name!r}, for which a plug-in returned no Task")
    return task if task is None else dataclasses.replace(task, name=config.name)


def check_name(config: TaskConfig) -> None:
    """Raise SettingsError if the task is not a known one, and data, template or label words are not given."""
    missing = [f"task.{name}" for name in ("data", "template", "label_words") if not getattr(config, name)]
    if not tasks.knows(config.name) and missing:
        raise SettingsError(
            f"task.name is {config.name!r}, which is not a known task ({', '.join(tasks)}): "
            f"choose one, or give {' and '.join(missing)} too"
        )


def resolve(config: TaskConfig) -> Task:
    """Return the task of the settings: a known one, in which given settings replace the known values.

    Raises:
        SettingsError: if the task is unknown and not fully given, or its template or words are unusable.
    """
    check_name(config)
    known = known_task(config)
    generated = known is not None and known.examples is not None
    if known is None:
        known = Task(name=config.name, template=str(config.template), label_words=())
    elif not generated and config.data is None:
        raise SettingsError(
            f"task.name is {config.name!r} but task.data is not given: "
            "name the folder with its train and dev or test files, or a hub data set"
        )
    task = dataclasses.replace(
        known,
        template=config.template or known.template,
        causal_template=None if config.template else known.causal_template,
        label_words=_label_words(config.label_words) if config.label_words else known.label_words,
        labels=None if config.labels is None else tuple(config.labels),
        multi_token=config.multi_token,
        spare_label_words=() if config.label_words else known.spare_label_words,
        text=config.text,
        text_b=config.text_b or known.text_b,
        label=config.label,
        user=config.user or known.user,
        data=None if generated else config.data,
    )
    if generated and config.data is not None:
        raise SettingsError(f"task.data is {config.data!r} but task {config.name} makes its own text: leave it out")
    _check_template(task)
    _check_words(task)
    _check_labels(task)
    return task


def shown_label(value: str | int | float | bool) -> str:
    """Return a label as the user writes it: true, 4 for 4.0."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label_words(given: Sequence[str | Sequence[str]]) -> tuple[str | tuple[str, ...], ...]:
    """Return label words as the settings give them, a class of one word by that word."""
    classes = [(words,) if isinstance(words, str) else tuple(words) for words in given]
    return tuple(words[0] if len(words) == 1 else words for words in classes)


def _check_words(task: Task) -> None:
    words = [word for own in task.classes for word in own]
    if len(words) > MOST_WORDS or max(map(len, words), default=0) > MOST_WORD:
        raise SettingsError(
            f"task.label_words is {str(task.label_words)[:60]}...: give at most {MOST_WORDS:,} words of at most "
            f"{MOST_WORD} characters, for each class one that is a single token"
        )
    if len(task.classes) < 2 or len(set(words)) != len(words):
        raise SettingsError(f"task.label_words is {list(task.label_words)}: give two or more different words")
    if not all(own and all(word.strip() for word in own) for own in task.classes):
        raise SettingsError(f"task.label_words is {list(task.label_words)}: give each class a word")
    numbers = {word: i for i, own in enumerate(task.classes) for word in own if word.lstrip("-").isdecimal()}
    if task.labels is None and any(word != str(i) for word, i in numbers.items()):
        raise SettingsError(
            f"task.label_words is {list(task.label_words)}, and a number in the label column may be such a word or the "
            "number of a class: list the column's values in the order of the classes by task.labels"
        )


def _check_labels(task: Task) -> None:
    if task.labels is None:
        return
    if task.data is None:
        raise SettingsError(f"task.labels is given, but task {task.name} makes its own text: leave it out")
    shown = [shown_label(value) for value in task.labels]
    if len(shown) != len(task.classes) or len(set(shown)) != len(shown):
        raise SettingsError(
            f"task.labels is {shown[:20]}, and task.label_words has words for {len(task.classes)} classes: give one "
            "value for each class, in their order"
        )
    if any(len(text) > MOST_WORD for text in shown):
        raise SettingsError(f"task.labels has a value of more than {MOST_WORD} characters: take shorter names")


def _check_template(task: Task) -> None:
    fields = re.findall(r"{(\w*)}", task.template)
    if re.search(r"[{}]", re.sub(r"{\w*}", "", task.template)):
        raise SettingsError(
            f"task.template is {task.template!r}: braces are for {{text}}, {{text_b}} and {{mask}} alone"
        )
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise SettingsError(f"task.template has {{{unknown[0]}}}: it may hold {{text}}, {{text_b}} and {{mask}}")
    for name, wanted in (("text", 1), ("mask", 1), ("text_b", 0 if task.text_b is None else 1)):
        if fields.count(name) != wanted:
            remedy = "it must stand there once" if wanted else "name the second column with task.text_b, or remove it"
            raise SettingsError(f"task.template {task.template!r} has {fields.count(name)} {{{name}}}: {remedy}")
