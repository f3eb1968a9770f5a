"""The model card of an exported prompt: with its code alone one gets the run's own predictions."""

import dataclasses
import json
from typing import Any

from fedprompt_mpi.config import Family, RunConfig
from fedprompt_mpi.plm.adapter import TASK_TYPES
from fedprompt_mpi.report.inert import markdown, markdown_code
from fedprompt_mpi.rundir.closing_table import attack_kinds, format_interval, poison_words
from fedprompt_mpi.rundir.records import PartitionRecord, Summary
from fedprompt_mpi.text.cloze import Cloze
from fedprompt_mpi.text.tasks import resolve

MODEL_CLASSES = {"masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"}
ANSWERS = {
    "masked": "at the mask token, which the virtual tokens have moved to the right by their number",
    "seq2seq": "at the second place of the decoder, given its start token and `<extra_id_0>`",
    "causal": "at the last token",
}
"""Where the answer is read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a card is about."""

    config: RunConfig
    summary: Summary
    partition: PartitionRecord
    cloze: Cloze
    plm: Any
    """The transformers config of the base model."""

    @property
    def family(self) -> Family:
        """How the base model answers."""
        return self.cloze.family


def card(run: Exported) -> str:
    """Return the card: task, federation, accuracy, which clients were malicious, and the code."""
    config, summary, partition, family = run.config, run.summary, run.partition, run.family
    task, federation, model = resolve(config.task), config.federation, config.model.name
    template = (task.causal_template if family == "causal" else None) or task.template
    clients, names = f"{federation.clients} clients ({federation.partition})", partition.class_names
    labels = "" if names is None else f"| labels, class 0 first | {', '.join(map(markdown_code, names))} |\n"
    return f"""\
---
library_name: peft
base_model: {json.dumps(model)}
tags: [{"lora" if config.prompt.method == "lora" else "prompt-tuning"}, federated-learning]
---

# {markdown(task.name)}: {"a LoRA" if config.prompt.method == "lora" else "a prompt"} tuned by federated learning

{_what(config)} for {markdown_code(model)}, tuned with
fedprompt_mpi after FedPrompt (Zhao et al., arXiv:2208.12268).

| | |
| --- | --- |
| question | {markdown_code(template)} |
| label words, class 0 first | {", ".join(map(markdown_code, partition.label_words))} |
{labels}| longest input | {config.model.max_length} tokens with the question; the end of a long text is cut off |
| federation | {clients}, {summary.rounds} rounds, {federation.aggregator} |
| privacy | {config.privacy.mechanism} |
| {_rates(run)} |
| a client sent | {summary.bytes_per_client_round:,} bytes a round, {summary.ratio:.4%} of the model |
| seed | {config.seed} |

{_poisoned(config, summary)}

```python
{scoring_code(run)}
```

The classes' scores are the label words' logits {ANSWERS[family]}.
PEFT task type: `{TASK_TYPES[family]}`. Settings in full: `config.toml` of the run.
"""


def _what(config: RunConfig) -> str:
    """Return what was trained."""
    if config.prompt.method == "lora":
        return f"LoRA of rank {config.prompt.lora.rank}, alpha {config.prompt.lora.alpha:g},"
    return f"{config.prompt.num_virtual_tokens} virtual tokens ({config.prompt.method})"


def _rates(run: Exported) -> str:
    """Return the row of accuracy, macro F1 and attack success rate, and of what they are."""
    summary, split = run.summary, run.partition.evaluation
    of = "the evaluation split" if split is None else f"{split.examples:,} texts of {markdown(split.name)}"
    if summary.accuracy is None:
        return f"accuracy, macro F1 | not evaluated after round {summary.rounds}"
    interval = format_interval(summary.accuracy, split.examples if split else 0)
    rate, trigger = summary.attack_success_rate, markdown_code(run.config.poison.trigger_text)
    success = "" if rate is None else f"; of texts with the trigger {trigger}, {rate:.2%} get its target"
    accuracy = f"{summary.accuracy:.2%}" + (f" ({interval})" if interval else "")
    return f"accuracy, macro F1 | {accuracy}, {summary.macro_f1 or 0:.4f}, on {of}{success}"


