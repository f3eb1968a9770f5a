"""The command export: a run's global prompt as a PEFT adapter, with a model card."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt_mpi.comm.codec import make_codec
from fedprompt_mpi.commands.card import Exported, card
from fedprompt_mpi.commands.predict import Prompt, load_prompt
from fedprompt_mpi.commands.settings import add_plugins, command_parser, parse
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import Closing, Summary, read_partition, read_record, read_rounds, summarise

if TYPE_CHECKING:
    from fedprompt_mpi.plm.adapter import Adapter


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Write the adapter."""
    parser = command_parser("export", "the prompt of a run as a PEFT adapter")
    parser.add_argument("run", help="run directory")
    parser.add_argument("dir", help="new folder for the adapter")
    add_plugins(parser)
    parsed = parse(parser, arguments)
    load_plugins(parsed.plugin)
    print(f"adapter in {export(Path(parsed.run), Path(parsed.dir))}")


def export(run: Path, directory: Path) -> Path:
    """Write the adapter of a finished run into a new folder, and return the folder.

    Raises:
        SettingsError: if there is no such run, its prompt cannot be a PEFT adapter, or the folder is not empty.
    """
    from fedprompt_mpi.plm.hugging_face import download, read_config

    prompt, paths = load_prompt(run), RunPaths(run)
    config, partition = prompt.config, read_partition(paths)
    if prompt.note:
        print(f"fedprompt_mpi: {prompt.note}", file=sys.stderr, flush=True)
    summary = _summary_so_far(prompt, paths) if prompt.note else read_record(paths.summary, Summary)
    if summary.malicious_clients != config.malicious:
        raise SettingsError(
            f"{paths.summary} says that clients {summary.malicious_clients} were malicious, and {paths.config} that "
            f"{config.malicious} were: name a run directory as a run has written it"
        )
    if directory.is_dir() and any(directory.iterdir()):
        raise SettingsError(f"{directory} is not empty: name a new folder for the adapter")
    plm = read_config(download(config.model.name))
    check_window(plm, config)
    adapter = _adapter(prompt, plm, paths)
    exported = Exported(config=config, summary=summary, partition=partition, cloze=prompt.cloze, plm=plm)
    adapter.write(directory, card(exported))
    return directory


def _adapter(prompt: Prompt, plm: Any, paths: RunPaths) -> "Adapter":
    """Return what a run has trained as an adapter.

    Raises:
        SettingsError: if PEFT has nothing like it, or the run's file is not as a run has written it.
    """
    from fedprompt_mpi.plm.adapter import make_adapter, make_lora_adapter

    config = prompt.config
    if config.prompt.method == "lora":
        transposed = prompt.keeps_matrices_transposed
        return make_lora_adapter(
            prompt.named, config.prompt.lora, plm=plm, base_model=config.model.name, is_transposed=transposed
        )
    if prompt.effective is not None:
        _check_effective(prompt.effective, config, paths)
    elif config.prompt.method in ("soft", "p_tuning", "prefix"):
        raise SettingsError(f"{paths.prompt} has no effective_prompt: name a run directory as a run has written it")
    values = prompt.effective if prompt.effective is not None else prompt.vector
    return make_adapter(values, method=config.prompt.method, plm=plm, base_model=config.model.name)


def _summary_so_far(prompt: Prompt, paths: RunPaths) -> Summary:
    """Return the summary of an unfinished run up to its last checkpoint, without times."""
    rounds = read_rounds(paths)[: int(prompt.metadata["round"]) + 1]
    partition, size = read_partition(paths), len(prompt.vector)
    closing = Closing(
        parameters=size,
        plm_parameters=prompt.plm_parameters,
        bytes_per_client_round=make_codec(prompt.config.comm).bytes_of(size),
        malicious_clients=[client.client for client in partition.clients if client.malicious],
        poisoned_examples={str(client.client): client.poisoned for client in partition.clients if client.poisoned},
        seconds_total=0.0,
        seconds_to_first_broadcast=None,
        peak_rss_bytes=[],
    )
    return summarise(rounds, closing)


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
