"""The typed records of a run: what its JSON files hold, with one writer and one reader.

Keys of the JSON files are the names of the fields. A reader ignores unknown keys, which a later version may have added,
and takes the default of a missing one if it has a default.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from fedprompt_mpi.comm.placement import MPILibrary
from fedprompt_mpi.comm.statistics import Quantiles
from fedprompt_mpi.comm.traffic import NOTHING, Traffic
from fedprompt_mpi.config import MOST_WORD, MOST_WORDS, RunConfig, SettingsError, declared, from_record, to_dict
from fedprompt_mpi.files import (
    MOST_LINES_BYTES,
    File,
    append_text,
    bounded_lines,
    parse_json,
    read_json,
    read_toml,
    write_json,
    write_text,
)
from fedprompt_mpi.plugins.load import Plugin
from fedprompt_mpi.rules.setting import typed
from fedprompt_mpi.rundir.paths import RunPaths

Record = TypeVar("Record")
RATES = (
    "accuracy", "macro_f1", "loss", "answers", "attack_success_rate", "flip_rate", "clean_attack_success_rate",
    "metrics",
)  # fmt: skip
"""Keys that a line of rounds.jsonl has only if the round's vector was evaluated."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How well a prompt does on the test set; rates are in [0, 1]."""

    accuracy: float
    macro_f1: float
    loss: float | None
    """None if it is not finite."""
    answers: list[int]
    """How often each class is the answer."""
    attack_success_rate: float | None
    """None if no trigger is set."""
    flip_rate: float | None = None
    """Of the texts of other classes that are answered rightly without the trigger, the share that it turns into the
    target; None without a trigger, and if it is natural."""
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Of output.metrics; None if one is not finite."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnRates:
    """How well a client's own prompt does on the test set."""

    accuracy: float
    attack_success_rate: float | None
    """None if no trigger is set."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """Ranks that were lost while the others went on."""

    ranks: list[int]
    """As numbered at the start of the job."""
    round: int
    """The round in which the others noticed, and which was repeated."""
    line: int
    """The last round that was done; its line in rounds.jsonl lists the failure."""
    seconds: float
    """Until the others could continue, without the repeated work."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """The time of a round. Each part is that of the slowest rank; parts of different ranks overlap."""

    train: float = 0.0
    wait: float = 0.0
    transfer: float = 0.0
    aggregate: float = 0.0
    evaluate: float = 0.0
    total: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundTraffic:
    """The traffic of a round: the global vector to the clients, their updates, and what comes with these."""

    down: Traffic
    up: Traffic
    headers: Traffic = NOTHING
    """Of the updates' headers, between ranks."""
    secure: Traffic = NOTHING
    """Of keys and shares of secure aggregation, by way of rank 0, both ways."""
    checkpoint: Traffic = NOTHING
    """Of the timings and the clients' residuals that rank 0 has gathered for the checkpoint after the round."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """A line of rounds.jsonl, complete once the round's vector has been evaluated. Legend: K clients of the round."""

    round: int
    accuracy: float | None = None
    macro_f1: float | None = None
    loss: float | None = None
    answers: list[int] | None = None
    """How often each class is the answer."""
    attack_success_rate: float | None = None
    flip_rate: float | None = None
    """Share of the texts answered rightly without the trigger that it turns into the target."""
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Of output.metrics; None if one is not finite."""
    clean_attack_success_rate: float | None = None
    """Attack success rate of the clean run after this round."""
    malicious_share: float | None = None
    """What the malicious clients' updates count for before the rule, as a share of all; 0 in a clean run."""
    train_loss: float | None = None
    cohort: list[int] = dataclasses.field(default_factory=list)
    """K client ids."""
    update_norms: list[float | None] = dataclasses.field(default_factory=list)
    """K Euclidean norms; None if the update is not finite, and under secure aggregation."""
    shares: list[float] | None = None
    """K weights of the updates, under secure aggregation before they are scaled to the bound; None under rules by
    coordinate, and if nothing was aggregated."""
    backdoor_snr: float | None = None
    """Power of the server's step along the backdoor's direction to that of the rest, in decibels; None if it leads away
    from it."""
    lora_error: float | None = None
    """How far LoRA's products are from their exact weighted sums, relative to the step (Frobenius norms)."""
    dropped: list[int] = dataclasses.field(default_factory=list)
    """Clients whose update or loss was not finite."""
    vanished: list[int] = dataclasses.field(default_factory=list)
    """Clients whose update did not come."""
    given_up: str | None = None
    """Why a round of secure aggregation has no sum."""
    aggregated: bool | None = None
    """False if too few updates were left for the rule."""
    epsilon: float | None = None
    """The smallest that can be derived, for a client that took part in all rounds."""
    epsilon_renyi: float | None = None
    """That of Renyi accounting, under dp_fedavg."""
    lost_ranks: list[RankFailure] = dataclasses.field(default_factory=list)
    client_accuracy: list[float] | None = None
    client_attack_success_rate: list[float | None] | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    traffic: RoundTraffic | None = None
    seconds: Seconds = dataclasses.field(default_factory=Seconds)

    @property
    def is_evaluated(self) -> bool:
        """True if the round's vector was evaluated."""
        return self.accuracy is not None

    def to_json(self) -> dict[str, Any]:
        """Return the line as a JSON object."""
        content = dataclasses.asdict(self)
        return content if self.is_evaluated else {name: v for name, v in content.items() if name not in RATES}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClientRecord:
    """The examples of one client."""

    client: int
    num_examples: int
    by_class: list[int]
    poisoned: int
    malicious: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSplit:
    """What accuracy and attack success rate are measured on."""

    name: str
    """Such as "test", "dev", or "a part of the training data"."""
    by_class: list[int]
    triggered: int
    """Examples of other classes than the target, with the trigger in them."""

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.by_class)

    @property
    def majority(self) -> int:
        """The most frequent class."""
        return self.by_class.index(max(self.by_class))

    @property
    def majority_share(self) -> float:
        """Share of the most frequent class: the accuracy of always answering it."""
        return max(self.by_class) / self.examples


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRecord:
    """partition.json: which client holds how many examples of each class, and what is evaluated."""

    label_words: list[str]
    """Of each class; several words of a class are joined by /."""
    clients: list[ClientRecord]
    class_names: list[str] | None = None
    """Labels of the classes, if the settings list them."""
    evaluation: EvaluationSplit | None = None
    """None in a directory of version 0.1 without it."""

    @property
    def names(self) -> list[str]:
        """What the classes are called: by their labels, or by their label words."""
        return self.class_names or self.label_words


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """Where one rank ran."""

    rank: int
    host: str
    node: int
    device: str
    threads: int
    cores: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Versions, MPI library, and where each rank ran."""

    versions: dict[str, str]
    mpi: MPILibrary
    compute_dtype: str
    """Arithmetic of the PLM on the workers."""
    dropout: bool = False
    """Whether the PLM drops out in training."""
    plugins: list[Plugin] = dataclasses.field(default_factory=list)
    """What extended the program."""
    ranks: list[RankRecord]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EarlierJob(Job):
    """A job that did the first rounds of a run, which was resumed."""

    until: int
    """The last round that it did."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Environment(Job):
    """environment.json: the job that did the last rounds, and those before it."""

    earlier: list[EarlierJob] = dataclasses.field(default_factory=list)
    """The first one first."""

    @property
    def resumed_after(self) -> int:
        """The last round of the job before; 0 if there was none."""
        return self.earlier[-1].until if self.earlier else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """communication.json: the phases of a round."""

    mode: str
    """comm.mode."""
    launches: int
    rounds: int
    warmup_rounds: int
    after: int = 0
    """The last round of an earlier job, which the figures leave out: it may have had other ranks."""
    seconds: dict[str, Quantiles]
    """Figure -> seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The figures of a whole run that its rounds do not hold."""

    parameters: int
    """P."""
    plm_parameters: int
    bytes_per_client_round: int
    malicious_clients: list[int]
    poisoned_examples: dict[str, int]
    """Client -> poisoned examples, of clients that have some."""
    seconds_total: float
    seconds_to_first_broadcast: float | None
    peak_rss_bytes: list[int]
    """Of every rank."""
    filter_recall: float | None = None
    """Share of the poisoned examples that the example filter has left out."""
    filter_precision: float | None = None
    """Share of what it has left out that is poisoned."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Closing):
    """summary.json: the closing figures of a run."""

    accuracy: float | None
    attack_success_rate: float | None
    clean_attack_success_rate: float | None
    macro_f1: float | None
    accuracy_before: float | None
    macro_f1_before: float | None = None
    answers: list[int] | None = None
    """How often each class is the answer in the end."""
    flip_rate: float | None = None
    malicious_share: float | None = None
    """What malicious clients' updates count for before the rule, as a share of all; the mean over the rounds."""
    lora_error: float | None = None
    """That of the rounds, their mean."""
    rounds: int
    dropped_updates: dict[str, int]
    """Client -> updates of it that were not finite."""
    given_up: int = 0
    """Rounds of secure aggregation without a sum."""
    vanished_updates: int = 0
    """Updates that did not come."""
    epsilon: float | None
    epsilon_renyi: float | None = None
    lost_ranks: list[RankFailure]
    ratio: float
    """parameters / plm_parameters."""
    malicious_clients_attack_success_rate: float | None
    honest_clients_attack_success_rate: float | None
    """Means over the clients' own prompts in the last round."""
    seconds_by_phase: dict[str, float]


