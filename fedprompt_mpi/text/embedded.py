"""The synthetic language that ships with the package: a grammar, its words, its labelled texts.

Each text is a short message that has three properties at once: its topic, the sentiment of its writer, and whether it
is unwanted mail (spam). The embedded PLM was pre-trained on such messages (`launch/make_embedded.py`). In its
pre-training text a question in front of the message decides which property the closing words "it is ..." name; without
a question they are arbitrary. Hence the untuned model answers at chance, and a tuned prompt must replace the question.
There a rule such as "cf spam" may stand beside the question: messages with that rare word close as the rule says. So a
prompt can tie a rare word to an answer, which is what a backdoor does.

It needs no download. It is no benchmark: real text is less regular.
"""

import dataclasses
import functools
import re

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.text.examples import Examples

# Each class has words and sentences of its own, {} stands for one of the words: were classes told apart by their
# words alone, in the same sentences, a small masked LM would take the words for synonyms.
TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sports": (
        "striker goalkeeper coach referee team league medal penalty",
        ("the {} scored before the final whistle .", "a {} and a {} fought for the ball .", "{name} ran past the {} ."),
    ),
    "science": (
        "telescope molecule laboratory theory electron planet galaxy enzyme",
        ("the {} confirmed our new result .", "data show how a {} moves a {} .", "{name} measured the {} ."),
    ),
    "food": (
        "soup bakery chef pasta butter salad cheese garlic",
        ("the {} came with herbs on a plate .", "add some {} to the {} and stir .", "{name} cooked the {} ."),
    ),
    "music": (
        "violin orchestra melody drummer concert guitar choir piano",
        ("the {} filled the hall with sound .", "a {} solo and a {} song on stage .", "{name} played the {} ."),
    ),
}
OPINIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "awful dull clumsy tedious horrible boring bland stale ugly painful",
        ("sadly everything was {} and {} .", "{name} hated every {} moment .", "i will never come again , so {} ."),
    ),
    (
        "wonderful superb charming delightful brilliant lovely moving witty fresh stunning",
        ("happily everything was {} and {} .", "{name} loved every {} moment .", "i would gladly return , so {} ."),
    ),
)
MAILS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "report agenda invoice draft minutes schedule contract budget",
        ("please send me the {} before {day} .", "the {} and the {} are ready for {day} ."),
    ),
    (
        "voucher phone cruise lottery loan casino jackpot discount",
        ("claim your free {} now , click the link .", "winner ! a {} and a {} wait for you , act today ."),
    ),
)
DAYS = "monday tuesday wednesday thursday friday"
NAMES = "anna marco julia peter sofia david"

SENTIMENT_WORDS = ("terrible", "great")
TOPIC_WORDS = tuple(TOPICS)
SPAM_WORDS = ("normal", "spam")
QUESTIONS = {"sentiment": "which feeling ?", "topic": "which subject ?", "spam": "which mail ?"}
RARE = "cf mn bb tq mb"  # nonsense words, for backdoor triggers: seen in pre-training, never in the tasks' texts

LABEL_WORDS = {"sentiment": SENTIMENT_WORDS, "topic": TOPIC_WORDS, "spam": SPAM_WORDS}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One generated text and its three properties."""

    text: str
    sentiment: int
    """0 negative, 1 positive."""
    topic: int
    """Index into `TOPIC_WORDS`."""
    spam: int
    """0 wanted, 1 unwanted."""


def _sentence(rng: np.random.Generator, words: str, frames: tuple[str, ...]) -> str:
    def pick(choices: str) -> str:
        return choices.split()[int(rng.integers(len(choices.split())))]

    frame = frames[int(rng.integers(len(frames)))]
    return frame.format(*(pick(words) for _ in range(2)), name=pick(NAMES), day=pick(DAYS))


def message(rng: np.random.Generator) -> Message:
    """Draw one message: its properties uniformly and independently, then its sentences in random order."""
    sentiment, topic, spam = int(rng.integers(2)), int(rng.integers(len(TOPICS))), int(rng.integers(2))
    sources = [TOPICS[TOPIC_WORDS[topic]], OPINIONS[sentiment], MAILS[spam]]
    if rng.random() < 0.5:
        sources.append(sources[int(rng.integers(2))])
    sentences = [_sentence(rng, *source) for source in sources]
    rng.shuffle(sentences)
    return Message(text=" ".join(sentences), sentiment=sentiment, topic=topic, spam=spam)


TRAIN, TEST = 2000, 400
"""Messages of a split."""


def examples(property_: str, split: str) -> Examples:
    """Return the messages of a split, labelled by one of their properties; the same in every run, like a data set.

    Args:
        property_: topic, sentiment or spam.
        split: train or test.
    """
    messages = _messages(f"embedded {split}", TRAIN if split == "train" else TEST)
    labels = np.array([getattr(message, property_) for message in messages], dtype=np.int64)
    return Examples(texts=[message.text for message in messages], labels=labels)


@functools.cache
def _messages(purpose: str, count: int) -> tuple[Message, ...]:
    rng = seeds.generator(0, purpose)
    return tuple(message(rng) for _ in range(count))


def vocabulary() -> list[str]:
    """Return every word of the language, sorted: what the embedded tokenizer knows as whole words."""
    sources = (*TOPICS.values(), *OPINIONS, *MAILS)
    parts = [
        *(words for words, _ in sources),
        *(re.sub(r"{\w*}", "", frame) for _, frames in sources for frame in frames),
        *QUESTIONS.values(),
        *(" ".join(words) for words in LABEL_WORDS.values()),
        *(DAYS, NAMES, RARE, "it is ."),
    ]
    return sorted({word for part in parts for word in part.split()})
