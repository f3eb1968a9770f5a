"""Write and read prompts as PEFT adapters: the files of the `peft` library, without the library.

A soft prompt or a P-tuning prompt becomes a PROMPT_TUNING adapter of its virtual tokens. A prefix becomes a
PREFIX_TUNING adapter for causal models only: there PEFT passes it to the model as this program does, through the cache.

Legend: V virtual tokens, D width of the word embeddings, L layers, H key-value heads, d width of a head.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.config import Family, SettingsError
from fedprompt_mpi.files import CannotWriteError, read_json, read_tensors, write_json, write_tensors, write_text
from fedprompt_mpi.plm.hugging_face import family_of, geometry_of

CARD_FILE, CONFIG_FILE, WEIGHTS_FILE = "README.md", "adapter_config.json", "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
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
    embeddings: np.ndarray
    """`[V, width]` float32."""

    def write(self, directory: Path, card: str) -> None:
        """Write its files into a folder, the model card first: there is no adapter without its warnings."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            write_text(directory / CARD_FILE, card)
            write_tensors(directory / WEIGHTS_FILE, {TENSOR: self.embeddings}, {"format": "pt"})
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
        why = (
            "which trains the model itself: there is no prompt"
            if method == "full"
            else f"and PEFT hands no prefix like it to a {family} model"
        )
        raise SettingsError(f"the run's prompt.method is {method}, {why}; soft and p_tuning can be exported")
    return Adapter(config={**common, **config}, embeddings=embeddings)


def is_adapter(path: str | Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_adapter(directory: str | Path) -> np.ndarray:
    """Read the virtual tokens `[V, D]` float32 of a PEFT adapter.

    Raises:
        SettingsError: if it is no adapter of virtual tokens in front of one input.
    """
    folder = Path(directory)
    try:
        config: dict[str, Any] = read_json(folder / CONFIG_FILE)
        kind, submodules = config.get("peft_type"), config.get("num_transformer_submodules")
        task = config.get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(f"{folder / CONFIG_FILE} cannot be read as a PEFT adapter's ({error})") from error
    if kind not in READABLE:
        raise SettingsError(
            f"{folder} is a PEFT adapter of type {str(kind)[:60]}: one of {', '.join(READABLE)} is a prompt"
        )
    tensors, _ = read_tensors(folder / WEIGHTS_FILE, "a PEFT adapter")
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
