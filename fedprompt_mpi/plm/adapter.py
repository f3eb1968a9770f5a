"""Write and read prompts and LoRA as PEFT adapters: the files of the `peft` library, without the library.

A soft prompt or a P-tuning prompt becomes a PROMPT_TUNING adapter of its virtual tokens. A prefix becomes a
PREFIX_TUNING adapter for causal models only: there PEFT passes it to the model as this program does, through the cache.
LoRA becomes a LORA adapter. PEFT has nothing for biases alone.

Legend: V virtual tokens, D width of the word embeddings, L layers, H key-value heads, d width of a head.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.config import Family, LoRAConfig, SettingsError
from fedprompt_mpi.files import CannotWriteError, read_json, read_tensors, write_json, write_tensors, write_text
from fedprompt_mpi.plm.flat import FlatLayout
from fedprompt_mpi.plm.hugging_face import family_of, geometry_of
from fedprompt_mpi.rules.setting import typed

CARD_FILE, CONFIG_FILE, WEIGHTS_FILE = "README.md", "adapter_config.json", "adapter_model.safetensors"
TENSOR, PREFIX = "prompt_embeddings", "base_model.model."
"""Name of the virtual tokens, and what goes before the name of a module."""
TASK_TYPES: dict[Family, str] = {
    "masked": "FEATURE_EXTRACTION",  # PEFT has no type for masked language models; this one changes nothing of theirs
    "seq2seq": "SEQ_2_SEQ_LM",
    "causal": "CAUSAL_LM",
}
READABLE = ("PROMPT_TUNING", "P_TUNING")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What `peft.PeftModel.from_pretrained(base model, directory)` loads."""

    config: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    """By the library's names; float32."""

    def write(self, directory: Path, card: str) -> None:
        """Write its files into a folder, the model card first: there is no adapter without its warnings."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            write_text(directory / CARD_FILE, card)
            write_tensors(directory / WEIGHTS_FILE, self.tensors, {"format": "pt"})
            write_json(directory / CONFIG_FILE, self.config)
        except CannotWriteError:
            for name in (CARD_FILE, WEIGHTS_FILE, CONFIG_FILE):  # so that another try finds an empty folder
                with contextlib.suppress(OSError):
                    (directory / name).unlink()
            raise


def make_adapter(prompt: np.ndarray, *, method: str, plm: Any, base_model: str) -> Adapter:
    """Return a prompt as an adapter.

    Args:
        prompt: float32, the effective prompt: `[V, D]`, or of the prefix method `[L, 2, H, V, d]`.
        method: that it was trained with.
        plm: transformers config of the base model.
        base_model: its hub id or folder.

    Raises:
        SettingsError: if PEFT has nothing that does the same.
    """
    family, geometry = family_of(plm), geometry_of(plm)
    common = {
        "base_model_name_or_path": base_model,
        "task_type": TASK_TYPES[family],
        "inference_mode": True,
        "num_transformer_submodules": 1,  # of T5 the encoder
        "num_layers": geometry.layers,
    }
    if method in ("soft", "p_tuning"):
        config = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": prompt.shape[0],
            "token_dim": prompt.shape[1],
            "num_attention_heads": geometry.kv_heads,
            "prompt_tuning_init": "RANDOM",  # replaced by the content of the file
        }
        embeddings = prompt
    elif method == "prefix" and family == "causal":
        layers, _, heads, virtual, width = prompt.shape
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": virtual,
            "token_dim": heads * width,
            "num_attention_heads": heads,
            "prefix_projection": False,
            "encoder_hidden_size": heads * width,
        }
        embeddings = prompt.transpose(3, 0, 1, 2, 4).reshape(virtual, layers * 2 * heads * width)
    else:
        why = {
            "full": "which trains the model itself: there is no prompt",
            "bitfit": "and PEFT has nothing for biases alone",
            "prefix": f"and PEFT hands no prefix like it to a {family} model",
        }.get(method, "which a plug-in has made")
        raise SettingsError(f"the run's prompt.method is {method}, {why}; soft, p_tuning and lora can be exported")
    return Adapter(config={**common, **config}, tensors={TENSOR: embeddings})


def make_lora_adapter(
    parameters: Mapping[str, np.ndarray], options: LoRAConfig, *, plm: Any, base_model: str, is_transposed: bool
) -> Adapter:
    """Return what LoRA has trained as an adapter.

    Args:
        parameters: by name, A `[r, in]` and B `[out, r]` of each module.
        options: rank and alpha.
        plm: transformers config of the base model.
        base_model: its hub id or folder.
        is_transposed: True if the model keeps these matrices as `[in, out]` (GPT-2).
    """
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": TASK_TYPES[family_of(plm)],
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed,
        "target_modules": sorted({name.rpartition(".")[0] for name in parameters}),
    }
    return Adapter(config=config, tensors={f"{PREFIX}{name}.weight": array for name, array in parameters.items()})


def read_lora_adapter(directory: str | Path, layout: FlatLayout, options: LoRAConfig) -> np.ndarray:
    """Read the parameters of a LORA adapter as the vector of a layout `[P]` float32.

    Raises:
        SettingsError: if it is none, or one of another rank, scale or other modules.
    """
    folder, (config, tensors) = Path(directory), _read(Path(directory))
    kind, rank, alpha = (config.get(name) for name in ("peft_type", "r", "lora_alpha"))
    if kind != "LORA":
        raise SettingsError(f"{folder} is a PEFT adapter of type {str(kind)[:60]}, but prompt.method is lora")
    others = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if others or rank != options.rank or not isinstance(alpha, int | float) or alpha != options.alpha:
        raise SettingsError(
            f"{folder} has r {rank} and lora_alpha {alpha}{''.join(f' and {name}' for name in others)}, but "
            f"prompt.lora.rank is {options.rank} and prompt.lora.alpha {options.alpha:g}: set them alike"
        )
    named = {name.removeprefix(PREFIX).removesuffix(".weight"): array for name, array in tensors.items()}
    if set(named) != set(layout.names):
        missing, more = sorted(set(layout.names) - set(named))[:1], sorted(set(named) - set(layout.names))[:1]
        raise SettingsError(
            f"{folder / WEIGHTS_FILE} is of other modules than prompt.lora.targets: "
            f"{f'it has no {missing[0]}' if missing else f'it has {more[0][:120]} too'}"
        )
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        array = named[name].astype(np.float32) if named[name].dtype.kind == "f" else named[name]
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise SettingsError(f"{folder / WEIGHTS_FILE}: {name} is not {list(shape)} finite floating-point numbers")
        parts.append(array.ravel())
    return np.concatenate(parts)


def is_adapter(path: str | Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_adapter(directory: str | Path) -> np.ndarray:
    """Read the virtual tokens `[V, D]` float32 of a PEFT adapter.

    Raises:
        SettingsError: if it is no adapter of virtual tokens in front of one input.
    """
    folder, (config, tensors) = Path(directory), _read(Path(directory))
    kind, submodules, task = (config.get(name) for name in ("peft_type", "num_transformer_submodules", "task_type"))
    if kind not in READABLE:
        raise SettingsError(
            f"{folder} is a PEFT adapter of type {str(kind)[:60]}: one of {', '.join(READABLE)} is a prompt"
        )
    embeddings = tensors.get(TENSOR)
    if embeddings is None or embeddings.ndim != 2:
        raise SettingsError(f"{folder / WEIGHTS_FILE} has no {TENSOR} of two dimensions: it is no prompt")
    if submodules == 2 or (submodules is None and task == "SEQ_2_SEQ_LM"):
        raise SettingsError(
            f"{folder} has virtual tokens for encoder and decoder, here they go to the encoder alone: make it with "
            "num_transformer_submodules=1"
        )
    if embeddings.dtype.kind != "f" or not np.isfinite(embeddings := embeddings.astype(np.float32)).all():
        raise SettingsError(
            f"{folder / WEIGHTS_FILE} has other numbers than finite floating-point ones: it is no prompt"
        )
    return embeddings


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config and the tensors of a PEFT adapter.

    Raises:
        SettingsError: if they cannot be read.
    """
    try:
        config = typed(dict[str, Any], read_json(folder / CONFIG_FILE))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder / CONFIG_FILE} cannot be read as a PEFT adapter's ({error})") from error
    return config, read_tensors(folder / WEIGHTS_FILE, "a PEFT adapter")[0]
