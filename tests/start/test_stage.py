"""An environment as one archive, unpacked once on a node: the Python in it finds its packages at the new place."""

import subprocess
import sys
from pathlib import Path

from tests.jobs import REPOSITORY


def _stage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "launch" / "stage.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_environment_works_where_it_was_unpacked(tmp_path: Path) -> None:
    made, archive, local = tmp_path / "made", tmp_path / "made.tar", tmp_path / "local"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True, timeout=60)
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "theirs.py").write_text("VALUE = 3\n")
    assert _stage("pack", made, archive).returncode == 0
    (packages / "theirs.py").unlink()
    for _ in range(2):  # the second task of a node finds it there
        assert _stage("unpack", archive, local).returncode == 0
    told = subprocess.run(
        [local / "bin" / "python", "-c", "import theirs; print(theirs.VALUE, theirs.__file__)"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert told.startswith("3 ")
    assert str(local) in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "made", "made.tar"]


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    finished = _stage("pack", tmp_path, tmp_path / "a.tar")
    assert finished.returncode == 2
    assert "stage.sh pack VENV ARCHIVE.tar" in finished.stderr
    assert not (tmp_path / "a.tar").exists()
