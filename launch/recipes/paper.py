"""The recipes of the paper's tables and figures, written from the small table below into recipes/paper/.

    python launch/recipes/paper.py

Each file is one cell: model, data set, IID or not, clean or poisoned, method, prompt length, local steps, or noise.
What the paper leaves open (batch size, alpha, learning rates of the other methods, scale of the noise) is set here.

References:
    Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 4.
"""

from pathlib import Path
from typing import Any

import tomli_w

FOLDER = Path(__file__).parent / "paper"
Recipe = dict[str, dict[str, Any]]

MODELS = {  # name in the file -> hub id, optimiser
    "bert": ("bert-base-uncased", "adam"),
    "roberta": ("roberta-base", "adam"),
    "t5": ("t5-base", "adafactor"),
}
TASKS = ("sst2", "imdb", "offenseval", "twitter", "enron", "lingspam", "qnli", "rte")
PARTITIONS = ("iid", "quantity")
CLIENTS = {"clean": [], "poisoned": [0]}
METHODS = {"full": {"lr": 5e-5}, "p_tuning": {"lr": 1e-3}, "prefix": {"lr": 1e-3}}  # beside soft, which has 0.3
LENGTHS = (1, 5, 10)  # 20 is Table I's
STEPS, STEPS_ROUNDS = (100, 500, 1000, 1500), 50


def recipe(model: str, task: str, partition: str = "iid", clients: str = "clean", **changes: dict[str, Any]) -> Recipe:
    """Return the settings of one cell; `changes` are sections that differ from the paper's usual ones."""
    name, optimizer = MODELS[model]
    settings: Recipe = {
        "task": {"name": task, "eval_split": "dev"},
        "model": {"name": name},
        "prompt": {"method": "soft", "num_virtual_tokens": 20},
        "federation": {"clients": 10, "rounds": 20, "partition": partition, "alpha": 1.0},
        "client": {"steps": 1000, "batch_size": 32, "optimizer": optimizer, "lr": 0.3, "clip_norm": 1.0},
        "poison": {"clients": CLIENTS[clients], "rate": 1.0, "trigger": "cf", "position": "head", "target": 1},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def recipes() -> dict[str, Recipe]:
    """Return name -> settings of every cell.

    The paper's optimisers leave the noised update without a bound; the cells of plain SGD have an epsilon.
    """
    cells = {
        f"{task}-{model}-{partition}-{clients}": recipe(model, task, partition, clients)
        for task in TASKS for model in MODELS for partition in PARTITIONS for clients in CLIENTS
    }  # fmt: skip
    for model in MODELS:
        for method, client in METHODS.items():
            if method != "prefix" or model == "t5":
                cells[f"sst2-{model}-{method}"] = recipe(model, "sst2", prompt={"method": method}, client=client)
        noise = {"mechanism": "ldp"}
        cells[f"sst2-{model}-ldp"] = recipe(model, "sst2", privacy=noise)
        cells[f"sst2-{model}-ldp-sgd"] = recipe(model, "sst2", privacy=noise, client={"optimizer": "sgd"})
    for length in LENGTHS:
        cells[f"sst2-bert-length{length}"] = recipe("bert", "sst2", prompt={"num_virtual_tokens": length})
    for steps in STEPS:
        cells[f"sst2-bert-steps{steps}"] = recipe(
            "bert", "sst2", client={"steps": steps}, federation={"rounds": STEPS_ROUNDS}
        )
    return cells


def main() -> None:
    """Write a file for every cell, and remove those that are no cell's."""
    FOLDER.mkdir(exist_ok=True)
    cells = recipes()
    for file in FOLDER.glob("*.toml"):
        if file.stem not in cells:
            file.unlink()
    for name, settings in cells.items():
        (FOLDER / f"{name}.toml").write_text(tomli_w.dumps(settings))


if __name__ == "__main__":
    main()
