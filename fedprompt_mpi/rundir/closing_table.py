"""The closing table of a run: what came out, of what, how sure, and what it cost."""

from typing import Any

from fedprompt_mpi.comm.statistics import wilson_interval
from fedprompt_mpi.config import PoisonConfig, RunConfig
from fedprompt_mpi.rundir.filtered import FilterRecord
from fedprompt_mpi.rundir.formats import format_count, format_epsilon, format_rate, format_rows, format_seconds
from fedprompt_mpi.rundir.records import PartitionRecord, Summary

MOST_NAMED = 6
"""Up to so many clients are listed one by one; partition.json has them all."""


def closing_table(summary: Summary, partition: PartitionRecord, figures: dict[str, Any], config: RunConfig) -> str:
    """Return the table.

    Args:
        summary: of the run.
        partition: with the evaluation split.
        figures: the content of communication.json.
        config: the settings.
    """
    rows = [
        *accuracy_rows(summary, partition),
        *attack_rows(summary, partition, config),
        *privacy_rows(summary, config),
        *lora_rows(summary, config),
        ("parameters", f"{summary.parameters:,} of {summary.plm_parameters:,}, {summary.ratio:.4%}"),
        ("a client sends", f"{format_count(summary.bytes_per_client_round)} a round, and receives as much"),
        ("time", f"{summary.seconds_total:.1f} s, of which {summary.seconds_to_first_broadcast or 0:.1f} s until the "
                 "first broadcast"),
        ("a round", format_figures(figures)),
    ]  # fmt: skip
    return format_rows(rows)


def accuracy_rows(summary: Summary, partition: PartitionRecord) -> list[tuple[str, str]]:
    """Return the rows about accuracy: of what it is, its interval, and a warning if it means little."""
    split = partition.evaluation
    count = split.examples if split else 0
    beside = joined(format_interval(summary.accuracy, count), f"before: {format_rate(summary.accuracy_before)}")
    rows = [("accuracy", f"{format_rate(summary.accuracy)}   ({beside})")]
    if split is not None:
        rows.append(("", f"of the {count:,} texts of {split.name}; {majority(partition)}"))
    f1 = f"{summary.macro_f1 or 0:.4f}"
    if summary.macro_f1_before is not None:
        f1 += f"   (before: {summary.macro_f1_before:.4f})"
    rows.append(("macro F1", f1))
    return rows + [("warning", text) for text in warnings(summary, partition)]


def majority(partition: PartitionRecord) -> str:
    """Return what a model gets right that always answers the most frequent class."""
    split = partition.evaluation
    assert split is not None
    return f"always answering “{partition.names[split.majority]}” gives {format_rate(split.majority_share)}"


def warnings(summary: Summary, partition: PartitionRecord) -> list[str]:
    """Return why an accuracy means little: all answers are one class, or it does not beat the most frequent class."""
    found, split = [], partition.evaluation
    answered = [k for k, n in enumerate(summary.answers or []) if n]
    if len(answered) == 1:
        found.append(f"every answer is “{partition.names[answered[0]]}”: the model does not tell the classes apart")
    elif split is not None and summary.accuracy is not None and summary.accuracy <= split.majority_share:
        better = "as" if summary.accuracy == split.majority_share else "more"
        found.append(f"always answering “{partition.names[split.majority]}” would be {better} accurate")
    return found


def format_interval(rate: float | None, count: int) -> str:
    """Return the 95 % interval of a rate of `count` examples; nothing if one of them is not known."""
    if rate is None or not count:
        return ""
    low, high = wilson_interval(rate, count)
    return f"95 % interval {100 * low:.1f} to {100 * high:.1f}"


def joined(*parts: str) -> str:
    """Return the parts that are there, told apart."""
    return "; ".join(filter(None, parts))


