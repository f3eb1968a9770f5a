"""Every rule, attack, mechanism and method gives the same bits in one process as over MPI. Runs under mpirun."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi import RunConfig, load_prompt, run
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.config import (
    ClientConfig,
    CommConfig,
    FederationConfig,
    LoRAConfig,
    OutputConfig,
    PoisonConfig,
    PrivacyConfig,
    PromptConfig,
    TaskConfig,
)
from fedprompt_mpi.federation.federation import Federation
from fedprompt_mpi.federation.prepare import prepare
from fedprompt_mpi.rules import registry
from fedprompt_mpi.run import run_rounds
from fedprompt_mpi.rundir.lock import DirectoryLock
from fedprompt_mpi.start.launcher import read_launch
from fedprompt_mpi.text.tasks import resolve
from tests.jobs import read_rounds

pytestmark = pytest.mark.mpi

CLIENTS, WAYS = 7, ("down", "up")
MIXED = ("fedavg", "median", "krum", "foolsgold", "fltrust", "outlier_check")
CASES: dict[str, dict[str, Any]] = {
    **{name: {"federation": {"aggregator": name}} for name in registry.aggregators},
    **{f"attack {name}": {"poison": {"clients": [1, 4], "attack": name, "boost": 2.0}} for name in registry.attacks},
    "alie, fitted": {"poison": {"clients": [1, 4, 6], "attack": "alie", "fitted": True}},
    "ipm, fitted, of a part": {
        "federation": {"aggregator": "median", "fraction": 0.5},
        "poison": {"clients": "all", "attack": "ipm", "fitted": True},
    },
    **{f"mixed {name}": {"federation": {"aggregator": name, "mixing": True}} for name in MIXED},
    "distributed trigger": {"poison": {"clients": "all", "rate": 0.2, "trigger": "cf mn", "distributed": True}},
    "momentum": {"federation": {"server_optimizer": "momentum", "noise_std": 0.01}},
    "adam": {"federation": {"server_optimizer": "adam", "server_lr": 0.1}},
    "yogi": {"federation": {"server_optimizer": "yogi", "server_lr": 0.1, "fraction": 0.5}},
    **{name: {"prompt": {"method": name}, "client": {"lr": 0.001}} for name in ("p_tuning", "prefix", "full")},
    "lora": {"prompt": {"method": "lora", "lora": LoRAConfig(rank=2)}, "client": {"lr": 0.01}},
    "lora, product, multi_krum": {
        "prompt": {"method": "lora", "lora": LoRAConfig(rank=3, aggregation="product")},
        "federation": {"aggregator": "multi_krum", "noise_std": 0.001},
        "client": {"lr": 0.01},
    },
    "lora, product, mixed": {
        "prompt": {"method": "lora", "lora": LoRAConfig(rank=3, aggregation="product", ranks=[1, 3])},
        "federation": {"aggregator": "krum", "mixing": True},
        "client": {"lr": 0.01},
    },
    "lora, ranks, proximal": {
        "prompt": {"method": "lora", "lora": LoRAConfig(rank=3, ranks=[2, 1, 3])},
        "client": {"lr": 0.01, "proximal": 0.1, "steps": 2},
    },
    "lora, freeze_a, reduce": {
        "prompt": {"method": "lora", "lora": LoRAConfig(rank=2, aggregation="freeze_a")},
        "comm": {"collective": "reduce"},
        "client": {"lr": 0.01},
    },
    "proximal": {"client": {"proximal": 0.1, "steps": 2}},
    "ldp": {"privacy": {"mechanism": "ldp"}},
    "dp_fedavg": {"federation": {"fraction": 0.3}, "privacy": {"mechanism": "dp_fedavg"}},
    "bfloat16": {"comm": {"wire": "bfloat16"}, "federation": {"fraction": 0.5, "rounds": 3}},
    "int8": {"comm": {"wire": "int8"}, "federation": {"rounds": 3}},
    "int8 with a trained server": {"comm": {"wire": "int8"}, "federation": {"aggregator": "fltrust"}},
    "int8 of NaN": {"comm": {"wire": "int8"}, "poison": {"clients": [1], "attack": "nan"}},
    "reduce": {"comm": {"collective": "reduce"}},
    "reduce norm_clip": {"comm": {"collective": "reduce"}, "federation": {"aggregator": "norm_clip", "clip_norm": 0.1}},
    "reduce dp_fedavg": {
        "comm": {"collective": "reduce"},
        "federation": {"fraction": 0.3},
        "privacy": {"mechanism": "dp_fedavg"},
    },
    "reduce without NaN": {"comm": {"collective": "reduce"}, "poison": {"clients": [1], "attack": "nan"}},
    "measure": {"comm": {"mode": "measure"}},
    "gpu_aware": {"comm": {"gpu_aware": True}},
    "clients evaluated": {"output": {"evaluate_clients": True}},
    "example filter": {
        "federation": {"filter_round": 2, "filter_cosine": 0.95, "filter_restart": True, "filter_groups": 3},
        "client": {"steps": 2},
        "poison": {"clients": "all", "rate": 0.5},
    },
    "example filter of opposite labels": {
        "federation": {"filter_round": 2, "filter_counterpart": 9, "filter_restart": True},
        "prompt": {"method": "prefix"},
        "client": {"steps": 2},
        "poison": {"clients": "all", "rate": 0.5},
        "task": {"max_train": 300},
    },
    "backdoor signal": {"output": {"backdoor_snr": True}, "poison": {"count": 2}},
    "empty cohorts": {"federation": {"fraction": 0.05}, "privacy": {"mechanism": "dp_fedavg"}},
}


def _config(case: dict[str, Any], directory: Path) -> RunConfig:
    return RunConfig(
        task=TaskConfig(**{"max_train": 70, "max_test": 16, **case.get("task", {})}),
        federation=FederationConfig(
            **{"clients": CLIENTS, "rounds": 2, "server_examples": 8, **case.get("federation", {})}
        ),
        prompt=PromptConfig(**case.get("prompt", {})),
        client=ClientConfig(**{"steps": 1, "batch_size": 4, "batched": 1, **case.get("client", {})}),
        poison=PoisonConfig(**case.get("poison", {"clients": [3]})),
        privacy=PrivacyConfig(**case.get("privacy", {})),
        comm=CommConfig(**case.get("comm", {})),
        output=OutputConfig(dir=str(directory), evaluate_every=2, report=False, **case.get("output", {})),
    )


def _alone(config: RunConfig) -> None:
    """Go through the run in this process, whatever the job's size."""
    channel, task = LocalChannel(), resolve(config.task)
    setup, checkpoint = prepare(config, task, channel, DirectoryLock(), 0.0)
    run_rounds(Federation(setup, checkpoint))
    channel.close()


