"""Imports go one way (see the README's tree): a walk over the sources holds it."""

import ast
from pathlib import Path

import pytest

import fedprompt_mpi

PACKAGE = Path(fedprompt_mpi.__file__).parent
TORCH = {"torch", "transformers", "safetensors.torch"}
MAKER = "plm.embedded.make"  # makes the embedded PLM, from its text; no part of the program

# part -> parts of the package that it may import
ALLOWED = {
    "config": set(),
    "seeds": set(),
    "files": {"config"},
    "comparable": set(),
    "lock": {"files"},
    "text": {"text", "config", "seeds"},
    "plm": {"plm", "files", "config", "seeds"},
    "comm": {"comm", "config", "seeds"},
    "federation": {"federation", "comm", "plm", "text", "comparable", "lock", "files", "config", "seeds"},
    "records": {"comm", "lock", "files", "config"},
    "console": {"config"},
    "cost": {"plm", "config"},
    "prepare": {"federation", "comm", "plm", "text", "records", "lock", "files", "config", "seeds"},
    "journal": {"prepare", "federation", "comm", "text", "records", "scalars", "report", "console", "config"},
    "scalars": set(),
    "run": {
        "journal",
        "prepare",
        "federation",
        "comm",
        "plm",
        "text",
        "records",
        "console",
        "lock",
        "files",
        "config",
        "seeds",
    },
    "measure": {"comm", "plm", "cost", "report", "records", "files", "config"},
    "report": {"report", "comm", "records", "console", "comparable", "files", "config"},
    "predict": {"federation", "plm", "text", "files", "config"},
    "export": {"predict", "plm", "text", "files", "config"},
    "sweep": {"comm", "comparable", "files", "config"},
    "cli": {"run", "sweep", "predict", "export", "measure", "report", "cost", "comm", "files", "config"},
    "__init__": {"run", "predict", "config"},
    "__main__": {"cli"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _modules() -> dict[str, set[str]]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): _imports(path) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize(("module", "imports"), sorted(_modules().items()))
def test_imports_go_one_way(module: str, imports: set[str]) -> None:
    part = module.split(".")[0]
    assert part in ALLOWED, f"{module} is a new part: say what it may import"
    ours = {name.split(".")[1] for name in imports if name.startswith("fedprompt_mpi.")}
    if module != MAKER:
        assert ours <= ALLOWED[part], f"{module} imports {sorted(ours - ALLOWED[part])}"
    outside = {name for name in imports if name.split(".")[0] in ("torch", "transformers", "mpi4py")}
    if part != "comm":
        assert not {name for name in outside if name.startswith("mpi4py")}
    if part in ("text", "comm", "records", "files", "config", "seeds"):
        assert not {name for name in outside if not name.startswith("mpi4py")}
