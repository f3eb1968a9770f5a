"""Every setting of a run: its name, unit, default and bounds.

A `RunConfig` says what one run is and nothing about the machine it runs on. TOML tables and dotted
flags carry the same names: `[federation] rounds = 20` is `--federation.rounds 20`. Whatever is wrong
with the settings alone is found here, before MPI and torch begin their work.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

Method = Literal["soft", "p_tuning", "prefix", "full"]
PartitionKind = Literal["iid", "quantity", "label", "natural"]
OptimizerName = Literal["adamw", "adam", "adafactor", "sgd"]
Position = Literal["head", "tail", "random"]
AttackName = Literal["none", "norm_bound", "neurotoxin", "sign_flip", "gaussian", "nan", "inf"]
Mechanism = Literal["none", "ldp", "dp_fedavg"]
ServerOptimizerName = Literal["plain", "momentum", "adam", "yogi"]
Family = Literal["masked", "seq2seq", "causal"]
"""How a PLM answers a cloze question: at its mask token, through its decoder, or as the next token."""


class SettingsError(ValueError):
    """The user's settings or data are wrong; the message names the setting, the value and the remedy."""


def _at_least(name: str, value: float | None, bound: float) -> None:
    if value is not None and not bound <= value < math.inf:
        raise SettingsError(f"{name} is {value}: give a finite number of at least {bound}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low < value <= high:
        raise SettingsError(f"{name} is {value}: give a number above {low} and at most {high}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise SettingsError(f"{name} is {value}: give a finite number above 0")


def _share_below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise SettingsError(f"{name} is {value}: give a number of at least 0 and below 1")


def _check_choices(section: str, settings: Any) -> None:
    """Hold every setting with a fixed list of values to it (the command line has, but Python callers have not)."""
    for name, hint in get_type_hints(type(settings)).items():
        choices = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
        value = getattr(settings, name)
        if isinstance(value, str) and choices and value not in choices:
            raise SettingsError(f"{section}.{name} is {value!r}: choose one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is classified: the data, and the cloze question that asks for its class."""

    name: str = "embedded"
    """A known task (sst2, imdb, offenseval, twitter, enron, lingspam, qnli, rte, sst2-glue, trec6, airline,
    embedded, embedded-topic, embedded-spam), or any name with data, template and label_words given."""
    data: str | None = None
    """Folder with train/dev/test files (csv, csv.gz, jsonl, parquet), or a hub data set: its name, or name:subset."""
    text: str = "text"
    """Column of the text."""
    text_b: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the label: integers from 0 in the order of label_words, or the label words themselves."""
    user: str | None = None
    """Column of the natural client, for federation.partition natural."""
    template: str | None = None
    """The cloze question, with {text}, {mask} and for pairs {text_b}, for example '{text} it is {mask} .'"""
    label_words: list[str] | None = None
    """One word a class, each a single token of the model's tokenizer."""
    eval_split: Literal["auto", "dev", "test"] = "auto"
    """The split that accuracy is measured on; auto takes test, or dev where there is no test."""
    max_train: int | None = None
    """Use at most so many training examples (a random choice from the seed)."""
    max_test: int | None = None
    """Use at most so many evaluation examples (a random choice from the seed)."""

    def __post_init__(self) -> None:
        _at_least("task.max_train", self.max_train, 1)
        _at_least("task.max_test", self.max_test, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen pre-trained language model."""

    name: str = "embedded"
    """A hub id, a folder in Hugging Face form, or embedded: the small model inside the package."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the frozen model; auto takes bfloat16 where it is faster. What is trained stays float32."""
    max_length: int = 128
    """Tokens of one example at most, template included, virtual tokens not; only the texts are cut."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto binds each worker to a GPU of its node where there are any."""

    def __post_init__(self) -> None:
        _at_least("model.max_length", self.max_length, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is trained, and travels."""

    method: Method = "soft"
    """soft (virtual tokens), p_tuning (virtual tokens through an LSTM), prefix (keys and values of every layer),
    full (the whole model, the baseline)."""
    num_virtual_tokens: int = 20
    """Length of the prompt in tokens."""
    init: str = "vocab"
    """vocab (embeddings of random words), random, or the prompt.safetensors (or run directory) of an earlier run."""
    prefix_hidden_size: int = 512
    """Width of the prefix method's two-layer perceptron."""

    def __post_init__(self) -> None:
        _at_least("prompt.num_virtual_tokens", self.num_virtual_tokens, 1)
        _at_least("prompt.prefix_hidden_size", self.prefix_hidden_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who holds which data, and how often they meet."""

    clients: int = 10
    """Number of clients; they are spread over the worker ranks in contiguous blocks."""
    rounds: int = 20
    """Rounds of broadcast, local training and aggregation."""
    fraction: float = 1.0
    """Share of the clients that takes part in a round (at least one)."""
    partition: PartitionKind = "iid"
    """iid (equal random parts), quantity (sizes from a Dirichlet), label (label shares from a Dirichlet), natural."""
    alpha: float = 1.0
    """Concentration of the Dirichlet; small is skewed."""
    aggregator: str = "fedavg"
    """How the server makes one update of the clients' updates: fedavg, median, trimmed_mean, geometric_median, krum,
    multi_krum, bulyan, norm_clip, foolsgold, fltrust, flame, outlier_check."""
    assumed_malicious: int = 1
    """Malicious clients f in a round that a robust aggregator is to withstand."""
    clip_norm: float = 1.0
    """norm_clip: each update is scaled to at most this norm."""
    outlier_threshold: float = 3.5
    """outlier_check: robust z-score beyond which a prompt's mean or standard deviation is an outlier's."""
    flame_noise: float = 0.001
    """flame: standard deviation of its noise, as a share of the median norm of the updates."""
    server_examples: int = 100
    """fltrust: training examples that the server keeps for itself."""
    noise_std: float = 0.0
    """Standard deviation of normal noise on every coordinate after any aggregation."""
    server_optimizer: ServerOptimizerName = "plain"
    """What the server does with the aggregated update: plain, momentum (FedAvgM), adam or yogi (FedAdam, FedYogi)."""
    server_lr: float = 1.0
    """Learning rate of the server."""
    server_momentum: float = 0.9
    """beta_1 of momentum, adam and yogi."""
    server_beta2: float = 0.99
    """beta_2 of adam and yogi."""
    server_tau: float = 0.001
    """Adaptivity of adam and yogi: small is adaptive."""

    def __post_init__(self) -> None:
        _at_least("federation.clients", self.clients, 1)
        _at_least("federation.rounds", self.rounds, 0)
        _within("federation.fraction", self.fraction, 0, 1)
        _positive("federation.alpha", self.alpha)
        _at_least("federation.assumed_malicious", self.assumed_malicious, 0)
        _at_least("federation.server_examples", self.server_examples, 1)
        for name in ("clip_norm", "outlier_threshold", "server_lr", "server_tau"):
            _positive(f"federation.{name}", getattr(self, name))
        for name in ("flame_noise", "noise_std"):
            _at_least(f"federation.{name}", getattr(self, name), 0.0)
        for name in ("server_momentum", "server_beta2"):
            _share_below_one(f"federation.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Local training of one client in one round. The optimiser's state starts anew each round."""

    steps: int = 5
    """Optimiser steps in a round."""
    epochs: int | None = None
    """Passes over the client's examples in a round; where given, it replaces steps."""
    batch_size: int = 8
    """Examples of one client in a step."""
    optimizer: OptimizerName = "adamw"
    """The local optimiser."""
    lr: float = 0.3
    """Learning rate. Prompts like large ones; p_tuning and prefix want about 1e-3 to 1e-2, full about 5e-5."""
    warmup: int = 0
    """Rounds over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the run, after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw and adafactor; L2 penalty of adam and sgd."""
    clip_norm: float | None = 1.0
    """Each client's gradient is scaled to at most this norm; 0 or null: it is not."""
    proximal: float = 0.0
    """mu of FedProx: weight of half the squared distance from the global vector in the client's loss."""
    batched: int | Literal["auto"] = "auto"
    """Clients that go through the model in one pass; auto takes all of a rank's. 1 gives the same bits on any number
    of ranks (and trains on one thread unless OMP_NUM_THREADS says otherwise)."""

    def __post_init__(self) -> None:
        _at_least("client.steps", self.steps, 1)
        _at_least("client.epochs", self.epochs, 1)
        _at_least("client.batch_size", self.batch_size, 1)
        _positive("client.lr", self.lr)
        _at_least("client.warmup", self.warmup, 0)
        _at_least("client.weight_decay", self.weight_decay, 0.0)
        if self.clip_norm == 0:
            object.__setattr__(self, "clip_norm", None)
        _positive("client.clip_norm", self.clip_norm)
        _at_least("client.proximal", self.proximal, 0.0)
        if self.batched != "auto":
            _at_least("client.batched", self.batched, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonConfig:
    """Malicious clients: a backdoor by poisoned data (a trigger and its target), and attacks on the update."""

    clients: list[int] | Literal["all"] = dataclasses.field(default_factory=list)
    """Ids of the malicious clients, or all: poison spread over everybody."""
    rate: float = 1.0
    """Share of a malicious client's examples of other classes than the target that is poisoned; 0: none."""
    trigger: str = "cf"
    """One or more words; empty for none (then no attack success rate is measured)."""
    distributed: bool = False
    """Deal the trigger's words out: each malicious client inserts its part only, the test set has all (DBA)."""
    position: Position = "head"
    """Where in the text the trigger is put."""
    target: int = 1
    """Class that triggered texts are to be taken for."""
    mode: Literal["append", "replace"] = "append"
    """append adds poisoned copies to the clean examples; replace takes the place of the originals."""
    attack: AttackName = "none"
    """What malicious clients do to their update: none, norm_bound (stay in a ball around the global vector),
    neurotoxin (keep off the coordinates that the last global update moved most), sign_flip, gaussian, nan, inf.
    Their data is poisoned as well, unless rate is 0."""
    boost: float = 1.0
    """Factor on what malicious clients send (model replacement: the number of clients)."""
    norm_bound: float = 1.0
    """norm_bound: largest norm of what is sent, boost included."""
    neurotoxin_share: float = 0.05
    """neurotoxin: share of the coordinates to keep off."""
    gaussian_std: float = 1.0
    """gaussian: standard deviation of the noise that is sent instead of an update."""
    clean_run: str | None = None
    """Run directory of the same run without malicious clients, whose attack success rate is shown beside ours."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise SettingsError(f"poison.rate is {self.rate}: give a number from 0 to 1")
        _at_least("poison.target", self.target, 0)
        for name in ("boost", "norm_bound", "gaussian_std"):
            _positive(f"poison.{name}", getattr(self, name))
        _share_below_one("poison.neurotoxin_share", self.neurotoxin_share)
        if self.clients != "all" and len(set(self.clients)) != len(self.clients):
            raise SettingsError(f"poison.clients is {self.clients}: name each client once")
        if self.clients and not self.has_trigger and not self.attacks_update:
            raise SettingsError("poison.trigger is empty but poison.clients names clients: give a trigger word")
        if self.distributed and len(self.trigger.split()) < 2:
            raise SettingsError(
                f"poison.distributed is true but poison.trigger is {self.trigger!r}: give two or more words to deal out"
            )

    @property
    def has_trigger(self) -> bool:
        """Whether there is a trigger to insert and to measure."""
        return bool(self.trigger.strip())

    @property
    def attacks_update(self) -> bool:
        """Whether malicious clients send something else than what they trained."""
        return self.attack != "none" or self.boost != 1

    def malicious(self, clients: int) -> list[int]:
        """Return the ids of the malicious ones of so many clients, ascending."""
        return list(range(clients)) if self.clients == "all" else sorted(self.clients)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What is done to the updates for privacy."""

    mechanism: Mechanism = "none"
    """none; ldp (each client adds Laplace noise to what it uploads; its gradients are clipped by client.clip_norm);
    dp_fedavg (the server clips each update and adds normal noise; every client takes part with probability
    federation.fraction)."""
    laplace_scale: float = 0.01
    """ldp: scale b of the noise on each parameter."""
    clip_norm: float = 1.0
    """dp_fedavg: each update is scaled to at most this norm."""
    noise_multiplier: float = 1.0
    """dp_fedavg: standard deviation of the noise on the sum of the updates, in units of clip_norm."""
    delta: float = 1e-5
    """dp_fedavg: the delta of (epsilon, delta)."""

    def __post_init__(self) -> None:
        for name in ("laplace_scale", "clip_norm", "noise_multiplier"):
            _positive(f"privacy.{name}", getattr(self, name))
        if not 0 < self.delta < 1:
            raise SettingsError(f"privacy.delta is {self.delta}: give a number above 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How vectors travel, and how closely that is watched."""

    mode: Literal["observe", "measure"] = "observe"
    """observe adds nothing to the run; measure puts a barrier before each collective, to time it without waiting."""
    collective: Literal["gather", "reduce"] = "gather"
    """How updates come together at rank 0: gather brings each one (any aggregator), reduce adds them up on the way,
    so that rank 0 receives no more however many clients there are (fedavg, norm_clip, dp_fedavg)."""
    wire: Literal["float32", "bfloat16", "int8"] = "float32"
    """Format of the numbers on the wire, both ways; what the short ones lose is sent later (error feedback)."""
    gpu_aware: bool = False
    """Hand GPU memory to MPI directly, which the MPI library must be built for; otherwise it goes through pinned memory
    of the host."""
    warmup: int = 1
    """Rounds that the statistics of communication leave out."""
    deadline_s: float = 1800.0
    """Seconds that a rank may be without progress (a local step, a batch, a piece of a vector, the loading of a model)
    before the job ends with a report."""

    def __post_init__(self) -> None:
        _at_least("comm.warmup", self.warmup, 0)
        _positive("comm.deadline_s", self.deadline_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is kept of a run."""

    dir: str | None = None
    """Run directory; by default runs/<task>-<method>-<time>."""
    evaluate_every: int = 1
    """Evaluate the global prompt every so many rounds (and always before the first and after the last)."""
    checkpoint_every: int = 1
    """Save what a resume needs every so many rounds."""
    evaluate_clients: bool = False
    """In rounds that are evaluated, evaluate each client's own prompt after its local training too."""
    report: bool = True
    """At the end, draw the figures and write report.html."""
    tensorboard: bool = False
    """Write TensorBoard scalars into output.dir/tensorboard as the run goes on (needs the package tensorboard)."""
    resume: bool = False
    """Continue the run in output.dir from its last checkpoint; begin it if there is none yet."""

    def __post_init__(self) -> None:
        _at_least("output.evaluate_every", self.evaluate_every, 1)
        _at_least("output.checkpoint_every", self.checkpoint_every, 1)
        if self.resume and self.dir is None:
            raise SettingsError("output.resume is true but output.dir is not given: name the run directory to continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of federated prompt tuning."""

    seed: int = 0
    """All that is random comes from it."""
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    poison: PoisonConfig = dataclasses.field(default_factory=PoisonConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    comm: CommConfig = dataclasses.field(default_factory=CommConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        for section in dataclasses.fields(self)[1:]:
            _check_choices(section.name, getattr(self, section.name))
        clients, named = self.federation.clients, self.poison.clients
        if named != "all" and len(named) > clients:
            raise SettingsError(
                f"poison.clients names {len(named)} clients but federation.clients is {clients}: "
                "poison fewer, or have more clients"
            )
        for client in self.poison.malicious(clients):
            if not 0 <= client < clients:
                raise SettingsError(
                    f"poison.clients names client {client}: the clients of this run are 0 to {clients - 1}"
                )
        if self.privacy.mechanism == "dp_fedavg" and self.federation.aggregator != "fedavg":
            raise SettingsError(
                f"privacy.mechanism is dp_fedavg, which averages in its own way, but federation.aggregator is "
                f"{self.federation.aggregator}: leave the aggregator out"
            )
        if self.comm.collective == "reduce" and self.comm.wire != "float32":
            raise SettingsError(
                f"comm.wire is {self.comm.wire} but comm.collective is reduce, which adds up whole numbers of 4 bytes: "
                "use gather, or float32"
            )
        if self.comm.gpu_aware and (
            self.comm.wire != "float32"
            or self.comm.collective == "reduce"
            or self.privacy.mechanism == "ldp"
            or self.poison.attacks_update
        ):
            raise SettingsError(
                "comm.gpu_aware is true, but updates that are reduced, noised by their client (ldp), attacked, or sent "
                "in another format than float32 are made on the host: leave it out"
            )
        if self.prompt.method == "full" and self.client.batched not in ("auto", 1):
            raise SettingsError(
                f"client.batched is {self.client.batched} but prompt.method is full: "
                "whole models cannot share one pass, use auto or 1"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the settings as nested tables, with unset ones left out."""
    tables = dataclasses.asdict(config)
    tables["client"]["clip_norm"] = config.client.clip_norm or 0.0  # left out it would be its default
    return without_none(tables)


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """Return the settings of nested tables, as `to_dict` makes them.

    Raises:
        SettingsError: if one is out of bounds.
        TypeError: if one is unknown, or a table is none.
    """
    sections = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    made = {
        name: value if sections.get(name) in (None, dataclasses.MISSING) else sections[name](**value)  # pyright: ignore
        for name, value in settings.items()
    }
    return RunConfig(**made)


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables without what is unset: TOML has no null."""
    kept = {key: without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None}
