"""Nothing that a file brings along is ever run: no pickle, no eval, no remote code, and no file without a limit."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedprompt_mpi
from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import MOST_HEADER_BYTES, MOST_JSON_BYTES, read_json, read_toml
from fedprompt_mpi.rundir.prompt import read_prompt
from tests.jobs import REPOSITORY, launch, run_here

SOURCES = sorted(Path(fedprompt_mpi.__file__).parent.rglob("*.py")) + sorted((REPOSITORY / "launch").rglob("*.py"))
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy"}
"""Modules that make objects or run code of what they read."""
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
PICKLES_UNLESS_TOLD = {"torch.load", "torch.save", "mpi.pickle"}
PICKLES_IF_TOLD = {"allow_pickle", "trust_remote_code", "weights_only"}
LOWERCASE_MPI = {"bcast", "gather", "scatter", "allgather", "alltoall", "send", "recv", "isend", "irecv", "sendrecv"}
"""mpi4py's calls that pickle."""


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _found(source: Path) -> list[str]:
    """Return what a source has that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in RUNS_WHAT_IT_READS]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in RUNS_WHAT_IT_READS:
                found.append(module)
            case ast.Call(func=func, keywords=keywords):
                name = _dotted(func)
                if name in RUNS_TEXT | PICKLES_UNLESS_TOLD:
                    found.append(name)
                if name.endswith(".from_pretrained") and "trust_remote_code" not in {k.arg for k in keywords}:
                    found.append(f"{name}, which may ask whether to run code")
                if re.search(r"(comm|world|node|leaders)\.\w+$", name) and name.split(".")[-1] in LOWERCASE_MPI:
                    found.append(name)
                for keyword in keywords:
                    is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    if keyword.arg in PICKLES_IF_TOLD and not is_off:
                        found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_runs_what_it_reads(source: Path) -> None:
    is_loader = source == REPOSITORY / "fedprompt_mpi" / "plugins" / "load.py"  # of what the user has named
    assert _found(source) == (["exec", "compile"] if is_loader else [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=yes)",
        "AutoModel.from_pretrained(name)",
        "self._comm.bcast(thing)",
    ],
)
def test_the_walk_finds(line: str, tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(line)
    assert len(_found(tmp_path / "source.py")) == 1


UNPICKLES = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class" and watching:
        raise RuntimeError(f"unpickled {arguments}")
watching = False
sys.addaudithook(hook)
from fedprompt_mpi import run
from fedprompt_mpi.commands.settings import parse_settings
import datasets, torch, transformers  # what they do when they are imported is theirs
watching = True
for flags in (sys.argv[1:], [*sys.argv[1:], "--output.resume=true", "--federation.rounds=2"]):
    run(parse_settings(flags))
print("nothing was")
"""


def test_a_whole_run_and_its_resume_unpickle_nothing(tmp_path: Path) -> None:
    """Python itself says when it unpickles: data by `datasets`, a prompt to start from, checkpoints, files of a run."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        rows = "".join(f"a {'good' if k % 2 else 'bad'} film of {k},{k % 2}\n" for k in range(40))
        (data / f"{name}.csv").write_text(f"text,label\n{rows}")
    program = tmp_path / "program.py"
    program.write_text(UNPICKLES)
    finished = launch(
        1, str(program), "--task.name=sst2", f"--task.data={data}", "--federation.rounds=1", "--client.steps=1",
        f"--output.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert finished.status == 0, finished
    assert finished.out.endswith("nothing was\n")


def test_what_others_made_has_a_limit(tmp_path: Path) -> None:
    """A sparse file costs its author nothing; reading it would take memory of its apparent size."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    for read in (read_toml, read_json):
        with pytest.raises(ValueError, match="larger than"):
            read(large)
    with large.open("wb") as file:
        file.write((MOST_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2**40)
    with pytest.raises(SettingsError, match="for its header"):
        read_prompt(large)
    header = b'{"vector":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
    with large.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)
    with pytest.raises(SettingsError, match=r"1,099,511,627,858 bytes"):
        read_prompt(large)


def test_code_beside_a_model_is_not_run(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A model's folder may bring Python files and ask for them: the model is refused, or read without them."""
    folder, marker = tmp_path / "model", tmp_path / "was_run"
    shutil.copytree(tiny("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    for name, kind in (("AutoConfig", "Config"), ("AutoModelForMaskedLM", "Model"), ("AutoTokenizer", "Tokenizer")):
        config.setdefault("auto_map", {})[name] = f"theirs.{kind}"
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "theirs"}))
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(SettingsError, match=r"model\.name"):
        run_here(tmp_path / "run", f"--model.name={folder}", '--task.label_words=["terrible","great"]')
    (folder / "config.json").write_text(json.dumps(config))
    run_here(tmp_path / "run", f"--model.name={folder}", '--task.label_words=["terrible","great"]')
    assert not marker.exists()
