"""Style of the figures: colours that colour-blind readers can distinguish, on paper and on a dark screen.

A figure is drawn once, in the colours of paper. In a page its SVG is part of the HTML and its colours become
variables, which the page's style sheet sets for light, dark and print.

References:
    Okabe and Ito, Color Universal Design, 2008 (the palette).
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedprompt_mpi.files import File, write_bytes, write_text
from fedprompt_mpi.report.marks import with_marks

PAPER, INK, MUTED, GRID = "#ffffff", "#1b1f24", "#57606b", "#d8dee4"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c959f",
)  # fmt: skip
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
"""In the order in which curves take them."""
MARKERS = "os^Dvp*"
ON_DARK = {
    PAPER: "#0d1117", INK: "#e6edf3", MUTED: "#9aa4b0", GRID: "#30363d", BLUE: "#4aa8e8", VERMILLION: "#f0883e",
    GREEN: "#2fc79b", PURPLE: "#dd9dc2", ORANGE: "#f2c14e", SKY: "#9ad5f7", GREY: "#768390",
}  # fmt: skip
"""Colour on paper -> colour on a dark screen."""


@contextmanager
def style() -> Iterator[None]:
    """Apply the style to the figures that are made in the block."""
    import matplotlib as mpl

    settings: Any = {  # the stubs want each key as a literal
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 11,
        "axes.titleweight": "bold", "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 11.5,
        "legend.fontsize": 11, "lines.linewidth": 1.8, "lines.markersize": 4.5, "svg.fonttype": "path",
        "hatch.color": INK, "hatch.linewidth": 0.7, "figure.dpi": 100,
        "text.parse_math": False,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def save(figure: Any, name: str, place: Callable[[str], File]) -> str:
    """Write NAME.png and NAME.svg, and return the SVG for a page.

    `place` says where a file of a name goes. By the canvases' own methods: `savefig` draws each once more beforehand.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn, pixels = io.StringIO(), io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
    figure.set_layout_engine("none")  # the layout is done, and takes as long as drawing
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(pixels)
    write_text(place(f"{name}.svg"), drawn.getvalue())
    write_bytes(place(f"{name}.png"), pixels.getvalue())
    return for_page(with_marks(figure, drawn.getvalue()), name)


def for_page(svg: str, name: str) -> str:
    """Return an SVG as part of a page: without its own head and size, names and colours that belong to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) version="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in variables().items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def variables() -> dict[str, str]:
    """Return colour on paper -> name of the page's variable for it."""
    return {colour: f"--c{number}" for number, colour in enumerate(ON_DARK)}
