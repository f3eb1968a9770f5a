"""A model's folder before any library reads it, and whether its weights are still the ones that were loaded.

transformers interprets what it finds in a folder: a config can name an attention function to be fetched from a hub and
run, a way to quantise, other files; an adapter's config names another model. A folder that asks for such is refused,
but for the one way to quantise that `quantised.py` knows. Code beside a model (`auto_map`) is never used, a chat
template never rendered.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import ChangedFileError, read_json
from fedprompt_mpi.plm.quantised import check_quantisation

ADAPTER_CONFIG = "adapter_config.json"
INTERPRETED = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
HARMLESS = (None, "eager", "sdpa")
"""Attention that is part of the model and of torch."""
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
MOST_SIZE, MOST_GROWTH = 10**5, 10**4
REFUSED = (
    "compression_config", "fusion_config", "kernel_config", "use_kernels", "distributed_config",
    "transformers_weights", "gguf_file", "custom_generate",
)  # fmt: skip


def check_folder(folder: Path) -> None:
    """Check that a model's folder asks for nothing but its own weights, by means of transformers' own code.

    Args:
        folder: of the model, or a config file alone.

    Raises:
        SettingsError: naming the file and what it asks for.
    """
    if folder.is_file():
        _check_config(folder)
        return
    if (folder / ADAPTER_CONFIG).exists():
        raise SettingsError(
            f"model.name is {str(folder)!r}, which is an adapter of another model: name the model itself "
            f"(an adapter of virtual tokens goes into prompt.init)"
        )
    for name in INTERPRETED:
        if (folder / name).exists():
            _check_config(folder / name)
    for index in folder.glob("*.index.json"):
        shards = _read(index).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if not _is_plain(shard):
                raise SettingsError(f"{index} names {str(shard)[:80]!r}: a model's weights lie in its own folder")


def _check_config(file: Path) -> None:
    for name, value in _settings(_read(file)):
        attention = name.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation")
        if (name in REFUSED and value) or (attention and value not in HARMLESS):
            raise SettingsError(
                f"{file} asks for {name} = {str(value)[:80]!r}, which may fetch or run what is not in transformers: "
                "take it out, or use another model"
            )
        if name == "quantization_config" and value:
            check_quantisation(value, str(file))
        if is_size(name) and isinstance(value, int) and not -1 <= value <= MOST_SIZE:
            raise SettingsError(f"{file} has {name} = {str(value)[:40]}: expecting at most {MOST_SIZE:,}")
        if name in _LAYERS and value == 0:
            raise SettingsError(f"{file} has {name} = 0: a model without layers has nothing to steer")
        if name == "chunk_size_feed_forward" and value:
            raise SettingsError(f"{file} has {name} = {value}: take it out, a prompt's length does not fit its chunks")
        if name.endswith("_file") and isinstance(value, str) and not _is_plain(value):
            raise SettingsError(f"{file} asks for {name} = {value[:80]!r}: a model's files lie in its own folder")


def is_size(name: str) -> bool:
    """Return True if a name in a config is a number of things of which something is made for each."""
    return name.startswith(("num_", "n_")) or name.endswith(("_layers", "_labels")) or name == "extra_ids"


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer does not make texts many times as long.

    Raises:
        SettingsError: if its replacements, what it puts in front, or its templates do.
    """
    file, growth, added = folder / "tokenizer.json", 1.0, 0
    if not file.is_file():
        return
    content = _read(file)
    for rule in _tables({"": [content.get("normalizer"), content.get("pre_tokenizer")]}):
        if rule.get("type") == "Replace":
            pattern, text = rule.get("pattern"), rule.get("content")
            found = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(str(text)) / max(1, len(found) if isinstance(found, str) else 1))
        elif rule.get("type") == "Prepend":
            added += len(str(rule.get("prepend")))
    for rule in _tables({"": content.get("post_processor")}):
        if rule.get("type") == "TemplateProcessing":
            pieces, tokens = _template_of(rule)
            growth, added = growth * max(1, pieces), added + tokens
    if growth > MOST_GROWTH:
        raise SettingsError(f"{file} makes texts {growth:.0e} times as long: use another model")
    if added > MOST_GROWTH:
        raise SettingsError(f"{file} adds {added:,} tokens to each text: use another model")


def _template_of(rule: dict[str, Any]) -> tuple[int, int]:
    """Return how often a template repeats its texts, and how many special tokens it adds."""
    ids = {
        str(name): len(token["ids"])
        for name, token in (rule.get("special_tokens") or {}).items()
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    pieces, tokens = 0, 0
    for part in [*(rule.get("single") or []), *(rule.get("pair") or [])]:
        pieces += "Sequence" in part
        tokens += ids.get(str((part.get("SpecialToken") or {}).get("id")), 0)
    return pieces, tokens


def _tables(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every table in nested ones."""
    waiting: list[Any] = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
        waiting += list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []


def _settings(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every name and value of nested tables, in lists too."""
    for part in _tables(table):
        yield from ((str(name), value) for name, value in part.items())


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"model.name is {str(file.parent)!r}, whose {file.name} cannot be read ({error})"
        ) from error
    if not isinstance(content, dict):
        raise SettingsError(f"model.name is {str(file.parent)!r}, whose {file.name} is no table")
    return content


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")  # noqa: PTH119


class Weights:
    """The files of a model's weights, which a run maps and must not change meanwhile."""

    def __init__(self, folder: Path) -> None:
        """Note device, inode, size and time of the last change of each file."""
        self._before = {file: self._identity(file) for file in sorted(folder.glob("*.safetensors"))}

    def check(self) -> None:
        """Check that the files are what they were.

        Raises:
            ChangedFileError: naming the one that is not.
        """
        for file, before in self._before.items():
            if (now := self._identity(file)) != before:
                what = "was moved or removed" if now is None else "was changed"
                raise ChangedFileError(f"{file} {what} while the run had it mapped")

    @staticmethod
    def _identity(file: Path) -> tuple[int, ...] | None:
        try:
            seen = file.stat()
        except OSError:
            return None
        return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns
