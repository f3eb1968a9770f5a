"""Imports go one way, without circles: a walk over the sources holds it."""

import ast
from pathlib import Path

import pytest

import fedprompt_mpi

PACKAGE = Path(fedprompt_mpi.__file__).parent

# part -> parts of the package that it may import, beside itself; a part comes after all that it imports
ALLOWED = {
    "start": set(),
    "rules": set(),
    "seeds": set(),
    "secagg": set(),
    "config": {"rules", "seeds"},
    "files": {"config"},
    "hub": set(),
    "liveness": {"start"},
    "text": {"hub", "files", "config", "rules", "seeds"},
    "plm": {"hub", "files", "config", "rules", "seeds"},
    "comm": {"liveness", "files", "config", "rules", "start"},
    "plugins": {"comm", "plm", "text", "files", "config", "rules", "seeds"},
    "audit": {"comm"},
    "rundir": {"audit", "plugins", "comm", "liveness", "files", "config", "rules", "start"},
    "federation": {
        "audit", "rundir", "plugins", "comm", "liveness", "plm", "text", "files", "config", "rules", "secagg",
        "seeds",
    },
    "report": {"audit", "rundir", "comm", "liveness", "files", "config", "rules"},
    "forecast": {"federation", "report", "rundir", "comm", "text", "files", "config", "rules"},
    "recovery": {"federation", "rundir"},
    "run": {"plugins", "recovery", "report", "federation", "rundir", "comm", "liveness", "text", "config", "start"},
    "commands": {
        "run", "forecast", "report", "federation", "audit", "rundir", "plugins", "comm", "liveness", "plm", "text",
        "files", "config", "rules", "start",
    },
    "__init__": {"run", "commands", "config"},
    "cli": {"commands", "plugins", "comm", "liveness", "plm", "files", "config", "start"},
    "__main__": {"cli", "start"},
}  # fmt: skip
WITHOUT_TORCH = {
    "audit", "cli", "comm", "config", "files", "forecast", "liveness", "report", "rules", "run", "secagg", "seeds",
    "start", "text",
}  # fmt: skip
"""Parts that import neither torch nor transformers, not even late."""


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


def test_the_order_has_no_circle() -> None:
    before: set[str] = set()
    for part, allowed in ALLOWED.items():
        assert allowed <= before, f"{part} imports what comes after it: {sorted(allowed - before)}"
        before.add(part)


def test_the_ground_floor_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9


@pytest.mark.parametrize(("module", "imports"), sorted(_modules().items()))
def test_imports_go_one_way(module: str, imports: set[str]) -> None:
    part = module.split(".")[0]
    assert part in ALLOWED, f"{module} is a new part: say what it may import"
    ours = {name.split(".")[1] for name in imports if name.startswith("fedprompt_mpi.")}
    assert ours <= ALLOWED[part] | {part}, f"{module} imports {sorted(ours - ALLOWED[part])}"
    outside = {name for name in imports if name.split(".")[0] in ("torch", "transformers", "mpi4py")}
    if part != "comm":
        assert not {name for name in outside if name.startswith("mpi4py")}
    if part in WITHOUT_TORCH:
        assert not {name for name in outside if not name.startswith("mpi4py")}


@pytest.mark.parametrize("part", [part for part in ALLOWED if (PACKAGE / part).is_dir()])
def test_modules_of_a_package_form_no_circle(part: str) -> None:
    """Imports for type checking alone do not count."""
    prefix = f"fedprompt_mpi.{part}."
    graph: dict[str, set[str]] = {}
    for path in (PACKAGE / part).rglob("*.py"):
        tree = ast.parse(path.read_text())
        typing_only = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node)}
        graph[path.stem] = {
            str(node.module).removeprefix(prefix).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and id(node) not in typing_only
            and (node.module or "").startswith(prefix)
        }
    while graph:
        free = {name for name, needed in graph.items() if not needed & set(graph) - {name}}
        assert free, f"a circle in {part}: {graph}"
        graph = {name: needed for name, needed in graph.items() if name not in free}
