"""The command check: whether a model can be used, and with which methods, without its weights; whether plug-ins can."""

from collections.abc import Sequence

from fedprompt_mpi.commands.settings import add_model, add_plugins, command_parser, model_of, parse
from fedprompt_mpi.config import Family, SettingsError
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.rules import registry


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print what works."""
    parser = command_parser("check", "whether a model can be used, and with which methods")
    add_model(parser)
    parser.add_argument("--method", help="fail unless this one works: soft, p_tuning, prefix or full")
    add_plugins(parser)
    parser.add_argument("--launch", default="mpirun -n 4", help="for plug-ins: starts several ranks; empty: do not")
    parsed = parse(parser, arguments)
    if parsed.plugin and (parsed.name or parsed.model or parsed.method):
        raise SettingsError("check takes a model, or --plugin: give one of them")
    if parsed.plugin:
        from fedprompt_mpi.commands.check_plugins import check_plugins

        check_plugins(parsed.plugin, parsed.launch)
        return
    print(check(model_of(parsed), parsed.method))


def check(name: str, method: str | None = None) -> str:
    """Try a shrunk copy of a model with every method, and its tokenizer.

    Args:
        name: hub id, folder, config file, or embedded.
        method: that must work; None if any will do.

    Returns:
        A line about the model, a line for each method, and one about the tokenizer.

    Raises:
        SettingsError: if it cannot be used, with the reason.
    """
    from fedprompt_mpi.plm.hugging_face import family_of, geometry_of, model_class, read_config
    from fedprompt_mpi.plm.late_imports import on_meta
    from fedprompt_mpi.plm.supported import refusal, support_of

    if method is not None and method not in registry.methods:
        raise SettingsError(f"--method is {method!r}: choose one of {', '.join(registry.methods)}")
    config = read_config(name)
    family, outcome = family_of(config), support_of(config, anew=True)
    wanted = [method] if method else list(registry.methods)
    if all(outcome[one] for one in wanted):
        raise SettingsError(refusal(outcome, wanted[0], config.model_type, name))
    model = on_meta(lambda: model_class(config).from_config(config))
    geometry = geometry_of(config, model)
    words = model.get_input_embeddings().weight.shape[0]
    positions = f"{geometry.max_positions:,} positions" if geometry.max_positions else "no limit of positions"
    lines = [
        f"{name}: {config.model_type} ({family}), {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{words:,} words of {geometry.embedding_width:,}, {positions}",
        *(f"{one:<10}{outcome[one] or 'works'}" for one in registry.methods),
        f"tokenizer {_check_tokenizer(name, family, words)}",
    ]
    return "\n".join(lines)


def _check_tokenizer(name: str, family: Family, words: int) -> str:
    """Return what a model's tokenizer is like.

    Raises:
        SettingsError: if it cannot be used.
    """
    from pathlib import Path

    from fedprompt_mpi.plm.hugging_face import download, load_tokenizer
    from fedprompt_mpi.text.cloze import find_mask

    if Path(name).is_file():
        return "not looked at: a config file has none"
    tokenizer = load_tokenizer(download(name))
    place = find_mask(tokenizer, family)[0] or "the end of the text"
    tokens = len(tokenizer)
    note = "" if tokens <= words else f"; {tokens - words} of them have no embedding, and texts with them are refused"
    return f"{tokens:,} tokens, answers at {place}{note}"