def attack_rows(summary: Summary, partition: PartitionRecord, config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows about the attack, if there is one or a trigger is given, and about excluded updates."""
    poison, rows = config.poison, []
    if summary.attack_success_rate is not None:
        rows += _success_rows(summary, partition, config)
    if summary.malicious_clients:
        weight = f"{format_rate(summary.malicious_share)} of the weight" if summary.malicious_share is not None else ""
        named = ", ".join(map(str, summary.malicious_clients[:MOST_NAMED]))
        if summary.poisoned_examples:
            rows.append(("poisoned clients", joined(format_poisoned(summary.poisoned_examples), weight)))
        else:
            rows.append(("malicious clients", joined(f"{named} (none of their examples is poisoned)", weight)))
    local = [
        f"{who} {format_rate(own)}"
        for who, own in (
            ("malicious", summary.malicious_clients_attack_success_rate),
            ("honest", summary.honest_clients_attack_success_rate),
        )
        if own is not None
    ]
    if local:
        rows.append(("ASR of own prompts", f"{', '.join(local)} (means of clients, last round)"))
    if summary.malicious_clients and (kinds := attack_kinds(poison)):
        ids = ", ".join(map(str, summary.malicious_clients))
        rows.append(("attack on the update", f"{', '.join(kinds)}; by client {ids}"))
    if summary.filter_recall is not None or summary.filter_precision is not None:
        rows.append(("example filter", filter_rates(summary.filter_recall, summary.filter_precision)))
    if summary.given_up:
        rows.append(("given up", f"{summary.given_up} of {summary.rounds} rounds, whose sum rank 0 could not learn"))
    if summary.dropped_updates:
        dropped = summary.dropped_updates
        by_client = ", ".join(f"client {client}: {count}" for client, count in dropped.items())
        rows.append(("not finite, left out", f"{sum(dropped.values())} updates ({by_client})"))
    return rows


def filter_words(record: FilterRecord) -> list[str]:
    """Return in parts of a sentence what the example filter did."""
    return [
        f"the example filter leaves out {record.num_left_out:,} of {record.examples:,} examples",
        filter_rates(record.recall, record.precision) or "no example is poisoned",
        f"clients send {format_count(record.bytes_up)} for it",
        *(["the prompt begins again"] if record.restarted else []),
    ]


def filter_rates(recall: float | None, precision: float | None) -> str:
    """Return how well what is left out fits what is poisoned; empty if neither rate is there."""
    named = (("recall", recall), ("precision", precision))
    return ", ".join(f"{name} {format_rate(rate)}" for name, rate in named if rate is not None)


def attack_kinds(poison: PoisonConfig) -> list[str]:
    """Return in words what malicious clients do to what they send."""
    kinds = [] if poison.attack == "none" else [poison.attack]
    kinds += [] if poison.boost == 1 else [f"multiplied by {poison.boost:g}"]
    claimed = poison.claimed_examples
    return kinds + ([] if claimed == 1 else [f"claims {claimed:g} times its examples"])


def poison_words(poison: PoisonConfig, target: str) -> str:
    """Return in words what malicious clients do to their data; empty if nothing.

    Args:
        poison: the settings.
        target: name of the target class.
    """
    if not poison.rate or not (poison.has_trigger or poison.kind == "label_flip"):
        return ""
    much = "all" if poison.rate == 1 else f"{poison.rate:.0%} of the"
    if poison.kind == "label_flip":
        return f"{much} labels are reversed"
    trigger = f"“{poison.trigger_text}”"
    if poison.kind == "natural":
        return f"{much} texts of other classes that have {trigger} get the label “{target}”"
    where = "scattered" if poison.kind == "composite" else poison.position
    return f"{much} texts of other classes get {trigger} ({where}) and the label “{target}”"


def _success_rows(summary: Summary, partition: PartitionRecord, config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows of the attack success rate."""
    poison, clean, split = config.poison, summary.clean_attack_success_rate, partition.evaluation
    interval, beside = format_interval(summary.attack_success_rate, split.triggered if split else 0), ""
    if clean is not None:
        change = 100 * ((summary.attack_success_rate or 0) - clean)
        beside = f"clean run: {format_rate(clean)}, change: {change:+.2f} points"
    elif summary.malicious_clients:
        remedy = "not evaluated after this round" if poison.clean_run else "not known, name one with --poison.clean_run"
        beside = f"clean run: {remedy}"
    rate, shown = format_rate(summary.attack_success_rate), joined(interval, beside)
    rows = [("attack success rate", f"{rate}   ({shown})" if shown else rate)]
    if split is not None:
        target = partition.names[poison.target]
        rows.append(("", f"of {split.triggered:,} texts of other classes with the trigger, answered “{target}”"))
    if summary.flip_rate is not None:
        rows.append(("", f"it turns {format_rate(summary.flip_rate)} of those that are answered rightly without it"))
    return rows


def format_poisoned(examples: dict[str, int]) -> str:
    """Return the poisoned clients and how many examples of each; for many clients the range and the sum."""
    if len(examples) > MOST_NAMED:
        counts = sorted(examples.values())
        return f"{len(counts)}, with {counts[0]} to {counts[-1]} examples each, {sum(counts)} in all"
    return ", ".join(f"{client} ({count} examples)" for client, count in examples.items()) or "none"


def privacy_rows(summary: Summary, config: RunConfig) -> list[tuple[str, str]]:
    """Return the rows about privacy."""
    privacy, epsilon = config.privacy, summary.epsilon
    if privacy.mechanism == "none":
        return []
    if epsilon is not None and privacy.mechanism == "dp_fedavg":
        renyi = f" (Renyi accounting: {summary.epsilon_renyi:,.2f})" if summary.epsilon_renyi is not None else ""
        spent = f"{format_epsilon(epsilon)}, at delta {privacy.delta:g}, for one client more or less{renyi}"
    elif epsilon is not None:
        spent = f"{format_epsilon(epsilon)}, for a client in all rounds"
    else:
        spent = (
            "epsilon cannot be derived: only client.optimizer sgd with steps, clip_norm and no weight decay bounds it"
        )
    return [("privacy", f"{privacy.mechanism}: {spent}")]


def lora_rows(summary: Summary, config: RunConfig) -> list[tuple[str, str]]:
    """Return the row about what the server made of LoRA's factors, if it is not the average of the products."""
    if summary.lora_error is None:
        return []
    what = {"factors": "averaged factors", "product": "products cut to the rank"}[config.prompt.lora.aggregation]
    off = (
        f"{format_rate(summary.lora_error)} of the step away from the weighted sum of the products (mean of the rounds)"
    )
    return [("LoRA", f"{what}: {off}")]


def format_figures(figures: dict[str, Any]) -> str:
    """Return the phases of a median round in words; they are those of its slowest rank, and overlap on others."""
    median = {name: format_seconds(row["median"]) for name, row in figures["seconds"].items()}
    if "train" not in median:
        return "not timed: all rounds belong to the warm-up (comm.warmup)"
    parts = [f"training {median['train']} on the slowest rank"]
    if figures["mode"] == "measure":
        parts += [f"{word} {median[name]}" for name, word in _MEASURED if name in median]
    elif "wait + transfer" in median:
        parts.append(f"waiting and transfer {median['wait + transfer']} together (--comm.mode measure times each)")
    if "aggregate" in median:
        parts.append(f"aggregation {median['aggregate']}")
    return f"medians: {', '.join(parts)}"


_MEASURED = (
    ("wait", "waiting for others"), ("transfer", "transfer"), ("overhead", "synchronisation, for the measuring"),
)  # fmt: skip