def read_rounds(paths: RunPaths, federation: dict[str, Any] | None = None) -> list[RoundRecord]:
    """Return the lines of rounds.jsonl; a last line that was not written to its end is left out.

    Args:
        paths: of the run.
        federation: that section of its settings; read from config.toml if None.

    Raises:
        SettingsError: if there is no such file, it is too large, or a line is not the record of its round; it names
            file, line and field.
    """
    settings = federation or read_settings(paths)["federation"]
    records: list[RoundRecord] = []
    with reading(paths.rounds):
        for line in bounded_lines(paths.rounds, MOST_LINES_BYTES):
            if not line.endswith("\n"):
                break
            with reading(paths.rounds, f"line {len(records) + 1}: "):
                records.append(read_round(line, len(records), settings))
    return records


def federation_of(config: RunConfig, done: int) -> dict[str, Any]:
    """Return the section for `read_rounds` of a run that continues after round `done`, perhaps to fewer rounds."""
    federation = to_dict(config)["federation"]
    return {**federation, "rounds": max(config.federation.rounds, done + config.output.checkpoint_every)}


def read_round(line: str, number: int, settings: dict[str, Any]) -> RoundRecord:
    """Return the record of a round, from its JSON.

    Args:
        line: the JSON.
        number: of the round.
        settings: the section federation of the run.

    Raises:
        ValueError: if it is no such record, is of another round, or names clients that there are not.
    """
    if number > settings["rounds"]:
        raise ValueError(f"the run has {settings['rounds']} rounds")
    record, clients = typed(RoundRecord, parse_json(line)), settings["clients"]
    if record.round != number:
        raise ValueError(f"round is {record.round}")
    if len(set(record.cohort)) < len(record.cohort) or not set(record.cohort) <= set(range(clients)):
        raise ValueError(f"cohort names clients twice, or beyond 0 to {clients - 1}")
    for name in ("update_norms", "shares", "client_accuracy", "client_attack_success_rate"):
        values = getattr(record, name)
        if values is not None and len(values) != len(record.cohort):
            raise ValueError(f"{name} has {len(values)} values for {len(record.cohort)} clients")
    return record


