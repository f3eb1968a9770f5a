"""What is asked of transformers and the hub: a model's config, family, sizes, class and tokenizer.

transformers is imported here first, without what a prompt does not need.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import Family, SettingsError
from fedprompt_mpi.files import NO_MEMORY
from fedprompt_mpi.hub import is_hub_id, why_not_had
from fedprompt_mpi.plm.late_imports import late_imports
from fedprompt_mpi.plm.model_folder import check_folder, check_tokenizer

EMBEDDED = Path(__file__).parent / "embedded"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes of a PLM that a method's parameters depend on."""

    embedding_width: int
    layers: int
    """Layers that take a prefix: the decoder's in an encoder-decoder."""
    kv_heads: int
    head_width: int
    max_positions: int | None
    """Positions the model was made for; None if it has no such limit."""


def read_config(name: str) -> Any:
    """Return the transformers config of a hub id, a folder or a config file.

    Raises:
        SettingsError: if there is none, or it cannot be read.
    """
    with late_imports():
        from transformers import AutoConfig  # which asks at the terminal whether to run a model's code, unless told

    place = EMBEDDED if name == "embedded" else Path(name)
    transformers_quiet()
    if is_here := os.path.exists(place):  # noqa: PTH110 - which is False for a name that is too long
        check_folder(place)
    elif not is_hub_id(name):
        raise SettingsError(f"model.name is {name!r}, but there is no such folder")
    on_disk = is_here or bool(why_not_had("model", name))
    with late_imports(), as_one_message(f"model.name is {name!r}, whose config cannot be read"):
        return AutoConfig.from_pretrained(place if is_here else name, trust_remote_code=False, local_files_only=on_disk)


def transformers_quiet() -> None:
    """Let transformers print nothing but errors: its lines hold texts of the files that it reads."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def as_one_message(what: str) -> Iterator[None]:
    """Raise SettingsError, with the first line of the reason, for whatever transformers' classes happen to raise."""
    try:
        yield
    except (SettingsError, MemoryError, SystemError):
        raise
    except ImportError as error:
        if any(words in str(error) for words in NO_MEMORY):  # of a library: the model is not to blame
            raise
        raise SettingsError(f"{what} ({first_line(error)}): install what it needs, or use another model") from error
    except Exception as error:
        raise SettingsError(
            f"{what} ({first_line(error)}): name a hub id, a folder in Hugging Face form, or embedded"
        ) from error


def family_of(config: Any) -> Family:
    """Return the family of a model, from its config.

    Raises:
        SettingsError: if transformers knows no language-model head for it.
    """
    with late_imports():
        from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder and config.model_type in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    if config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "masked"
    if config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise SettingsError(f"model.name is a {config.model_type} model, which answers no cloze question: use another")


def model_class(config: Any) -> Any:
    """Return the transformers class that builds the language model of a config, and import the model's code.

    Raises:
        SettingsError: if transformers knows no language-model head for it.
    """
    family = family_of(config)
    with late_imports():
        import transformers

        importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        return {
            "masked": transformers.AutoModelForMaskedLM,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "causal": transformers.AutoModelForCausalLM,
        }[family]


def geometry_of(config: Any, model: Any = None) -> Geometry:
    """Read the sizes off a config, and off its model where configs differ.

    Args:
        config: a transformers config.
        model: built of it, on the meta device is enough; without it, widths and positions are the config's word.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "hidden_size", None) or 0
    embedding_width = getattr(text, "embedding_size", None) or width
    positions = getattr(text, "max_position_embeddings", None)
    if model is not None:
        embedding_width = model.get_input_embeddings().weight.shape[1]
        for name, module in model.named_modules():
            padding = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and padding is not None:  # as RoBERTa's: they start behind it
                positions = module.weight.shape[0] - padding - 1
    return Geometry(
        embedding_width=embedding_width,
        layers=getattr(text, "num_decoder_layers", None) or getattr(text, "num_hidden_layers", None) or 0,
        kv_heads=_of_all_layers(text, "num_key_value_heads") or heads,
        head_width=getattr(text, "d_kv", None) or _of_all_layers(text, "head_dim") or width // heads,
        max_positions=positions,
    )


def _of_all_layers(config: Any, name: str) -> int | None:
    """Return a size that all layers share; None if there is none."""
    with contextlib.suppress(Exception):  # transformers has an error of its own for sizes that vary
        return getattr(config, name)
    return None


def download(name: str) -> str:
    """Return the folder of a model, fetching it from the hub if it is no folder; one process a node calls this.

    Raises:
        SettingsError: if it is neither a folder nor to be had from the hub (or its cache, when offline).
    """
    if name == "embedded":
        return str(EMBEDDED)
    if os.path.isdir(name):  # noqa: PTH112 - which is False for a name that is too long
        return name
    if not is_hub_id(name):
        raise SettingsError(f"model.name is {name!r}, but there is no such folder")
    from huggingface_hub import snapshot_download

    reason, patterns = why_not_had("model", name), ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return snapshot_download(name, allow_patterns=patterns, local_files_only=bool(reason))
    except Exception as error:  # interrupted, permission, no copy on this disk: all end here
        raise SettingsError(
            f"model.name is {name!r}: no such folder, and it cannot be had from the hub ({reason or first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(folder: str) -> Any:
    """Return the fast tokenizer of a model's folder.

    Raises:
        SettingsError: if the folder has none.
    """
    with late_imports():
        from transformers import AutoTokenizer

    named = f"model.name is {folder!r}"
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise SettingsError(
            f"{named}, which has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): put that of the model there"
        )
    with as_one_message(f"{named}, whose tokenizer cannot be read"):
        check_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise SettingsError(
            f"{named}, whose tokenizer ({type(tokenizer).__name__}) has no fast version, which tells where in a text "
            "each token stands: use another model"
        )
    return tokenizer
