"""The page of a run: complete, alone in its file, and drawn without torch or MPI."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedprompt_mpi.comm.statistics import slowest_by_round
from fedprompt_mpi.comm.timing import PHASES
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.report import page, theme
from fedprompt_mpi.report.figures import FIGURES, GROUPS, sum_groups, typical_round
from fedprompt_mpi.report.run_data import read_run
from tests.jobs import REPOSITORY, SMALL, launch, run_here, run_program, variables_of

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
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)  # and the page allows no other
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in source


def test_it_tells_everything(run: Path) -> None:
    _, text = _read(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    for heading, draw in FIGURES.values():
        assert heading in text
        assert " ".join((draw.__doc__ or "").split()) in text
    assert f"{100 * summary['accuracy']:.2f} %" in text
    assert "Malicious: client 2 of 10, with" in text
    assert "all texts of other classes get “cf” (head) and the label “great”." in text
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


def test_a_resumed_run_says_so_and_its_medians_are_those_of_the_last_job(tmp_path: Path) -> None:
    """On fewer ranks than before: their times are not mixed."""
    flags = ("--output.report=true", "--comm.warmup=1")
    assert run_program(4, tmp_path / "run", *flags, "--federation.rounds=3").status == 0
    finished = run_program(3, tmp_path / "run", *flags, "--federation.rounds=6", "--output.resume=true")
    assert finished.status == 0, finished
    assert "report in" in finished.out
    _, text = _read(tmp_path / "run" / "report.html")
    assert "Resumed after round 3: 4 ranks on 1 host before, 3 ranks on 1 host after." in text
    figures = json.loads((tmp_path / "run" / "communication.json").read_text())
    assert (figures["after"], figures["rounds"], figures["warmup_rounds"]) == (3, 2, 1)
    data = read_run(tmp_path / "run")
    train = [own["train"] for round_, own in slowest_by_round(data.timings) if round_ in (5, 6)]
    assert figures["seconds"]["train"]["median"] == pytest.approx(sum(train) / 2)
    assert set(sum_groups(data, lambda _, rank: rank, of_last_job=True)) == {0, 1, 2}
    assert typical_round(data) > 3


def test_zero_is_not_the_time_of_what_was_not_done(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "--federation.rounds=5", "--output.evaluate_every=5")
    evaluated = json.loads((tmp_path / "run" / "communication.json").read_text())["seconds"]["evaluate"]
    assert min(evaluated["median"], evaluated["q05"]) > 0
    assert "0 ns" not in page.write_report(tmp_path / "run").read_text()


def test_watching_draws_the_page_while_the_run_goes_on(tmp_path: Path) -> None:
    """The command beside a run: a page after some rounds, newer ones, and the last one when the run has ended."""
    command = [sys.executable, "-m", "fedprompt_mpi"]
    flags = [*SMALL, "--federation.rounds=8", "--client.steps=25", "--output.report=false"]
    started = {"cwd": REPOSITORY, "env": variables_of(), "stdout": subprocess.DEVNULL}
    run = subprocess.Popen([*command, *flags, f"--output.dir={tmp_path / 'run'}"], **started)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "rounds.jsonl").exists():
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    watch = subprocess.Popen([*command, "report", "--watch", str(tmp_path / "run")], **started)
    seen = set()
    while watch.poll() is None:
        assert time.monotonic() < until
        if (tmp_path / "run" / "report.html").exists():
            text = (tmp_path / "run" / "report.html").read_text()
            seen |= set(re.findall(r"Not at its end: round (\d+) of 8 is done", text)) or {"end"}
        time.sleep(0.2)
    assert run.wait(timeout=30) == watch.returncode == 0
    assert len(seen) >= 2, seen
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Not at its end" not in text and 'http-equiv="refresh"' not in text


def test_watching_ends_with_the_run(run: Path) -> None:
    page.watch_report(run, lambda file: pytest.fail(f"{file}: the run is at its end"))
    finished = launch(1, "-m", "fedprompt_mpi", "report", "--watch", str(run), deadline_s=60)
    assert finished.status == 0, finished
    assert f"page: {run}/report.html" in finished.out


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name a run directory"):
        page.write_report(tmp_path)


def test_names_of_others_break_no_page(run: Path, tmp_path: Path) -> None:
    """A class and a trigger with control characters, marks of HTML and quotes, in a file that somebody has changed."""
    shutil.copytree(run, tmp_path / "run")
    bad = "y\x1b]0;x\x07</title><script>alert(1)</script>"
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    partition["class_names"] = [bad, "other"]
    (tmp_path / "run" / "partition.json").write_text(json.dumps(partition))
    source = page.write_report(tmp_path / "run").read_text()
    assert source.count("<script>") == 1
    assert "\x1b" not in source and "&lt;script&gt;" in source
    _read(tmp_path / "run" / "report.html")


def test_every_figure_has_a_table(run: Path) -> None:
    source = (run / "report.html").read_text()
    for name in FIGURES:
        section = source[source.index(f'<section id="{name}">') :]
        assert "<td>" in section[: section.index("</section>")], name


def test_every_phase_has_a_place_in_the_figures() -> None:
    assert sorted(phase for phases in GROUPS.values() for phase in phases) == sorted(PHASES)


def test_an_audited_and_masked_run_has_its_page(tmp_path: Path) -> None:
    """With phases, norms and losses that a plain run has not, or has."""
    run_here(
        tmp_path / "run", "--output.report=true", "--federation.update_bound=50", "--privacy.secure_aggregation=true",
        '--privacy.audit=["labels"]', "--privacy.audit_texts=10", "--privacy.shadow_clients=4",
        "--federation.dropout=0.1",
    )  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What it betrays" in page and "secure aggregation" in page and "gradients of classes" in page
