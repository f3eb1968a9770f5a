"""The pages in a real browser: no errors, values under the pointer; nothing too wide, faint, small or long."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt_mpi.report.comparison import read_groups, write_comparison
from fedprompt_mpi.report.page import write_report
from tests.browser import BROWSER, Browser
from tests.jobs import run_here

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser (Debian: chromium)")
LEAST_CONTRAST, LEAST_TEXT_PX, MOST_SHEETS, MOST_BYTES = 4.5, 11.0, 4, 5_000_000
DRAWN_TEXT = 11.0
"""The smallest letters of a figure, in its own units: `legend.fontsize` in theme.py."""

CONTRASTS = """(() => {
  const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = light(getComputedStyle(document.body).backgroundColor), found = [];
  for (const element of document.querySelectorAll("body *:not(script)")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("svg") || element.hidden) continue;
    const ink = light(getComputedStyle(element).color), [a, b] = [Math.max(ink, ground), Math.min(ink, ground)];
    found.push((a + 0.05) / (b + 0.05));
  }
  return Math.min(...found);
})()"""
SMALLEST = """(() => {
  const sizes = [...document.querySelectorAll("body *:not(script)")]
    .filter((e) => !e.closest("svg") && !e.hidden && e.textContent.trim())
    .map((e) => parseFloat(getComputedStyle(e).fontSize));
  const drawn = [...document.querySelectorAll("figure svg")]
    .map((s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width);
  return [Math.min(...sizes), Math.min(...drawn)];
})()"""
CENTRE = "(() => { const b = %s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a page of each kind: clean, poisoned, resumed, and a comparison of all."""
    root = tmp_path_factory.mktemp("browser")
    flags = ["--federation.rounds=4", "--client.steps=5"]
    run_here(root / "clean", *flags, "--poison.trigger=cf")
    run_here(root / "poisoned", *flags, "--poison.clients=[2]", f"--poison.clean_run={root / 'clean'}")
    run_here(root / "resumed", *flags, "--federation.rounds=2")
    run_here(root / "resumed", *flags, "--output.resume=true")
    found = {name: write_report(root / name) for name in ("clean", "poisoned", "resumed")}
    (root / "side by side").mkdir()
    groups = read_groups([root / name for name in found])
    return {**found, "side by side": write_comparison(groups, root / "side by side")[0]}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


KINDS = ("clean", "poisoned", "resumed", "side by side")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_too_wide_too_faint_or_too_small(
    width: int, dark: bool, kind: str, pages: dict[str, Path], browser: Browser
) -> None:
    browser.complaints.clear()
    browser.load(pages[kind], width=width, dark=dark)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRASTS) >= LEAST_CONTRAST
    letters, scale = browser.evaluate(SMALLEST)
    assert letters >= LEAST_TEXT_PX
    assert scale * DRAWN_TEXT >= LEAST_TEXT_PX
    brightness = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert brightness == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert pages[kind].stat().st_size < MOST_BYTES


def test_a_value_stands_under_the_pointer(pages: dict[str, Path], browser: Browser) -> None:
    browser.load(pages["poisoned"], height=1600)
    point = "document.querySelector('#rates use[data-tip^=\"round 3: accuracy\"]')"
    text = browser.evaluate(f"{point}.dataset.tip")
    assert re.fullmatch(r"round 3: accuracy \d+\.\d\d % \(\d+\.\d to \d+\.\d\)", text)
    browser.mouse("mouseMoved", *browser.evaluate(CENTRE % point))
    assert browser.evaluate("[document.querySelector('.tip').hidden, document.querySelector('.tip').textContent]") == [
        False, text,
    ]  # fmt: skip
    bar = "document.querySelector('#partition .mark[data-tip^=\"client 2: \"]')"
    browser.mouse("mouseMoved", *browser.evaluate(CENTRE % bar))
    assert browser.evaluate("document.querySelector('.tip').textContent").startswith("client 2: ")
    browser.mouse("mouseMoved", 5, 5)
    assert browser.evaluate("document.querySelector('.tip').hidden")


def test_a_legend_hides_what_it_names_and_a_part_can_be_enlarged(pages: dict[str, Path], browser: Browser) -> None:
    browser.load(pages["poisoned"], height=1600)
    shown = (
        "[...document.querySelectorAll('#rates .mark')].filter((m) => getComputedStyle(m).display !== 'none').length"
    )
    before = browser.evaluate(shown)
    key = "document.querySelector('#rates .key[data-series=\"accuracy\"]')"
    browser.click(*browser.evaluate(CENTRE % key))
    assert browser.evaluate(shown) == before - 2  # the line, and the band of its interval
    browser.click(*browser.evaluate(CENTRE % key))
    assert browser.evaluate(shown) == before

    svg = "document.querySelector('#rates svg')"
    whole = browser.evaluate(f"{svg}.getAttribute('viewBox')")
    x, y = browser.evaluate(CENTRE % svg)
    browser.mouse("mousePressed", x - 60, y - 40)
    browser.mouse("mouseMoved", x + 60, y + 40)
    browser.mouse("mouseReleased", x + 60, y + 40)
    part = browser.evaluate(f"{svg}.getAttribute('viewBox')")
    assert part != whole and float(part.split()[2]) < float(whole.split()[2])
    browser.click(x, y, times=2)
    assert browser.evaluate(f"{svg}.getAttribute('viewBox')") == whole


def test_the_table_of_runs_is_first_and_sorts(pages: dict[str, Path], browser: Browser) -> None:
    browser.load(pages["side by side"])
    assert browser.evaluate("document.querySelector('main h2').textContent") == "All runs"
    head = browser.evaluate("[...document.querySelectorAll('#runs th')].map((h) => h.textContent)")
    assert head[0] == "run" and head[-7:-1] == ["accuracy, %", "macro F1", "before, %", "ASR, %", "bytes", "seconds"]
    assert head[-1] == "malicious weight, %"
    column = head.index("accuracy, %")
    cells = f"[...document.querySelectorAll('#runs tbody tr')].map((r) => Number(r.cells[{column}].dataset.value))"
    unsorted = browser.evaluate(cells)
    button = f"document.querySelectorAll('#runs th button')[{column}]"
    browser.click(*browser.evaluate(CENTRE % button))
    assert browser.evaluate(cells) == sorted(unsorted)
    browser.click(*browser.evaluate(CENTRE % button))
    assert browser.evaluate(cells) == sorted(unsorted, reverse=True)
    wide = "document.querySelector('#runs table').scrollWidth <= document.querySelector('#runs .scroll').clientWidth"
    assert browser.evaluate(wide)


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_on_a_few_sheets(kind: str, pages: dict[str, Path], browser: Browser) -> None:
    browser.load(pages[kind])
    pdf = browser.print_pdf()
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= MOST_SHEETS


def test_errors_would_be_seen(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "broken.html").write_text("<script>throw new Error('broken')</script>")
    browser.complaints.clear()
    browser.load(tmp_path / "broken.html")
    assert len(browser.complaints) == 1
    (tmp_path / "stranger.html").write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"script-src 'sha256-x'\"><script>1</script>"
    )
    browser.complaints.clear()
    browser.load(tmp_path / "stranger.html")
    assert browser.complaints
    browser.complaints.clear()
