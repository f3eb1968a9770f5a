"""The page in a real browser: it loads without errors, and is light or dark as the reader has chosen."""

import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from fedprompt_mpi.report.page import write_report
from tests.jobs import run_here

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MODES = {"light": 1, "dark": 0}
"""As Chromium numbers them."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser (Debian: chromium)")


def _look(page: Path, mode: str, picture: Path) -> list[str]:
    """Load a page, take a picture of it, and return what the browser complains of."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            "--window-size=1000,3600", f"--blink-settings=preferredColorScheme={MODES[mode]}",
            f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("browser") / "run"
    run_here(directory, "--poison.clients=[2]")
    return write_report(directory)


@pytest.mark.parametrize("mode", MODES)
def test_it_loads_without_errors(mode: str, page: Path, tmp_path: Path) -> None:
    assert _look(page, mode, tmp_path / "picture.png") == []
    picture = imread(tmp_path / "picture.png")[..., :3]
    assert picture.shape[:2] == (3600, 1000)
    brightness = float(picture[:, :8].mean())  # of the margin
    assert brightness > 0.95 if mode == "light" else brightness < 0.1
    assert picture.std() > 0.05  # something is drawn


def test_errors_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<script>throw new Error('broken')</script>")
    assert len(_look(tmp_path / "broken.html", "light", tmp_path / "picture.png")) == 1