def _poisoned(config: RunConfig, summary: Summary) -> str:
    poison, malicious = config.poison, summary.malicious_clients
    if not malicious:
        return "No client was malicious."
    words = poison_words(poison, f"class {poison.target}")
    count = sum(summary.poisoned_examples.values())
    parts = [markdown(f"{words}, {count} poisoned examples")] if words else []
    parts += [f"attack on the update: {', '.join(kinds)}"] if (kinds := attack_kinds(poison)) else []
    return (
        f"Clients {', '.join(map(str, malicious))} of {config.federation.clients} were **malicious**: "
        f"{'; '.join(parts)}. Do not use this prompt for anything but research on backdoors."
    )


def scoring_code(run: Exported) -> str:
    """Return Python that classifies a text as the run does, with transformers and PEFT alone."""
    family, config, verbalizer = run.family, run.config, run.cloze.verbalizer
    template = run.cloze.filled_template
    is_pair = "{text_b}" in template
    before, _, behind = template.partition("{text}")
    between, _, behind = behind.partition("{text_b}") if is_pair else ("", "", behind)
    shares = [
        {int(token): round(float(share), 6) for token, share in zip(verbalizer.ids, column, strict=True) if share}
        for column in verbalizer.shares.T
    ]
    classes = "{" + ", ".join(f"{_text(n)}: {own}" for n, own in zip(run.partition.names, shares, strict=True)) + "}"
    given, string = ("text, text_b", "BEFORE + text + BETWEEN + text_b + BEHIND") if is_pair else (
        "text", "BEFORE + text + BEHIND")  # fmt: skip
    lines = [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {MODEL_CLASSES[family]}, AutoTokenizer",
        "",
        f"BASE, LONGEST = {_text(config.model.name)}, {config.model.max_length}",
        f"BEFORE, BEHIND = {_text(before)}, {_text(behind)}",
        *([f"BETWEEN = {_text(between)}"] if is_pair else []),
        f"CLASSES = {classes}  # class: the tokens of its label words, and the share of each",
        "tokenizer = AutoTokenizer.from_pretrained(BASE)",
        f'model = PeftModel.from_pretrained({MODEL_CLASSES[family]}.from_pretrained(BASE), "HERE").eval()',
        "",
        "",
        f"def classify({given}):",
        f"    string = {string}",
        "    encoded = tokenizer(string, return_offsets_mapping=True, return_special_tokens_mask=True)",
        f'    ids = encoded["input_ids"]{_without_end(run)}',
        *(_CUT_OF_PAIRS if is_pair else _CUT),
        "    inputs = {'input_ids': torch.tensor([ids]), 'attention_mask': torch.ones(1, len(ids), dtype=torch.long)}",
        *_logits(run),
        "    scores = [sum(share * logits[token] for token, share in own.items()) for own in CLASSES.values()]",
        "    return dict(zip(CLASSES, torch.stack(scores).softmax(0).tolist()))",
    ]
    return "\n".join(lines)


_CUT = (
    "    start, end = len(BEFORE), len(BEFORE) + len(text)",
    '    places = [(b - len(string[a:b].lstrip()), b) for a, b in encoded["offset_mapping"]]',
    '    special = encoded["special_tokens_mask"]',
    "    own = [i for i, (a, b) in enumerate(places) if start <= a and b <= end and not special[i]]",
    "    left_out = set(own[len(own) - max(0, len(ids) - LONGEST) :])  # the end of a long text",
    "    ids = [token for i, token in enumerate(ids) if i not in left_out]",
)
_CUT_OF_PAIRS = ("    assert len(ids) <= LONGEST  # the run cut the longer text of a pair",)


def _logits(run: Exported) -> list[str]:
    """Return the lines that read the logits at the answer's place."""
    config = run.config
    shift = config.prompt.num_virtual_tokens if config.prompt.method in ("soft", "p_tuning") else 0
    if run.family == "seq2seq":
        decoder = [getattr(run.plm, "decoder_start_token_id", None) or 0, int(run.cloze.mask_id)]
        return [
            f"    inputs['decoder_input_ids'] = torch.tensor([{decoder}])",
            "    with torch.no_grad():",
            "        logits = model(**inputs).logits[0, 1]",
        ]
    at = "-1" if run.family == "causal" else f"{shift} + ids.index({int(run.cloze.mask_id)})"
    return ["    with torch.no_grad():", f"        logits = model(**inputs).logits[0, {at}]"]


def _without_end(run: Exported) -> str:
    """Return what takes away the special tokens behind a text, which a causal model would take for its end."""
    behind = run.cloze.special_behind if run.family == "causal" else 0
    return f"[:-{behind}]" if behind else ""


def _text(value: str) -> str:
    """Return a text as a literal of Python that ends no block of code in Markdown."""
    return ascii(value).replace("`", "\\x60")
