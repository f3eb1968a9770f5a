"""Texts of somebody else, as parts of documents in which they are text and nothing else."""

import re

from fedprompt_mpi.liveness.output import one_line

_FORMULA = re.compile(r"(^|[;\t])(?=\s*[=+\-@])")
_FIGURES = re.compile(r"[-+]?[\d.,%±/ e+-]*")
_LATEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}",
    "]": "{]}", **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}  # fmt: skip


def csv_cell(text: str) -> str:
    """Return a cell that no spreadsheet computes: a mark that makes it text stands before what would be a formula."""
    text = one_line(text)
    return text if _FIGURES.fullmatch(text) else _FORMULA.sub(r"\1'", text)


def markdown(text: str) -> str:
    """Return a text as part of a line or of a table's cell, without a meaning in Markdown or HTML."""
    escaped = re.sub(r"([\\`*\[\]<>|&])", r"\\\1", one_line(text))
    return escaped.replace("://", r"\://").replace("www.", r"www\.")


def markdown_code(text: str) -> str:
    """Return a text as a span of code, which may stand in a table's cell."""
    text = one_line(text).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def latex(text: str) -> str:
    """Return a text for a cell of a LaTeX table."""
    return "".join(_LATEX.get(mark, mark) for mark in one_line(text))
