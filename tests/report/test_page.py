"""The page of a run: complete, alone in its file, and drawn without torch or MPI."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.report import page, theme
from fedprompt_mpi.report.figures import FIGURES
from tests.jobs import launch, run_program

FLAGS = ("--poison.clients=[2]", "--federation.rounds=3", "--output.report=true")
VOID = {"meta", "link", "br", "img"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run on three ranks, which has drawn its own page."""
    directory = tmp_path_factory.mktemp("page") / "run"
    finished = run_program(3, directory, *FLAGS)
    assert finished.status == 0, finished
    assert f"report in {directory}/report.html" in finished.out
    return directory


class _Reader(HTMLParser):
    """Collects what a page has, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(file: Path) -> tuple[_Reader, str]:
    reader = _Reader()
    reader.feed(file.read_text())
    assert not reader.open
    return reader, " ".join(" ".join(reader.text).split())


def test_it_is_one_file_that_needs_no_network(run: Path) -> None:
    reader, _ = _read(run / "report.html")
    assert len(reader.ids) == len(set(reader.ids))
    local = {f"#{name}" for name in reader.ids} | {"data:,"}
    assert set(reader.links) <= local
    source = (run / "report.html").read_text()
    assert set(re.findall(r"url\((.*?)\)", source)) <= local
    assert "<script" not in source


def test_it_tells_everything(run: Path) -> None:
    _, text = _read(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    for heading, draw in FIGURES.values():
        assert heading in text
        assert " ".join((draw.__doc__ or "").split()) in text
    assert f"{summary['accuracy']:.2%}" in text
    assert "Malicious: client 2; trigger “cf”" in text
    assert "2 (malicious)" in text  # readable without the figure
    assert "[federation]" in text
    for name in FIGURES:
        assert (run / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        assert "mathdefault" not in (run / "figures" / f"{name}.svg").read_text()  # ticks that were not set as formulas
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["observe", "measure"])
def test_wait_and_transfer_are_told_apart_where_they_are_measured(mode: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    timings = (run / "timings.csv").read_text()
    if mode == "measure":
        synchronised = [line.replace("broadcast", "sync") for line in timings.splitlines() if "broadcast" in line]
        (tmp_path / "run" / "timings.csv").write_text(timings + "\n".join(synchronised) + "\n")
    source = page.write_report(tmp_path / "run").read_text()
    figure = (tmp_path / "run" / "figures" / "seconds-by-rank.svg").read_text()
    told = {name for name in ("wait", "transfer", "wait + transfer") if f'<th scope="col">{name}</th>' in source}
    assert told == ({"wait + transfer"} if mode == "observe" else {"wait", "transfer"})
    assert ("wait + transfer" in figure) == (mode == "observe")


def test_colours_are_the_page_s(run: Path) -> None:
    """What a figure is drawn in on paper becomes a variable, so that a dark screen shows other colours."""
    source = (run / "report.html").read_text()
    body = source[source.index("<body>") :]
    for colour in theme.ON_DARK:
        assert colour not in body
        assert colour in source
    assert "prefers-color-scheme: dark" in source


def test_it_takes_neither_torch_nor_mpi(run: Path) -> None:
    program = (
        "import sys, fedprompt_mpi.cli as cli, fedprompt_mpi.liveness.liveness as live\n"
        "end = live.end_process\n"
        "def told(status, **named):\n"
        "    print(sorted({'torch', 'mpi4py', 'transformers'} & set(sys.modules)))\n    end(status, **named)\n"
        "live.end_process = told\n"
        "cli.main(['report', sys.argv[1]])"
    )
    (run / "report.html").unlink()
    finished = launch(1, "-c", program, str(run), deadline_s=60)
    assert finished.out.endswith("[]\n"), finished
    assert f"page: {run}/report.html" in finished.out
    assert (run / "report.html").exists()


def test_a_run_under_way_has_a_page_that_loads_itself_again(run: Path, tmp_path: Path) -> None:
    for name in ("config.toml", "environment.json", "partition.json"):
        (tmp_path / name).write_text((run / name).read_text())
    (tmp_path / "rounds.jsonl").write_text("".join((run / "rounds.jsonl").read_text().splitlines(keepends=True)[:2]))
    source = page.write_report(tmp_path, refresh_s=5).read_text()
    assert '<meta http-equiv="refresh" content="5">' in source
    assert "Not at its end: round 1 of 3 is done." in source
    _read(tmp_path / "report.html")
    (tmp_path / "rounds.jsonl").unlink()
    _read(page.write_report(tmp_path))
    assert '<meta http-equiv="refresh"' not in (run / "report.html").read_text()


def test_watching_ends_with_the_run(run: Path) -> None:
    page.watch_report(run, lambda file: pytest.fail(f"{file}: the run is at its end"))
    finished = launch(1, "-m", "fedprompt_mpi", "report", "--watch", str(run), deadline_s=60)
    assert finished.status == 0, finished
    assert f"page: {run}/report.html" in finished.out


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name a run directory"):
        page.write_report(tmp_path)
