"""What is written of somebody else's texts is text: to a spreadsheet, to Markdown, to LaTeX, to a terminal."""

import contextlib
import csv
import io
import shutil
from pathlib import Path

import pytest

from fedprompt_mpi.commands.export import export
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import CannotWriteError
from fedprompt_mpi.liveness.output import one_line, printable
from fedprompt_mpi.plm.adapter import Adapter
from fedprompt_mpi.report.inert import csv_cell, latex, markdown, markdown_code
from fedprompt_mpi.report.tables import Table
from tests.jobs import launch, run_here

FORMULAS = (
    "=1+1",
    "@SUM(A1)",
    "+cmd|' /C calc'!A0",
    "-2+3+cmd|'x'!A0",
    "\t=1+1",
    "\r=1+1",
    " =1+1",
    "a;=1+1",
    "=1\n=2",
)
FIGURES = ("-", "-0.52", "12.5 ± 0.3", "98.10 / 4.20", "+3", "1e-05", "-1.20 ± 0.10 / 5.00 ± 1.00")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_spreadsheet_computes_it(text: str) -> None:
    written = Table(name="t", caption="c", rows=[["a", "b"], [text, "1"]]).csv()
    (_, (cell, _)) = csv.reader(io.StringIO(written))
    for part in cell.replace("\t", ";").split(";"):
        assert part.lstrip()[:1] not in ("=", "+", "-", "@"), cell


@pytest.mark.parametrize("text", FIGURES)
def test_figures_stay_figures(text: str) -> None:
    assert csv_cell(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "x\n\n# No client was malicious",
        "`` ` ``",
        "a | b",
        "<script>",
        "[x](http://a.b)",
        "![x](y)",
        "```\nno\n```",
        "a\x1b[2J",
    ],
)
def test_markdown_has_one_line_of_text(text: str) -> None:
    """No heading, link, fence, cell or tag of somebody else's."""
    for made in (markdown(text), markdown_code(text)):
        assert "\n" not in made and "\x1b" not in made
        assert "|" not in made.replace("\\|", "")
    assert not {"<", "[", "`"} & set(markdown(text).replace("\\<", "").replace("\\[", "").replace("\\`", ""))
    fence = markdown_code(text)[: len(markdown_code(text)) - len(markdown_code(text).lstrip("`"))]
    assert fence not in markdown_code(text)[len(fence) : -len(fence)]


def test_latex_has_no_command() -> None:
    made = latex(r"\input{/etc/passwd} % x [2cm] $a^b_c$ #1 & ~")
    assert made == (
        r"\textbackslash{}input\{/etc/passwd\} \% x {[}2cm{]} \$a\textasciicircum{}b\_c\$ \#1 \& \textasciitilde{}"
    )


def test_a_terminal_is_not_steered() -> None:
    assert printable("a\x1b[2J\x07\r\x9b1m\u202eb\nc\td") == "a\\x1b[2J\\x07\\r\\x9b1m\\u202eb\nc\td"
    assert one_line("a\nfedprompt_mpi: b\tc") == "a\\nfedprompt_mpi: b\\tc"
    assert printable("größer – 差 \U0001f600") == "größer – 差 \U0001f600"


def test_messages_and_tables_of_a_job_are_printable(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[task]\nlabel_words = ["great\\u001b[2J\\nfedprompt_mpi: done", "terrible"]\n')
    finished = launch(1, "-m", "fedprompt_mpi", f"--config={recipe}", f"--output.dir={tmp_path / 'run'}")
    assert finished.status == 2, finished
    assert "\x1b" not in finished.out + finished.err
    assert finished.err.count("\n") == 1


def test_a_card_stays_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template and a trigger with headings, fences and cells in them."""
    (tmp_path / "m").symlink_to(Path(shutil.__file__).parent)
    run_here(
        tmp_path / "run", "--federation.rounds=1", "--poison.clients=[3]", "--poison.trigger=cf",
        "--task.template={text} it `| is ## {mask} .",
    )  # fmt: skip
    folder = export(tmp_path / "run", tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        "# embedded: a prompt tuned by federated learning"
    ]
    assert "``{text} it `\\| is ## {mask} .``" in card
    assert "**malicious**" in card


def test_no_adapter_without_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is written first: where it cannot be, nothing else is."""
    import numpy as np

    made = Adapter(config={}, tensors={"tokens": np.zeros((2, 3), dtype=np.float32)})
    (tmp_path / "README.md").mkdir()
    with contextlib.suppress(CannotWriteError):
        made.write(tmp_path, "card")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_settings_errors_are_printed_as_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        run_here(tmp_path / "run", "--model.name=a\nb")
    finished = launch(1, "-m", "fedprompt_mpi", "--model.name=a\x1b[2J\nb", f"--output.dir={tmp_path / 'run'}")
    assert finished.status == 2 and finished.err.count("\n") == 1 and "\x1b" not in finished.err, finished
