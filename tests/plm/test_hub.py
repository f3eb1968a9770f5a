"""A hub id whose snapshot is in the cache works offline, on several ranks; without it there is one message."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.jobs import SMALL, launch

REVISION = "0123456789abcdef0123456789abcdef01234567"


def _cache(model: Path, home: Path) -> None:
    """Lay a model out as the hub's client caches it."""
    folder = home / "hub" / "models--somebody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    shutil.copytree(model, folder / "snapshots" / REVISION)


def test_offline(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    _cache(tiny("bert"), tmp_path / "home")
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    flags = [*SMALL, f"--output.dir={tmp_path / 'run'}"]
    found = launch(2, "-m", "fedprompt_mpi", *flags, "--model.name=somebody/tiny", environment=variables)
    assert found.status == 0, found
    assert (tmp_path / "run" / "summary.json").exists()
    flags[-1] = f"--output.dir={tmp_path / 'other'}"
    missing = launch(2, "-m", "fedprompt_mpi", *flags, "--model.name=somebody/else", environment=variables)
    assert missing.status == 2
    assert missing.err.count("model.name is 'somebody/else'") == 1
