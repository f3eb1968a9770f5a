"""Values that a figure tells: under the pointer, point by point and bar by bar, and series that a legend can hide.

A mark's text becomes a `<title>` in the SVG, which browsers show without any script; `page.js` shows it at once, and
hides a series by its name in the legend.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from fedprompt_mpi.liveness.output import one_line

_NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def mark_points(figure: Any, line: Any, series: str, texts: Sequence[str]) -> None:
    """Give each point of a line a text.

    Args:
        figure: that it belongs to.
        line: of matplotlib, with a marker.
        series: its name in the legend.
        texts: one for each point.
    """
    _of(figure)[_name(figure, line)] = (one_line(series), [one_line(text) for text in texts])


def mark_bar(figure: Any, bar: Any, series: str, text: str) -> None:
    """Give a bar, of matplotlib, a text."""
    _of(figure)[_name(figure, bar)] = (one_line(series), [one_line(text)])


def mark_legend(figure: Any, legend: Any) -> None:
    """Let the entries of a legend hide the series that they name."""
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        for part in (handle, text):
            _keys(figure)[_name(figure, part)] = one_line(text.get_text())


def with_marks(figure: Any, svg: str) -> str:
    """Return the SVG of a figure with its marks: classes `mark` and `key`, `data-series`, and titles."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", svg))  # names of others are in its comments
    for group in root.iter(f"{{{SVG}}}g"):
        name = group.get("id", "")
        if name in _of(figure):
            series, texts = _of(figure)[name]
            group.set("class", "mark")
            group.set("data-series", series)
            points = list(group.iter(f"{{{SVG}}}use"))
            for element, text in zip(points or [group], texts, strict=False):
                if not text:
                    continue
                title = ET.Element(f"{{{SVG}}}title")
                title.text = text
                element.insert(0, title)
        elif name in _keys(figure):
            group.set("class", "key")
            group.set("data-series", _keys(figure)[name])
    return ET.tostring(root, encoding="unicode")


def _name(figure: Any, part: Any) -> str:
    name = f"part-{len(_of(figure)) + len(_keys(figure))}"
    part.set_gid(name)
    return name


def _of(figure: Any) -> dict[str, tuple[str, list[str]]]:
    return figure.__dict__.setdefault("marks", {})


def _keys(figure: Any) -> dict[str, str]:
    return figure.__dict__.setdefault("keys_of_legends", {})