@pytest.fixture(scope="module")
def job_and_folder() -> Any:
    """Return a channel of the test's own, and a folder that its ranks share."""
    channel = open_channel(read_launch())
    with channel.node_folder() as folder:
        for case in list(CASES)[channel.rank :: channel.size]:  # each rank goes through some of the runs alone
            _alone(_config(CASES[case], _place(folder, case) / "alone"))
        channel.agree(None)
        yield channel, folder
    channel.close()


def _place(folder: Path, case: str) -> Path:
    return folder / case.replace(" ", "-")


@pytest.mark.parametrize("name", CASES)
def test_same_bits_over_mpi(name: str, job_and_folder: Any) -> None:
    job, folder = job_and_folder
    root = _place(folder, name)
    run(_config(CASES[name], root / "mpi"))
    wrong = _difference(root / "mpi", root / "alone", approximate=name == "gpu_aware") if job.rank == 0 else None
    wrong = job.agree(wrong)  # all fail together, or rank 0 would leave the others waiting
    assert wrong is None, wrong


def _difference(ours: Path, theirs: Path, *, approximate: bool) -> str | None:
    """Return what differs between two runs, beside the time it took; None if nothing does.

    On a device norms are added up in another order: `approximate` lets their last bits differ.
    """
    a, b = load_prompt(ours).vector, load_prompt(theirs).vector
    if a.tobytes() != b.tobytes():
        return f"the vectors differ by up to {np.abs(a - b).max()}"
    for left, right in zip(read_rounds(ours), read_rounds(theirs), strict=True):
        for key in left:
            if key == "update_norms" and approximate:
                np.testing.assert_allclose(left[key], right[key], rtol=1e-12)
            elif key == "backdoor_snr":  # gradients are added up in another order
                assert (left[key] is None) == (right[key] is None)
                np.testing.assert_allclose(left[key] or 0.0, right[key] or 0.0, rtol=1e-6)
            elif key == "traffic":  # what goes between ranks beside the vectors depends on their number
                assert [(left[key] or {}).get(way) for way in WAYS] == [(right[key] or {}).get(way) for way in WAYS]
            elif key not in ("seconds", "loss", "backdoor_snr") and left[key] != right[key]:
                return f"round {left['round']}: {key} is {left[key]} over MPI and {right[key]} alone"
    if (filtered := _filtered(ours)) != _filtered(theirs):
        return "the example filter differs"
    if filtered and not filtered["left_out"]:
        return "the example filter leaves nothing out"
    return None if np.isfinite(a).all() else "the vector is not finite"


def _filtered(directory: Path) -> dict[str, Any]:
    """Return what a run's example filter did, beside the time it took; {} without one."""
    path = directory / "filtered.json"
    return {**json.loads(path.read_text()), "seconds": None} if path.exists() else {}
