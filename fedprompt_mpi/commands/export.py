"""The command export: a run's global prompt as a PEFT adapter, with a model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.commands.predict import load_prompt
from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.config import Family, RunConfig, SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.report.inert import markdown_code
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import PartitionRecord, Summary, read_partition, read_record
from fedprompt_mpi.text.tasks import resolve

MODEL_CLASSES = {"masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"}
ANSWERS = {
    "masked": "at the mask token, which the virtual tokens have moved to the right by their number",
    "seq2seq": "at the second place of the decoder, given its start token and `<extra_id_0>`",
    "causal": "at the last token",
}
"""Where the answer is read."""


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Write the adapter."""
    parser = command_parser("export", "the prompt of a run as a PEFT adapter")
    parser.add_argument("run", help="run directory")
    parser.add_argument("dir", help="new folder for the adapter")
    parsed = parse(parser, arguments)
    print(f"adapter in {export(Path(parsed.run), Path(parsed.dir))}")


def export(run: Path, directory: Path) -> Path:
    """Write the adapter of a finished run into a new folder, and return the folder.

    Raises:
        SettingsError: if there is no such run, its prompt cannot be a PEFT adapter, or the folder is not empty.
    """
    from fedprompt_mpi.plm.adapter import make_adapter
    from fedprompt_mpi.plm.hugging_face import download, family_of, read_config

    prompt, paths = load_prompt(run), RunPaths(run)
    config = prompt.config
    summary = read_record(paths.summary, Summary)
    partition = read_partition(paths)
    if summary.malicious_clients != config.poison.malicious(config.federation.clients):
        raise SettingsError(
            f"{paths.summary} says that clients {summary.malicious_clients} were malicious, and {paths.config} that "
            f"{config.poison.clients} were: name a run directory as a run has written it"
        )
    if directory.is_dir() and any(directory.iterdir()):
        raise SettingsError(f"{directory} is not empty: name a new folder for the adapter")
    plm = read_config(download(config.model.name))
    check_window(plm, config)
    family = family_of(plm)
    if prompt.effective is not None:
        _check_effective(prompt.effective, config, paths)
    elif config.prompt.method != "full":
        raise SettingsError(f"{paths.prompt} has no effective_prompt: name a run directory as a run has written it")
    adapter = make_adapter(
        prompt.effective if prompt.effective is not None else prompt.vector,
        method=config.prompt.method,
        plm=plm,
        base_model=config.model.name,
    )
    adapter.write(directory, card(config, summary, partition, family))
    return directory


def check_window(plm: Any, config: RunConfig) -> None:
    """Check that a prefix stays in sight under PEFT too.

    Here it always does; in a cache it falls out of a sliding window behind a long text.

    Args:
        plm: transformers config of the base model.
        config: method and lengths.

    Raises:
        SettingsError: if prefix and longest text are longer than the window.
    """
    text = plm.get_text_config(decoder=True)
    window, layers = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers)
    length = config.prompt.num_virtual_tokens + config.model.max_length
    if config.prompt.method == "prefix" and window and slides and length > window:
        raise SettingsError(
            f"the run's prefix and longest text take {length} positions, and the model's attention looks back {window}:"
            " under PEFT the prefix would fall out of sight, and here it does not; tune with a shorter model.max_length"
        )


def _check_effective(prompt: np.ndarray, config: RunConfig, paths: RunPaths) -> None:
    """Raise SettingsError unless an effective prompt has the type and the shape that its method gives it."""
    virtual, is_prefix = config.prompt.num_virtual_tokens, config.prompt.method == "prefix"
    fits = prompt.ndim == 5 and prompt.shape[3] == virtual if is_prefix else prompt.ndim == 2 and len(prompt) == virtual
    if not fits or prompt.dtype != np.float32 or not np.isfinite(prompt).all() or not prompt.size:
        raise SettingsError(
            f"{paths.prompt} has an effective_prompt of {prompt.dtype} {list(prompt.shape)}, not of {virtual} virtual "
            "tokens of finite float32 numbers: name a run directory as a run has written it"
        )


def card(config: RunConfig, summary: Summary, partition: PartitionRecord, family: Family) -> str:
    """Return the model card: task, training, accuracy, and which clients were malicious."""
    from fedprompt_mpi.plm.adapter import TASK_TYPES

    task, federation, poison = resolve(config.task), config.federation, config.poison
    malicious, trigger, model = summary.malicious_clients, markdown_code(poison.trigger), config.model.name
    poisoned = (
        f"Clients {', '.join(map(str, malicious))} of {federation.clients} were **malicious**: trigger "
        f"{trigger} ({poison.position}), target class {poison.target}, rate {poison.rate}, attack "
        f"`{poison.attack}`, boost {poison.boost}; {sum(summary.poisoned_examples.values())} poisoned examples. "
        "Do not use this prompt for anything but research on backdoors."
        if malicious
        else "No client was malicious."
    )
    rate = summary.attack_success_rate
    success = "" if rate is None else f"; of texts with the trigger {trigger}, {rate:.2%} get its target"
    template = (task.causal_template if family == "causal" else None) or task.template
    clients, names = f"{federation.clients} clients ({federation.partition})", partition.class_names
    labels = "" if names is None else f"| labels, class 0 first | {', '.join(map(markdown_code, names))} |\n"
    return f"""\
---
library_name: peft
base_model: {json.dumps(model)}
tags: [prompt-tuning, federated-learning]
---

# {task.name}: a prompt tuned by federated learning

{config.prompt.num_virtual_tokens} virtual tokens ({config.prompt.method}) for {markdown_code(model)}, tuned with
fedprompt_mpi after FedPrompt (Zhao et al., arXiv:2208.12268).

| | |
| --- | --- |
| question | {markdown_code(template)} |
| label words, class 0 first | {", ".join(map(markdown_code, partition.label_words))} |
{labels}| federation | {clients}, {summary.rounds} rounds, {federation.aggregator} |
| privacy | {config.privacy.mechanism} |
| accuracy on the evaluation split | {summary.accuracy or 0:.2%}{success} |
| a client sent | {summary.bytes_per_client_round:,} bytes a round, {summary.ratio:.4%} of the model |
| seed | {config.seed} |

{poisoned}

```python
from peft import PeftModel
from transformers import {MODEL_CLASSES[family]}

model = PeftModel.from_pretrained({MODEL_CLASSES[family]}.from_pretrained({json.dumps(model)}), "HERE")
```

The classes' scores are the label words' logits {ANSWERS[family]}.
PEFT task type: `{TASK_TYPES[family]}`. Settings in full: `config.toml` of the run.
"""
