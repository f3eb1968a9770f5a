"""The main job on real text with a real PLM, where there is one to be had (FEDPROMPT_SHARED names the folder)."""

import os
from pathlib import Path

import pytest

from fedprompt_mpi import RunConfig, run
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import ClientConfig, FederationConfig, ModelConfig, OutputConfig, TaskConfig
from tests.jobs import REPOSITORY

SHARED = Path(os.environ.get("FEDPROMPT_SHARED", "/nonexistent"))
DATA, MODEL = SHARED / "data", SHARED / "models" / "minilm-mlm"

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs real text and a real PLM: set FEDPROMPT_SHARED to a folder with data/ and models/"
)

# known task -> its folder
FOLDERS = {
    "sst2": "sst2", "sst2-glue": "sst2-glue", "imdb": "imdb", "offenseval": "offenseval", "twitter": "twitter-abuse",
    "enron": "enron-spam", "lingspam": "lingspam", "qnli": "qnli", "rte": "rte", "trec6": "trec6",
    "airline": "airline-tweets",
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_known_tasks(name: str, tmp_path: Path) -> None:
    """Each of the known tasks loads its real files and goes through a round."""
    partition = "natural" if name in ("imdb", "enron", "airline") else "quantity"
    task = TaskConfig(name=name, data=str(DATA / FOLDERS[name]), max_train=400, max_test=30)
    summary = run(
        RunConfig(
            task=task,
            model=ModelConfig(name=str(MODEL)),
            federation=FederationConfig(clients=4, partition=partition, rounds=1),
            client=ClientConfig(steps=1, batch_size=2),
            output=OutputConfig(dir=str(tmp_path / "run"), report=False),
        )
    )
    assert summary["parameters"] == 20 * 384
    assert summary["plm_parameters"] == 22_744_506


METHODS = ("soft", "p_tuning", "prefix", "lora", "bitfit", "full")
RECIPES = (*(f"sst2-{method}" for method in METHODS), "backdoor-sst2", "backdoor-lingspam")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, tmp_path: Path) -> None:
    folder = "lingspam" if "lingspam" in recipe else "sst2"
    flags = [
        f"--config={REPOSITORY / 'launch' / 'recipes' / recipe}.toml", f"--task.data={DATA / folder}",
        f"--model.name={MODEL}", "--task.max_train=100", "--task.max_test=20", "--federation.rounds=1",
        "--federation.clients=2", "--client.steps=2", "--output.evaluate_every=1", "--output.report=false",
        f"--output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert run(parse_settings(flags))["rounds"] == 1
    assert (tmp_path / "run" / "prompt.safetensors").exists()
