"""Files of plug-ins, which are forgotten after each test."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fedprompt_mpi.plugins
from fedprompt_mpi.plugins import load
from fedprompt_mpi.rules.registry import REGISTRIES

GUIDE = (Path(fedprompt_mpi.plugins.__file__).parent / "README.md").read_text()
EXAMPLES: dict[str, str] = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE, flags=re.DOTALL))
"""The guide's: file name -> source."""


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Take out what is registered within."""
    yield
    for registry in REGISTRIES:
        for entry in list(registry.of_plugins().values()):
            registry.forget(entry.module)
            sys.modules.pop(entry.module, None)
    load._loaded.clear()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    with forgotten():
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return what writes a plug-in, by default an example of the guide, and returns its path."""

    def written(name: str, source: str | None = None) -> str:
        path = tmp_path / name
        path.write_text(EXAMPLES[name] if source is None else source)
        return str(path)

    return written
