"""The command cost: parameters and bytes of every method per client and round, from a model's config alone."""

import contextlib
from collections.abc import Sequence
from typing import Any

from fedprompt_mpi.commands.settings import add_sizes, command_parser, model_of, parse, prompt_of
from fedprompt_mpi.config import PromptConfig
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.rules import registry


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print the table."""
    parser = command_parser("cost", "parameters and bytes of every method per client and round")
    add_sizes(parser)
    parsed = parse(parser, arguments)
    print(format_cost(model_of(parsed), prompt_of(parsed)))


def count_parameters(config: Any, prompt: PromptConfig) -> dict[str, int]:
    """Return the trainable parameters of every method that can be laid out for a PLM.

    Args:
        config: a transformers config; the model is built on the meta device, so nothing is allocated.
        prompt: sizes of the prompt; its method is ignored.
    """
    from fedprompt_mpi.plm.hugging_face import as_one_message, geometry_of, model_class
    from fedprompt_mpi.plm.late_imports import on_meta
    from fedprompt_mpi.plm.lora import NotThereError
    from fedprompt_mpi.plm.methods import make_method

    sizes, built_by = vars(prompt), model_class(config)
    with as_one_message("the model cannot be built from its config"):
        model = on_meta(lambda: built_by.from_config(config))
        geometry = geometry_of(config, model)
        counts = {}
        for name in registry.methods:
            with contextlib.suppress(NotThereError):  # no biases, or no queries and values of a known name
                counts[name] = make_method(PromptConfig(**{**sizes, "method": name}), geometry, model).layout.size
        return counts


def format_cost(name: str, prompt: PromptConfig) -> str:
    """Return the table of methods, parameters, share of the PLM and bytes one way.

    Raises:
        SettingsError: if no config can be had for `name`.
    """
    from fedprompt_mpi.plm.hugging_face import read_config
    from fedprompt_mpi.plm.supported import check_supported, support_of

    config = read_config(name)
    outcome = support_of(config)
    if all(outcome.values()):
        check_supported(config, "soft", name)
    counts = count_parameters(config, prompt)
    lines = [
        f"{name}: {counts['full']:,} parameters; {prompt.num_virtual_tokens} virtual tokens, "
        f"prefix hidden size {prompt.prefix_hidden_size}, LoRA of rank {prompt.lora.rank}; float32, per client and "
        "round, one way",
        f"{'method':<10}{'parameters':>16}{'share of the PLM':>20}{'bytes':>18}",
    ]
    for method, reason in outcome.items():
        count = counts.get(method)
        if reason or count is None:
            lines.append(f"{method:<10}{'-':>16}{'-':>20}{'-':>18}   {reason}")
        else:
            lines.append(f"{method:<10}{count:>16,}{count / counts['full']:>20.4%}{4 * count:>18,}")
    return "\n".join(lines)
