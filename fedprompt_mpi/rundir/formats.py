"""Numbers and lines as people read them, 80 columns wide."""

import re
import textwrap

WIDTH, NO_BREAK = 80, "\u00a0"


def format_count(number: float) -> str:
    """Return a number of bytes as text: 61,440 B, 14.3 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def format_rate(rate: float | None) -> str:
    """Return a rate in [0, 1] as a percentage."""
    return "-" if rate is None else f"{100 * rate:.2f} %"


def format_epsilon(epsilon: float) -> str:
    """Return an epsilon of differential privacy, and in words what it is worth.

    References:
        Ponomareva et al., How to DP-fy ML, 2023, arXiv:2303.00654, Section 5.2.1: up to 1 is strong, up to 10 is
        reasonable, more is weak. Beyond 100 an attacker's odds may grow by e to the power of 100.
    """
    words = ((1, "a strong guarantee"), (10, "a reasonable guarantee"), (100, "a weak guarantee"))
    worth = next((word for limit, word in words if epsilon <= limit), "this protects nothing")
    shown = f"{epsilon:,.2f}" if epsilon < 1000 else f"{epsilon:,.0f}"
    return f"epsilon {shown}, {worth}"


def format_seconds(seconds: float) -> str:
    """Return a duration with a unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def format_left(seconds: float) -> str:
    """Return a duration for a glance: 14 s, 3 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def format_rows(rows: list[tuple[str, str]]) -> str:
    """Lay out names and values in two columns; a long value goes on below its first line."""
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, value in rows:
        first, rest = f"  {name:<{width}}  ", " " * (width + 4)
        lines += _wrapped(value, first, rest) or [first.rstrip()]
    return "\n".join(lines)


def join_parts(parts: list[str]) -> str:
    """Join parts of a line by two spaces; what does not fit goes on in the next line, behind a margin."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= WIDTH:
            lines[-1] += f"  {part}"
        else:
            lines += _wrapped(part, " " * 14, " " * 14)
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    kept = re.sub(r"(?<=\d) (?=%|[a-zA-Z]{1,2}\b)", NO_BREAK, text)  # a number and its unit stay together
    lines = textwrap.wrap(
        kept, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(NO_BREAK, " ") for line in lines]
