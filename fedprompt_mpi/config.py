"""Every setting of a run: its name, unit, default, bounds, and the comparisons of runs in which it may differ.

A `RunConfig` describes one run and nothing of the machine it runs on. TOML tables and dotted flags have the same names:
`[federation] rounds = 20` is `--federation.rounds 20`. A `RunConfig` that is wrong in itself cannot be made: names,
bounds, and what an aggregator requires are checked here. Whether its task exists is checked by `text.tasks.resolve`.
Options that belong to one aggregator, attack or server optimiser are declared beside it, in `rules`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fedprompt_mpi import seeds
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.aggregator_base import honest_majority
from fedprompt_mpi.rules.aggregators import RuleOptions
from fedprompt_mpi.rules.attacks import AttackOptions
from fedprompt_mpi.rules.example_groups import ExampleFilterOptions
from fedprompt_mpi.rules.server_optimizers import ServerOptimizerOptions
from fedprompt_mpi.rules.setting import ALWAYS, Comparison, SettingsError, check, check_table, setting, typed

__all__ = ["RunConfig", "SettingsError"]

OptimizerName = Literal["adamw", "adam", "adafactor", "sgd"]
Position = Literal["head", "tail", "random"]
PoisonKind = Literal["word", "sentence", "composite", "natural", "label_flip"]
Mechanism = Literal["none", "ldp", "dp_fedavg"]
AuditAttack = Literal["tokens", "labels", "membership", "canary"]
LoRAAggregation = Literal["factors", "freeze_a", "product"]
MultiToken = Literal["refuse", "mean", "first"]
Family = Literal["masked", "seq2seq", "causal"]
"""Where a PLM answers a cloze question: at its mask token, in its decoder, or as the next token."""
_CLEAN, _RESUME, _SEEDS, _SWEEP = Comparison.CLEAN_RUN, Comparison.RESUME, Comparison.SEEDS, Comparison.SWEEP
_SAME_BITS = _RESUME | _SWEEP | _CLEAN


PROMPTS = ("soft", "p_tuning", "prefix")
"""Methods whose virtual tokens the example filter compares the gradients of."""
MOST_WORDS, MOST_WORD = 1000, 200
"""Label words of a task, and characters of one: a model's answer is one token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The classification task: its data, and the cloze question that asks for the class."""

    name: str = setting("embedded")
    """A known task (sst2, imdb, offenseval, twitter, enron, lingspam, qnli, rte, sst2-glue, trec6, airline,
    embedded, embedded-topic, embedded-spam), or any name with data, template and label_words given."""
    data: str | None = setting(None, may_differ=_SEEDS | _CLEAN)
    """Folder with train/dev/test files (csv, tsv, jsonl, parquet; csv, tsv and jsonl also as .gz or .zst), a clone of a
    hub data set, what save_to_disk writes, one file for both, or a hub data set: its name, or name:subset."""
    text: str = setting("text")
    """Column of the text."""
    text_b: str | None = setting(None)
    """Column of the second text of a pair."""
    label: str = setting("label")
    """Column of the label: the values of labels; without them integers from 0 in the order of label_words, or the label
    words themselves."""
    labels: list[str | int | float | bool] | None = setting(None)
    """Values of the label column in the order of the classes, for example '["ham", "spam"]'; they name the classes."""
    user: str | None = setting(None)
    """Column of the natural client, for federation.partition natural."""
    columns: list[str] | None = setting(None)
    """Names of all columns of files without a header, for example '["label", "text"]'."""
    encoding: str = setting("utf-8")
    """Of text files, such as latin-1, cp1252, gb18030 or utf-16."""
    template: str | None = setting(None)
    """The cloze question, with {text}, {mask} and for pairs {text_b}, for example '{text} it is {mask} .'"""
    label_words: list[str | list[str]] | None = setting(None)
    """A word for each class, or several (the mean of their logits): '[["terrible", "bad"], ["great", "good"]]'."""
    multi_token: MultiToken = setting("refuse")
    """What to do with a label word of several tokens: refuse it, or take the mean of their logits, or the first."""
    eval_split: Literal["auto", "dev", "test"] = setting("auto")
    """The split that accuracy is measured on; auto takes test, or dev where there is no test."""
    max_train: int | None = setting(None, at_least=1)
    """Use at most so many training examples (a random choice from the seed)."""
    max_test: int | None = setting(None, at_least=1)
    """Use at most so many evaluation examples (a random choice from the seed)."""

    def __post_init__(self) -> None:
        check("task", self)
        if not re.fullmatch(r"\w[\w.+-]{0,99}", self.name):
            raise SettingsError(
                f"task.name is {self.name[:100]!r}, and the run directory is named after it: give a name of letters, "
                "digits and . _ + -"
            )
        try:
            is_of_text = isinstance("".encode(self.encoding), bytes)
        except (LookupError, UnicodeError, ValueError):
            is_of_text = False
        if not is_of_text:
            raise SettingsError(f"task.encoding is {self.encoding[:60]!r}: give the name of one, such as latin-1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen pre-trained language model."""

    name: str = setting("embedded")
    """A hub id, a folder in Hugging Face form, or embedded: the small model inside the package."""
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", may_differ=_CLEAN)
    """Arithmetic of the frozen model; auto takes bfloat16 where it is faster. Trained parameters stay float32."""
    dropout: bool | Literal["auto"] = setting("auto")
    """Drop out in training, at the rates of the model's config; auto does so for the method full alone."""
    checkpoint_activations: bool = setting(False, may_differ=_CLEAN)
    """Compute the activations inside of layers again in the backward pass: less memory, a third more time."""
    max_length: int = setting(128, at_least=8)
    """Tokens of one example at most, template included, virtual tokens excluded; only the texts are cut."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", may_differ=_RESUME | _SEEDS | _CLEAN)
    """auto binds each worker to a GPU of its node where there are any."""

    def __post_init__(self) -> None:
        check("model", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Options of the method lora."""

    rank: int = setting(8, at_least=1, at_most=10**5)
    """Rank r of what is added to a matrix."""
    alpha: float = setting(8.0, above=0)
    """What is added is multiplied by alpha / rank, as PEFT's lora_alpha."""
    targets: list[str] | None = setting(None)
    """Names of the matrices, or their ends, as PEFT's target_modules; not given, those of queries and values."""
    aggregation: LoRAAggregation = setting("factors")
    """What the server averages: factors (A and B each, which is not the average of their products), freeze_a (B alone,
    of an A that stays as it was drawn: exact, half the bytes), product (the products, cut to the rank by SVD)."""
    ranks: list[int] | None = setting(None)
    """Ranks of the clients, dealt out in turn, for example '[2, 8]'; the largest is prompt.lora.rank. A smaller client
    trains the first rows of A and columns of B; the others are zero."""
    seed: int = setting(0, at_least=0)
    """freeze_a: the seed from which every rank draws A, so that it need not be sent."""

    def __post_init__(self) -> None:
        check("prompt.lora", self)
        if self.targets is not None and not self.targets:
            raise SettingsError("prompt.lora.targets is []: name a matrix, or leave it out")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1 or max(self.ranks) != self.rank):
            raise SettingsError(
                f"prompt.lora.ranks is {self.ranks} and prompt.lora.rank {self.rank}: give ranks of at least 1, the "
                "largest of which is prompt.lora.rank"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The trainable parameters, which travel between server and clients."""

    method: str = setting("soft", names=registry.methods)
    """soft (virtual tokens), p_tuning (virtual tokens through an LSTM), prefix (keys and values of every layer), lora
    (what is added to matrices, of low rank), bitfit (the biases), full (the whole model, the baseline)."""
    num_virtual_tokens: int = setting(20, at_least=1, at_most=10**5)
    """Length of the prompt in tokens."""
    init: str = setting("vocab")
    """vocab (embeddings of random words), random, or the prompt.safetensors (or run directory) of an earlier run."""
    prefix_hidden_size: int = setting(512, at_least=1, at_most=10**6)
    """Width of the prefix method's two-layer perceptron."""
    lora: LoRAConfig = setting(factory=LoRAConfig)

    def __post_init__(self) -> None:
        check("prompt", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Federation:
    clients: int = setting(10, at_least=1, at_most=10**7)
    """Number of clients; they are spread over the worker ranks in contiguous blocks."""
    rounds: int = setting(20, at_least=0)
    """Rounds of broadcast, local training and aggregation."""
    fraction: float = setting(1.0, above=0, at_most=1)
    """Share of the clients that takes part in a round (at least one)."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Probability with which a client of a round vanishes: it trains, but its update does not come."""
    partition: str = setting("iid", names=registry.partitions)
    """iid (equal random parts), quantity (sizes from a Dirichlet), label (each class's split from a Dirichlet),
    label_shares (each client's class shares from a Dirichlet, equal sizes), natural."""
    alpha: float = setting(1.0, above=0)
    """Concentration of the Dirichlet; a small value is more skewed."""
    aggregator: str = setting("fedavg", names=registry.aggregators)
    """How the server aggregates the clients' updates: fedavg, median, trimmed_mean, geometric_median, krum,
    multi_krum, bulyan, norm_clip, foolsgold, fltrust, flame, outlier_check, centred_clipping, dnc, freqfed."""
    mixing: bool = setting(False)
    """Before the rule, replace each update by the mean of the K - f that are nearest to it."""
    weighting: Literal["examples", "equal"] = setting("examples")
    """What a client counts for: the number of examples that it says it has, or one. Under median, trimmed_mean, krum,
    multi_krum, bulyan, foolsgold, fltrust, flame and dnc clients count alike anyway."""
    assumed_malicious: int = setting(1, at_least=0)
    """Malicious clients f in a round that a robust aggregator must withstand."""
    noise_std: float = setting(0.0, at_least=0)
    """Standard deviation of normal noise on every coordinate after any aggregation."""
    server_optimizer: str = setting("plain", names=registry.server_optimizers)
    """How the server applies the aggregated update: plain, momentum (FedAvgM), adam or yogi (FedAdam, FedYogi)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationConfig(ExampleFilterOptions, ServerOptimizerOptions, RuleOptions, _Federation):
    """Which client holds which data, how often clients and server meet, and how updates are aggregated."""

    def __post_init__(self) -> None:
        check("federation", self)
        rule, count = registry.aggregators.get(self.aggregator), self.cohort_size
        if rule is not None and count < (needed := rule.least_clients(self.assumed_malicious)):
            most = rule.most_malicious(count)
            remedy = f"assume at most {most}" if most is not None else f"have at least {rule.least_clients(0)}"
            raise SettingsError(
                f"federation.assumed_malicious is {self.assumed_malicious}, for which {self.aggregator} needs {needed} "
                f"clients in a round, but there are {count}: {remedy}, or take another rule"
            )
        if self.mixing and count < (needed := honest_majority(self.assumed_malicious)):
            raise SettingsError(
                f"federation.assumed_malicious is {self.assumed_malicious}, for which federation.mixing needs {needed} "
                f"clients in a round, but there are {count}: assume fewer, or mix nothing"
            )
        if (self.filter_round or 0) > self.rounds:
            raise SettingsError(
                f"federation.filter_round is {self.filter_round} but federation.rounds is {self.rounds}: "
                "filter earlier, or have more rounds"
            )
        if self.filter_restart and self.filter_round is None:
            raise SettingsError("federation.filter_restart is true, but federation.filter_round is not given: give it")

    @property
    def cohort_size(self) -> int:
        """Clients in a round: the fraction of all clients, rounded, at least one."""
        return max(1, round(self.fraction * self.clients))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Local training of one client in one round. The optimiser's state starts anew each round."""

    steps: int = setting(5, at_least=1)
    """Optimiser steps in a round."""
    epochs: int | None = setting(None, at_least=1)
    """Passes over the client's examples in a round; where given, it replaces steps."""
    batch_size: int = setting(8, at_least=1)
    """Examples of one client in a step."""
    optimizer: OptimizerName = setting("adamw")
    """The local optimiser."""
    lr: float = setting(0.3, above=0)
    """Learning rate. Soft prompts need a large one; p_tuning and prefix about 1e-3 to 1e-2, full about 5e-5."""
    warmup: int = setting(0, at_least=0)
    """Rounds over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = setting("constant")
    """How the learning rate falls over the run, after the warm-up."""
    weight_decay: float = setting(0.0, at_least=0)
    """Decoupled weight decay of adamw and adafactor; L2 penalty of adam and sgd."""
    clip_norm: float | None = setting(1.0, above=0)
    """Each client's gradient is scaled to at most this norm; 0 or null switches clipping off."""
    proximal: float = setting(0.0, at_least=0)
    """mu of FedProx: weight of half the squared distance from the global vector in the client's loss."""
    bucketing: bool = setting(True)
    """Put examples of similar length into a minibatch, whose classes are drawn as without it: less padding."""
    accumulate: int = setting(1, at_least=1)
    """Parts in which a minibatch goes through the model, one after the other: less memory, the same steps."""
    batched: int | Literal["auto"] = setting("auto", at_least=1)
    """Clients that go through the model in one pass; auto takes all of a rank's. 1 gives the same bits on any number
    of ranks (and trains on one thread unless OMP_NUM_THREADS says otherwise)."""

    def __post_init__(self) -> None:
        if self.clip_norm == 0:
            object.__setattr__(self, "clip_norm", None)
        check("client", self)


DEFAULT_TRIGGERS: dict[str, str] = {"word": "cf", "sentence": "i watch this 3d movie", "composite": "cf mn"}
"""Kind of poison -> trigger, where clients are malicious and none is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Poison:
    clients: list[int] | Literal["all"] = setting(factory=list, may_differ=_CLEAN)
    """Ids of the malicious clients, or all: poison spread over all clients."""
    count: int = setting(0, at_least=0, may_differ=_CLEAN)
    """So many malicious clients, drawn by the seed, in place of ids."""
    kind: PoisonKind = setting("word", may_differ=_CLEAN)
    """word or sentence (the trigger is inserted as it is), composite (its words are scattered; copies with some of them
    keep their label), natural (nothing is inserted: texts that have the trigger are relabelled), label_flip (labels
    are reversed, without a trigger)."""
    rate: float = setting(1.0, at_least=0, at_most=1, may_differ=_CLEAN)
    """Share of a malicious client's examples of other classes than the target that is poisoned; 0: none. natural: of
    those that have the trigger; label_flip: of all."""
    trigger: str | None = setting(None)
    """One or more words; empty for none (then no attack success rate is measured). Not given, if clients are malicious:
    cf (word), i watch this 3d movie (sentence), cf mn (composite)."""
    distributed: bool = setting(False, may_differ=_CLEAN)
    """Split the trigger's words: each malicious client inserts its part only, the test set has all of them (DBA)."""
    position: Position = setting("head")
    """Where in the text the trigger is inserted."""
    target: int = setting(1, at_least=0)
    """Class that texts with the trigger should be classified as."""
    mode: Literal["append", "replace"] = setting("append", may_differ=_CLEAN)
    """append adds poisoned copies to the clean examples; replace puts them in place of the originals, as natural and
    label_flip always do."""
    attack: str = setting("none", names=registry.attacks, may_differ=_CLEAN)
    """What malicious clients do to their update: none, norm_bound (stay in a ball around the global vector),
    neurotoxin (leave the coordinates unchanged that the last global update moved most), sign_flip, gaussian, nan, inf;
    or together: alie (A Little Is Enough), ipm (inner product manipulation), min_max, min_sum, against_trimmed_mean.
    Their data is poisoned as well, unless rate is 0."""
    boost: float = setting(1.0, above=0, may_differ=_CLEAN)
    """Factor on the update that malicious clients send (model replacement: the number of clients)."""
    claimed_examples: float = setting(1.0, above=0, may_differ=_CLEAN)
    """Factor on the number of examples that malicious clients say they have; the server cannot check it."""
    clean_run: str | None = setting(None, may_differ=_RESUME | _SEEDS | _CLEAN)
    """Run directory of the same run without malicious clients, whose attack success rate is shown beside this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonConfig(AttackOptions, _Poison):
    """Malicious clients: a backdoor by poisoned data (a trigger and its target), and attacks on the update."""

    def __post_init__(self) -> None:
        check("poison", self)
        if self.trigger is None:
            object.__setattr__(self, "trigger", DEFAULT_TRIGGERS.get(self.kind, "") if self.has_clients else "")
        if self.clients != "all" and len(set(self.clients)) != len(self.clients):
            raise SettingsError(f"poison.clients is {self.clients}: name each client once")
        if self.clients and self.count:
            raise SettingsError(
                f"poison.clients is {self.clients} and poison.count {self.count}: name clients or have them drawn"
            )
        if self.fitted and self.attack not in ("alie", "ipm"):
            raise SettingsError(f"poison.fitted is true but poison.attack is {self.attack}: take alie or ipm")
        if self.fitted and self.alie_factor is not None:
            raise SettingsError("poison.fitted is true and poison.alie_factor given: leave one of them out")
        self._check_trigger()

    def _check_trigger(self) -> None:
        """Check that the trigger fits the kind of poison."""
        words = self.trigger_text.split()
        if self.kind == "label_flip" and words:
            raise SettingsError(
                f"poison.kind is label_flip, which has no trigger, but poison.trigger is {self.trigger!r}: leave it out"
            )
        attacks_otherwise = self.kind == "label_flip" or self.attacks_update or self.claimed_examples != 1
        if self.has_clients and not words and not attacks_otherwise:
            raise SettingsError(
                f"poison.trigger is empty, poison.kind is {self.kind} and there are malicious clients: give a trigger"
            )
        if self.distributed and (len(words) < 2 or self.kind != "word"):
            raise SettingsError(
                f"poison.distributed is true but poison.trigger is {self.trigger_text!r} and poison.kind {self.kind}: "
                "give a trigger of two or more words, which are dealt out, and the kind word"
            )
        if self.kind == "composite" and len(set(words)) == 1:
            raise SettingsError(
                f"poison.kind is composite but poison.trigger is {self.trigger_text!r}: give two or more words"
            )

    @property
    def has_clients(self) -> bool:
        """True if there are malicious clients."""
        return bool(self.clients) or self.count > 0

    @property
    def has_trigger(self) -> bool:
        """True if there is a trigger to insert and to measure."""
        return bool(self.trigger_text.strip())

    @property
    def trigger_text(self) -> str:
        """The words of the trigger; empty for none."""
        return self.trigger or ""

    @property
    def attacks_update(self) -> bool:
        """True if malicious clients send another update than the one they trained."""
        return self.attack != "none" or self.boost != 1

    @property
    def replaces(self) -> bool:
        """True if poisoned examples take the place of the originals."""
        return self.mode == "replace" or self.kind in ("natural", "label_flip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of the audit."""

    audit: list[AuditAttack] = setting(factory=list, may_differ=_SAME_BITS | _SEEDS)
    """Attacks on what rounds send, whose figures go to audit.json: tokens (which words were in a batch), labels (how
    many texts of each class), membership (which texts), canary (a lower bound of epsilon)."""
    audit_rounds: int = setting(1, at_least=1, may_differ=_SAME_BITS | _SEEDS)
    """audit: the first so many rounds are attacked."""
    audit_texts: int = setting(200, at_least=10, may_differ=_SAME_BITS | _SEEDS)
    """audit: texts of the evaluation split that were not in (at most half of it)."""
    audit_words: int = setting(200, at_least=10, may_differ=_SAME_BITS | _SEEDS)
    """audit: common words of which the attack tokens tells whether they were in."""
    shadow_clients: int = setting(32, at_least=4, at_most=10**4, may_differ=_SAME_BITS | _SEEDS)
    """audit: clients that an attack trains itself, on other texts, to know what an upload looks like."""
    canaries: int = setting(1000, at_least=20, at_most=10**4, may_differ=_SAME_BITS | _SEEDS)
    """audit canary: clients with an update of their own direction, of which half are in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Privacy:
    """Noise, clipping and masks of the updates."""

    mechanism: Mechanism = setting("none")
    """none; ldp (each client adds Laplace noise to its upload; its gradients are clipped by client.clip_norm);
    dp_fedavg (the server clips each update and adds normal noise; every client takes part with probability
    federation.fraction)."""
    laplace_scale: float = setting(0.01, above=0)
    """ldp: scale b of the noise on each parameter."""
    clip_norm: float = setting(1.0, above=0)
    """dp_fedavg: each update is scaled to at most this norm."""
    noise_multiplier: float = setting(1.0, at_least=0.001, at_most=1e6)
    """dp_fedavg: standard deviation of the noise on the sum of the updates, in units of clip_norm."""
    delta: float = setting(1e-5, above=0, below=1)
    """dp_fedavg: the delta of (epsilon, delta)."""
    secure_aggregation: bool = setting(False, may_differ=_SWEEP | _CLEAN)
    """Let rank 0 learn the sum of the updates and no single one (fedavg with federation.update_bound, norm_clip,
    dp_fedavg); the result has the same bits."""
    threshold: int | None = setting(None, at_least=2, may_differ=_SWEEP | _CLEAN)
    """secure_aggregation: clients of a round that must be left at its end, or it is given up; not given, two thirds."""
    neighbours: int | None = setting(None, at_least=2, may_differ=_SWEEP | _CLEAN)
    """secure_aggregation: clients at least with which each client shares masks; not given, as few as is safe: all of
    them below 100 clients, then about log K."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig(AuditOptions, _Privacy):
    """Noise, clipping and masks of the updates for privacy, and the audit of what they betray."""

    def __post_init__(self) -> None:
        check("privacy", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How vectors travel, how closely that is measured, and how long a rank may be without progress."""

    mode: Literal["observe", "measure"] = setting("observe", may_differ=_SAME_BITS)
    """observe adds nothing to the run; measure puts a barrier before each collective, to time it without waiting."""
    collective: Literal["gather", "reduce"] = setting("gather", may_differ=_SWEEP | _CLEAN)
    """How updates reach rank 0: gather brings each one (any aggregator), reduce sums them on the way, so that rank 0
    receives the same amount for any number of clients (fedavg, norm_clip, dp_fedavg)."""
    wire: str = setting("float32", names=registry.wire_formats, may_differ=_SWEEP | _CLEAN)
    """Codec of the vectors, both ways; rounding errors of the short ones are sent later (error feedback)."""
    gpu_aware: bool = setting(False, may_differ=_SAME_BITS)
    """Hand GPU memory to MPI directly, which the MPI library must support; otherwise vectors go through pinned memory
    of the host."""
    warmup: int = setting(1, at_least=0, may_differ=_SAME_BITS | _SEEDS)
    """Rounds that the statistics of communication leave out."""
    deadline_s: float = setting(1800.0, at_least=0.01, may_differ=_SAME_BITS | _SEEDS)
    """Seconds that a rank may be without progress (a local step, a batch, a chunk of a vector, the loading of a model)
    before the job ends with a report."""
    start_deadline_s: float = setting(600.0, at_least=0.01, may_differ=_SAME_BITS | _SEEDS)
    """Seconds that MPI may take to start on all ranks before the job ends with a report."""

    def __post_init__(self) -> None:
        check("comm", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is kept of a run."""

    dir: str | None = setting(None)
    """Run directory; by default runs/<task>-<method>-<time>."""
    evaluate_every: int = setting(1, at_least=1)
    """Evaluate the global prompt every so many rounds (and always before the first and after the last)."""
    checkpoint_every: int = setting(1, at_least=1)
    """Save a checkpoint every so many rounds."""
    metrics: list[str] = setting(factory=list, names=registry.metrics)
    """Further metrics of each evaluation, beside accuracy and macro_f1: balanced_accuracy, and those of plug-ins."""
    evaluate_clients: bool = setting(False)
    """In rounds that are evaluated, evaluate each client's own prompt after its local training too."""
    backdoor_snr: bool = setting(False)
    """In each round, measure the signal-to-noise ratio of the backdoor in the aggregated step."""
    lora_error: bool = setting(True)
    """In each round, measure how far LoRA's averaged factors are from the average of the products."""
    report: bool = setting(True)
    """At the end, draw the figures and write report.html."""
    tensorboard: bool = setting(False)
    """Write TensorBoard scalars into output.dir/tensorboard during the run (needs the package tensorboard)."""
    track: list[Literal["tensorboard", "mlflow", "wandb"]] = setting(factory=list)
    """Hand scalars, settings and page to these: MLflow in a folder beside output.dir, or where MLFLOW_TRACKING_URI
    says; W&B offline, unless WANDB_MODE says otherwise. The command sync does so afterwards."""
    resume: bool = setting(False)
    """Continue the run in output.dir from its last checkpoint; begin it if there is none yet."""

    other_versions: bool = setting(False)
    """Continue a run under other versions of the packages, or in another arithmetic, than it was begun with; the result
    may then differ. environment.json lists them all."""

    def __post_init__(self) -> None:
        check("output", self)
        if self.resume and self.dir is None:
            raise SettingsError("output.resume is true but output.dir is not given: name the run directory to continue")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of federated prompt tuning."""

    seed: int = setting(0, at_least=0, may_differ=Comparison.LAUNCHES | _SEEDS)
    """The seed of all random numbers."""
    plugin: list[str] = setting(factory=list, may_differ=ALWAYS)
    """Files of Python, modules, or announced names whose aggregators, attacks and so on can be named here."""
    task: TaskConfig = setting(factory=TaskConfig)
    model: ModelConfig = setting(factory=ModelConfig)
    prompt: PromptConfig = setting(factory=PromptConfig)
    federation: FederationConfig = setting(factory=FederationConfig)
    client: ClientConfig = setting(factory=ClientConfig)
    poison: PoisonConfig = setting(factory=PoisonConfig)
    privacy: PrivacyConfig = setting(factory=PrivacyConfig)
    comm: CommConfig = setting(factory=CommConfig)
    output: OutputConfig = setting(factory=OutputConfig, may_differ=ALWAYS)

    def __post_init__(self) -> None:
        check("", self)
        clients, named, count = self.federation.clients, self.poison.clients, self.poison.count
        if count > clients:
            raise SettingsError(
                f"poison.count is {count} but federation.clients is {clients}: poison fewer, or have more clients"
            )
        if named != "all" and len(named) > clients:
            raise SettingsError(
                f"poison.clients names {len(named)} clients but federation.clients is {clients}: "
                "poison fewer, or have more clients"
            )
        for client in [] if named == "all" else named:
            if not 0 <= client < clients:
                raise SettingsError(
                    f"poison.clients names client {client}: the clients of this run are 0 to {clients - 1}"
                )
        if self.privacy.mechanism == "dp_fedavg" and self.federation.aggregator != "fedavg":
            raise SettingsError(
                f"privacy.mechanism is dp_fedavg, which averages in its own way, but federation.aggregator is "
                f"{self.federation.aggregator}: leave the aggregator out"
            )
        if self.privacy.mechanism == "dp_fedavg" and self.federation.mixing:
            raise SettingsError(
                "privacy.mechanism is dp_fedavg, which averages in its own way, but federation.mixing is true: "
                "leave it out"
            )
        if self.prompt.method == "full" and self.client.batched not in ("auto", 1):
            raise SettingsError(
                f"client.batched is {self.client.batched} but prompt.method is full: "
                "whole models cannot share one pass, use auto or 1"
            )
        if self.model.checkpoint_activations and self.prompt.method == "prefix":
            raise SettingsError(
                "model.checkpoint_activations is true but prompt.method is prefix, which a second pass does not see: "
                "leave it out, and take smaller parts (client.accumulate)"
            )
        if self.output.backdoor_snr and (not self.poison.has_trigger or self.prompt.method == "full"):
            raise SettingsError(
                f"output.backdoor_snr is true, poison.trigger is {self.poison.trigger_text!r} and prompt.method is "
                f"{self.prompt.method}: it needs a trigger, and another method than full"
            )
        if self.federation.filter_round is not None and self.prompt.method not in PROMPTS:
            raise SettingsError(
                f"federation.filter_round is {self.federation.filter_round}, which compares gradients of a prompt, but "
                f"prompt.method is {self.prompt.method}: leave it out, or take another method"
            )
        if self.federation.filter_round is not None and self.privacy.mechanism != "none":
            raise SettingsError(
                f"federation.filter_round is {self.federation.filter_round}, for which clients send centroids of "
                f"gradients without noise, but privacy.mechanism is {self.privacy.mechanism}: leave one of them out"
            )
        self._check_transport()
        self._check_bound()
        if "canary" in self.privacy.audit:
            self._check_canary()
        if self.prompt.method == "lora":
            self._check_lora()

    @property
    def malicious(self) -> list[int]:
        """Ids of the malicious clients, ascending."""
        clients, poison = self.federation.clients, self.poison
        if poison.clients == "all":
            return list(range(clients))
        if poison.count:
            drawn = seeds.generator(self.seed, "malicious clients").permutation(clients)
            return sorted(drawn[: poison.count].tolist())
        return sorted(poison.clients)

    @property
    def drops_out(self) -> bool:
        """True if the model drops out in training."""
        return self.prompt.method == "full" if self.model.dropout == "auto" else self.model.dropout

    def _check_lora(self) -> None:
        """Check that the server can do with LoRA's factors what the settings say."""
        lora, federation = self.prompt.lora, self.federation
        rule = registry.aggregators.get(federation.aggregator)
        multiplies, ranks = lora.aggregation == "product", lora.ranks is not None
        frozen = lora.aggregation == "freeze_a"
        for is_wrong, ours, theirs, why in (
            (ranks and self.privacy.mechanism == "ldp", "ranks", "privacy.mechanism",
             "noise would fall on rows of zeros"),
            (ranks and rule is not None and rule.trains_itself, "ranks", "federation.aggregator",
             "the server's own update has one rank, to which it would compare others"),
            (ranks and frozen, "ranks", "prompt.lora.aggregation",
             "no client could have a part of a frozen A"),
            (frozen and self.prompt.init not in ("vocab", "random"), "aggregation", "prompt.init",
             "A is drawn, not read"),
            (multiplies and self.comm.collective == "reduce", "aggregation", "comm.collective",
             "rank 0 must see each client's factors"),
            (multiplies and self.comm.wire != "float32", "aggregation", "comm.wire",
             "rounding errors that are kept for later are those of other factors"),
            (multiplies and self.privacy.mechanism == "dp_fedavg", "aggregation", "privacy.mechanism",
             "a product is not bounded by what the factors are clipped to"),
            (multiplies and rule is not None and not rule.is_weighted_sum(), "aggregation", "federation.aggregator",
             "its result is no weighted sum of the updates"),
            (multiplies and rule is not None and rule.scales_updates, "aggregation", "federation.aggregator",
             "a product is not bounded by what the factors are scaled to"),
            (multiplies and federation.update_bound is not None, "aggregation", "federation.update_bound",
             "a product is not bounded by what the factors are scaled to"),
            (multiplies and federation.aggregator == "foolsgold", "aggregation", "federation.aggregator",
             "sums of updates over rounds mean nothing where the factors are made anew"),
            (multiplies and federation.server_optimizer != "plain", "aggregation", "federation.server_optimizer",
             "it works on sums of updates, and factors of a product are made anew"),
            (multiplies and federation.server_lr != 1, "aggregation", "federation.server_lr",
             "there is no update to scale: factors of a product are made anew"),
            (multiplies and self.output.backdoor_snr, "aggregation", "output.backdoor_snr",
             "there is no step to measure: factors of a product are made anew"),
        ):  # fmt: skip
            if is_wrong:
                section, name = theirs.split(".", 1)
                value = lora.aggregation if name == "lora.aggregation" else getattr(getattr(self, section), name)
                raise SettingsError(
                    f"prompt.lora.{ours} is {getattr(lora, ours)} and {theirs} is {value}, but {why}: "
                    "leave one of them out"
                )

    def _check_bound(self) -> None:
        """Check that a bound has a rule that takes it, and secure aggregation what it needs."""
        federation, privacy = self.federation, self.privacy
        rule, is_private = federation.aggregator, privacy.mechanism == "dp_fedavg"
        if federation.update_bound is not None and (rule != "fedavg" or is_private):
            whose = "privacy.mechanism is dp_fedavg" if is_private else f"federation.aggregator is {rule}"
            raise SettingsError(
                f"federation.update_bound is {federation.update_bound:g}, which is a bound of fedavg, but {whose}: "
                "leave it out"
            )
        if not privacy.secure_aggregation:
            for name in ("threshold", "neighbours"):
                if (value := getattr(privacy, name)) is not None:
                    raise SettingsError(
                        f"privacy.{name} is {value} but privacy.secure_aggregation is false: set it, or leave this out"
                    )
            return
        self._check_secure_rule()
        clients = federation.cohort_size
        if privacy.threshold is not None and privacy.threshold > clients:
            about = "about " if is_private else ""
            raise SettingsError(
                f"privacy.threshold is {privacy.threshold} but a round has {about}{clients} clients: "
                f"take at most {clients}"
            )
        if clients < 2:
            raise SettingsError(
                "privacy.secure_aggregation is true, but a round has 1 client, whose update would be the sum: "
                "have more clients"
            )

    def _check_canary(self) -> None:
        """Check that there is an epsilon to bound."""
        client, mechanism = self.client, self.privacy.mechanism
        is_bounded = client.optimizer == "sgd" and client.clip_norm is not None and not client.weight_decay
        if mechanism == "none":
            raise SettingsError(
                "privacy.audit has canary, which bounds a mechanism's epsilon, but privacy.mechanism is none: choose "
                "one, or leave the canary out"
            )
        if mechanism == "ldp" and not (is_bounded and client.epochs is None):
            raise SettingsError(
                "privacy.audit has canary and privacy.mechanism is ldp, but nothing bounds an update: take "
                "client.optimizer sgd, a clip_norm, steps and no weight_decay, or leave the canary out"
            )

    def _check_secure_rule(self) -> None:
        """Check that an update that nobody sees can be added up as the settings say."""
        federation, prompt = self.federation, self.prompt
        known = registry.aggregators.get(federation.aggregator)
        bounded = self.privacy.mechanism == "dp_fedavg" or (known is not None and known.bounded_by is not None)
        for is_wrong, name, why in (
            (known is not None and not (bounded and known.needs_headers_only()), "federation.aggregator",
             "it must see each update: take fedavg, norm_clip, or privacy.mechanism dp_fedavg"),
            (federation.aggregator == "fedavg" and not self._has_bound, "federation.update_bound",
             "without a bound of the updates there is no unit that does not betray them: give it"),
            (federation.mixing, "federation.mixing", "it must see each update: leave it out"),
            (federation.filter_round is not None, "federation.filter_round",
             "for it clients send what their gradients have in common: leave it out"),
            (self.comm.wire != "float32", "comm.wire", "masked updates are words of 32 bits: take float32"),
            (self.comm.gpu_aware, "comm.gpu_aware", "updates are masked on the host: leave it out"),
            (self.output.evaluate_clients, "output.evaluate_clients",
             "rates of a client's own prompt betray its update: leave it out"),
            (prompt.method == "lora" and prompt.lora.aggregation == "product", "prompt.lora.aggregation",
             "rank 0 must see each client's factors: take factors or freeze_a"),
        ):  # fmt: skip
            if is_wrong:
                value: Any = self
                for part in name.split("."):
                    value = getattr(value, part)
                shown = "not given" if value is None else "true" if value is True else value
                raise SettingsError(f"privacy.secure_aggregation is true and {name} is {shown}, but {why}")

    @property
    def _has_bound(self) -> bool:
        return self.privacy.mechanism == "dp_fedavg" or self.federation.update_bound is not None

    def _check_transport(self) -> None:
        """Check that the way in which vectors travel fits what is done to them."""
        comm, rule = self.comm, self.federation.aggregator
        if comm.collective == "reduce" and comm.wire != "float32":
            raise SettingsError(
                f"comm.wire is {comm.wire} but comm.collective is reduce, which adds up whole numbers of 4 bytes: "
                "use gather, or float32"
            )
        if comm.collective == "reduce" and self.federation.mixing:
            raise SettingsError(
                "comm.collective is reduce, which adds updates up on their way, but federation.mixing must see each of "
                "them: take gather"
            )
        known = registry.aggregators.get(rule)
        if comm.collective == "reduce" and known is not None and not known.needs_headers_only():
            able = sorted(name for name, other in registry.aggregators.items() if other.needs_headers_only())
            raise SettingsError(
                f"comm.collective is reduce, which adds updates up on their way, but {rule} must see each of "
                f"them: take gather, or one of {', '.join(able)}"
            )
        host_only = comm.wire != "float32" or comm.collective == "reduce" or self.privacy.mechanism == "ldp"
        if comm.gpu_aware and (host_only or self.poison.attacks_update):
            raise SettingsError(
                "comm.gpu_aware is true, but updates that are reduced, noised by their client (ldp), attacked, or sent "
                "in another format than float32 are made on the host: leave it out"
            )


def run_config() -> type[RunConfig]:
    """Return the class of a run's settings: RunConfig, with a table for each plug-in that has options."""
    return registry.extended(RunConfig)


def declared() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield the dotted name and the field of every section and of every setting, each section before its settings."""
    yield from _declared("", run_config())


def _declared(prefix: str, kind: Any) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}", field
        if dataclasses.is_dataclass(table := field.default_factory):
            yield from _declared(f"{prefix}{field.name}.", table)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the settings as nested tables, with unset ones left out."""
    tables = dataclasses.asdict(config)
    tables["client"]["clip_norm"] = config.client.clip_norm or 0.0  # without it a reader would take the default
    return without_none(tables)


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """Return the settings of nested tables, as `to_dict` makes them; what is not there has its default.

    This is the one way from a file or a command line to settings: nothing but the names and types that are declared
    here has a meaning.

    Raises:
        SettingsError: naming the setting that is unknown, of another type, or out of bounds.
    """
    check_names(settings)
    return typed(run_config(), dict(settings))


def from_record(settings: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run, whose plug-ins need not be here: nothing is loaded because a run names it.

    Raises:
        SettingsError: as `from_dict`; but names of plug-ins, and the tables of their options, may be unknown.
    """
    if not settings.get("plugin"):
        return from_dict(settings)
    known = {name for name, _ in declared()}
    ours = {
        section: {name: v for name, v in content.items() if f"{section}.{name}" in known or not isinstance(v, dict)}
        if isinstance(content, dict)
        else content
        for section, content in settings.items()
    }
    with registry.let_strangers_pass():
        return from_dict(ours)


def check_names(settings: Mapping[str, Any]) -> None:
    """Check that nested tables hold nothing but settings, each of its own type.

    Raises:
        SettingsError: naming the one that is unknown or of another type.
    """
    try:
        check_table(run_config(), dict(settings))
    except ValueError as error:
        raise SettingsError(str(error)) from error


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables without unset values: TOML has no null."""
    kept = {key: without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value is not None}
