"""The command export: a run's global prompt as a PEFT adapter, with a card that says how it came about."""

import json
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import Family, RunConfig, SettingsError
from fedprompt_mpi.files import read_json, write_text
from fedprompt_mpi.plm.adapter import TASK_TYPES, write_adapter
from fedprompt_mpi.plm.backbone import download, family_of, geometry_of, read_config
from fedprompt_mpi.predict import load_prompt
from fedprompt_mpi.text.tasks import resolve

CARD_FILE = "README.md"
MODEL_CLASSES = {
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
}
ANSWERS = {
    "masked": "at the mask token, which the virtual tokens have moved to the right by their number",
    "seq2seq": "at the second place of the decoder, given its start token and `<extra_id_0>`",
    "causal": "at the last token",
}
"""Where the answer is read."""


def export(run: Path, directory: Path) -> Path:
    """Write the adapter of a finished run into a new folder, and return that.

    Raises:
        SettingsError: if there is no such run, its prompt cannot be a PEFT adapter, or the folder is not empty.
    """
    prompt = load_prompt(run)
    config = prompt.config
    try:
        summary, words = read_json(run / "summary.json"), read_json(run / "partition.json")["label_words"]
    except (OSError, ValueError) as error:
        raise SettingsError(f"{run} cannot be read as a finished run ({error}): name a run directory") from error
    if directory.is_dir() and any(directory.iterdir()):
        raise SettingsError(f"{directory} is not empty: name a new folder for the adapter")
    plm = read_config(download(config.model.name))
    family = family_of(plm)
    write_adapter(
        directory,
        prompt.effective if prompt.effective is not None else prompt.vector,
        method=config.prompt.method,
        family=family,
        geometry=geometry_of(plm),
        base_model=config.model.name,
    )
    write_text(directory / CARD_FILE, card(config, summary, words, family, int(prompt.metadata["round"])))
    return directory


def card(config: RunConfig, summary: dict[str, Any], words: list[str], family: Family, rounds: int) -> str:
    """Return the model card: what the prompt is for, how it was trained, what it is worth, and what was poisoned."""
    task, federation, poison = resolve(config.task), config.federation, config.poison
    malicious = summary["malicious_clients"]
    poisoned = (
        f"Clients {', '.join(map(str, malicious))} of {federation.clients} were **malicious**: trigger "
        f"{json.dumps(poison.trigger)} ({poison.position}), target class {poison.target}, rate {poison.rate}, attack "
        f"`{poison.attack}`, boost {poison.boost}; {sum(summary['poisoned_examples'].values())} poisoned examples. "
        "Do not use this prompt for anything but research on backdoors."
        if malicious
        else "No client was malicious."
    )
    rate = summary["attack_success_rate"]
    success = (
        "" if rate is None else f"; of texts with the trigger {json.dumps(poison.trigger)}, {rate:.2%} get its target"
    )
    template = (task.causal_template if family == "causal" else None) or task.template
    return f"""\
---
library_name: peft
base_model: {json.dumps(config.model.name)}
tags: [prompt-tuning, federated-learning]
---

# {task.name}: a prompt tuned by federated learning

{config.prompt.num_virtual_tokens} virtual tokens ({config.prompt.method}) for `{config.model.name}`, tuned with
fedprompt_mpi after FedPrompt (Zhao et al., arXiv:2208.12268).

| | |
| --- | --- |
| question | `{template}` |
| label words, class 0 first | {", ".join(f"`{word}`" for word in words)} |
| federation | {federation.clients} clients ({federation.partition}), {rounds} rounds, {federation.aggregator} |
| privacy | {config.privacy.mechanism} |
| accuracy on the evaluation split | {summary["accuracy"]:.2%}{success} |
| a client sent | {summary["bytes_per_client_round"]:,} bytes a round, {summary["ratio"]:.4%} of the model |
| seed | {config.seed} |

{poisoned}

```python
from peft import PeftModel
from transformers import {MODEL_CLASSES[family]}

model = PeftModel.from_pretrained({MODEL_CLASSES[family]}.from_pretrained({json.dumps(config.model.name)}), "HERE")
```

The classes' scores are the label words' logits {ANSWERS[family]}.
PEFT task type: `{TASK_TYPES[family]}`. Settings in full: `config.toml` of the run.
"""