def append_round(paths: RunPaths, record: RoundRecord) -> None:
    """Append the line of a round."""
    append_text(paths.rounds, _lines([record]))


def write_rounds(paths: RunPaths, records: Iterable[RoundRecord]) -> None:
    """Replace the lines of all rounds."""
    write_text(paths.rounds, _lines(records))


def write_record(file: File, record: Any) -> None:
    """Write a record as a JSON file."""
    write_json(file, dataclasses.asdict(record))


def read_record(file: File, kind: type[Record]) -> Record:
    """Read a record of a kind from a JSON file.

    Raises:
        SettingsError: if there is no such file, it is too large, no JSON, or no such record; it names file and field.
    """
    with reading(file):
        return typed(kind, _without_nul(read_json(file)))


def _without_nul(record: Any) -> Any:
    """Drop the NUL that ended the name of Open MPI's library in environment.json, as version 0.1 wrote it."""
    library = record.get("mpi", {}) if isinstance(record, dict) else {}
    if isinstance(library, dict) and isinstance(library.get("library"), str):
        library["library"] = library["library"].removesuffix("\0")
    return record


def read_partition(paths: RunPaths) -> PartitionRecord:
    """Return which client holds what.

    Raises:
        SettingsError: as `read_record` does, also unless each client of the settings has a number of examples for each
            class, and the label words are those of the settings.
    """
    partition, settings = read_record(paths.partition, PartitionRecord), read_settings(paths)
    clients, given = settings["federation"]["clients"], settings["task"].get("label_words")
    classes = [[words] if isinstance(words, str) else words for words in given or partition.label_words]
    joined, longest = ["/".join(words) for words in classes], max((len(w) for own in classes for w in own), default=0)
    with reading(paths.partition):
        if len(partition.clients) != clients:
            raise ValueError(f"it has {len(partition.clients)} clients, and the settings {clients}")
        if joined != partition.label_words:
            raise ValueError(f"its label words are {partition.label_words[:9]}, and those of the settings {joined[:9]}")
        if sum(map(len, classes)) > MOST_WORDS or longest > MOST_WORD:
            raise ValueError(f"it has more than {MOST_WORDS:,} label words, or one of more than {MOST_WORD} characters")
        split = partition.evaluation
        if split is not None and (len(split.by_class) != len(classes) or min(split.by_class) < 0 or not split.examples):
            raise ValueError(f"it evaluates examples of {len(split.by_class)} classes, and there are {len(classes)}")
        names = partition.class_names
        if names is not None and (len(names) != len(classes) or max(map(len, names)) > MOST_WORD):
            raise ValueError(f"it has {len(names)} class names for {len(classes)} classes, or one too long")
        for number, record in enumerate(partition.clients):
            if record.client != number or len(record.by_class) != len(partition.label_words):
                raise ValueError(f"clients.{number} is client {record.client} with {len(record.by_class)} classes")
    return partition


