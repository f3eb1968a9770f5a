"""Checkpoints whose matrices are quantised to 4 or 8 bits by bitsandbytes (`pip install '.[quantised]'`).

They are used as they are on disk. Gradients pass through them to the prompt; they themselves cannot be trained.

References:
    Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, arXiv:2208.07339.
    Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv:2305.14314.
"""

import importlib.util
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from fedprompt_mpi.config import SettingsError

METHOD = "bitsandbytes"
PACKAGES = (METHOD, "accelerate")
NOT_TRAINED = "its weights are quantised, and cannot be trained"
_SETTING = re.compile(r"_?load_in_(4|8)bit|bnb_4bit_\w+|llm_int8_\w+|quant_method")
_MODULE = re.compile(r"[\w.]+")


def check_quantisation(asked: Any, where: str) -> None:
    """Check that a config asks for nothing but bitsandbytes, and that it is here.

    Args:
        asked: `quantization_config` of a model's config.
        where: the file, for the message.

    Raises:
        SettingsError: naming what it asks for, or the packages that are missing.
    """
    method = asked.get("quant_method", METHOD) if isinstance(asked, Mapping) else asked
    if method != METHOD or not isinstance(asked, Mapping):
        raise SettingsError(
            f"{where} asks for quantization_config with quant_method = {str(method)[:80]!r}: of quantised checkpoints, "
            f"those of {METHOD} alone can be used"
        )
    for name, value in asked.items():
        if not _SETTING.fullmatch(name) or not _is_plain(name, value):
            raise SettingsError(
                f"{where} asks for quantization_config with {name[:80]} = {str(value)[:80]!r}, which is no setting of "
                f"{METHOD}: take it out, or use another model"
            )
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise SettingsError(
            f"{where} has weights quantised by {METHOD}, which needs packages that are not here: "
            f"pip install {' '.join(missing)}"
        )


def _is_plain(name: str, value: Any) -> bool:
    """Return True for a number, a word, nothing, and a list of modules, which transformers takes for patterns."""
    if name == "llm_int8_skip_modules" and isinstance(value, list):
        return all(isinstance(module, str) and _MODULE.fullmatch(module) for module in value)
    return not isinstance(value, list | dict)


def is_quantised(config: Any) -> bool:
    """Return True if a transformers config is that of a quantised checkpoint."""
    return bool(getattr(config, "quantization_config", None))


def keep_kernels_out() -> None:
    """Keep the package `kernels` out of this process: by it bitsandbytes, when imported, fetches code from a hub."""
    sys.modules.setdefault("kernels", None)  # pyright: ignore[reportArgumentType]


def one_place(device: Any) -> dict[str, Any]:
    """Return what makes transformers put a quantised model on a device; it cannot be moved afterwards."""
    logging.getLogger(METHOD).setLevel(logging.ERROR)  # a line for each product of 8-bit numbers
    keep_kernels_out()
    return {"device_map": {"": device}}


def keep_one_arithmetic(model: Any) -> None:
    """Let the matrices of a model in evaluation mode compute as in training mode; nothing else in them depends on it.

    In evaluation mode, bitsandbytes on a CPU changes the format of 4-bit weights at the first batch without gradients:
    a rank that has evaluated would train with other numbers than one that has not, and hold a copy of its own. With 8
    bits, a text's answer would depend on the others in its minibatch, among which outliers are looked for; on a GPU it
    does.
    """
    for module in model.modules():
        if type(module).__module__.startswith(METHOD):
            module.training = True