def read_settings(paths: RunPaths) -> dict[str, Any]:
    """Return the settings of a run as nested tables; a setting that the run's version did not have has its default.

    Raises:
        SettingsError: if there is no such file, or it holds no settings; it names file and setting.
    """
    with reading(paths.config):
        tables = read_toml(paths.config)
        needed = dict.fromkeys(("seed", *(name.partition(".")[0] for name, _ in declared() if "." in name)))
        if missing := [name for name in needed if name not in tables]:
            raise ValueError(f"it has no {missing[0]}")
        return over(tables, to_dict(from_record(with_dropout(tables))))


def over(below: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables, with what only the ones below have: the options of plug-ins that are not loaded."""
    found = {**below, **tables}
    for name in below.keys() & tables.keys():
        if isinstance(below[name], dict) and isinstance(tables[name], dict):
            found[name] = over(below[name], tables[name])
    return found


def with_dropout(tables: dict[str, Any]) -> dict[str, Any]:
    """Return settings with `model.dropout` as a version without it trained: off, also with the method full."""
    if "dropout" in tables.get("model", {}) or tables.get("prompt", {}).get("method") != "full":
        return tables
    return {**tables, "model": {**tables.get("model", {}), "dropout": False}}


@contextlib.contextmanager
def reading(file: File, where: str = "") -> Iterator[None]:
    """Turn what goes wrong while a file of a run is read into one message.

    Args:
        file: which one.
        where: in it, in front of the reason.

    Raises:
        SettingsError: naming file, reason and remedy.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SettingsError(f"there is no {file}: name a run directory, of a finished run if need be") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SettingsError(
            f"{file} cannot be read ({where}{reason}): name a run directory as a run has written it"
        ) from error


def summarise(rounds: list[RoundRecord], closing: Closing) -> Summary:
    """Return the summary of a run from its rounds and its closing figures."""
    first, last = rounds[0], rounds[-1]
    trained = [record.seconds for record in rounds if record.round > 0]
    rates = dict(zip(last.cohort, last.client_attack_success_rate or [], strict=False))

    def mean(*, malicious: bool) -> float | None:
        chosen = [r for k, r in rates.items() if r is not None and (k in closing.malicious_clients) == malicious]
        return sum(chosen) / len(chosen) if chosen else None

    return Summary(
        **{field.name: getattr(closing, field.name) for field in dataclasses.fields(closing)},
        accuracy=last.accuracy,
        attack_success_rate=last.attack_success_rate,
        clean_attack_success_rate=last.clean_attack_success_rate,
        macro_f1=last.macro_f1,
        accuracy_before=first.accuracy,
        macro_f1_before=first.macro_f1,
        answers=last.answers,
        flip_rate=last.flip_rate,
        malicious_share=mean_of(rounds, "malicious_share"),
        lora_error=mean_of(rounds, "lora_error"),
        rounds=last.round,
        dropped_updates=dict(collections.Counter(str(client) for record in rounds for client in record.dropped)),
        given_up=sum(record.given_up is not None for record in rounds),
        vanished_updates=sum(len(record.vanished) for record in rounds),
        epsilon=last.epsilon,
        epsilon_renyi=last.epsilon_renyi,
        lost_ranks=[failure for record in rounds for failure in record.lost_ranks],
        ratio=closing.parameters / closing.plm_parameters,
        malicious_clients_attack_success_rate=mean(malicious=True),
        honest_clients_attack_success_rate=mean(malicious=False),
        seconds_by_phase={
            phase: sum(getattr(seconds, phase) for seconds in trained)
            for phase in ("train", "wait", "transfer", "aggregate", "evaluate")
        },
    )


def mean_of(rounds: Iterable[RoundRecord], name: str) -> float | None:
    """Return the mean of a figure over the rounds that have it; None if none has."""
    known = [value for record in rounds if (value := getattr(record, name)) is not None]
    return sum(known) / len(known) if known else None


def _lines(records: Iterable[RoundRecord]) -> str:
    return "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records)
