"""The program as a user starts it: same bits on any number of ranks, every file there, one message on bad input."""

import csv
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi import RunConfig, SettingsError, load_prompt, run
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.rundir.closing_table import format_poisoned
from fedprompt_mpi.rundir.formats import format_epsilon
from tests.jobs import find_mpirun, is_open_mpi, launch, read_rounds, run_here, run_program


def _vector(directory: Path) -> np.ndarray:
    return load_prompt(directory).vector


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / "run"
    # as many threads as it likes: the bits must not depend on them
    finished = run_program(
        1, directory, "--client.batched=1", "--poison.trigger=cf", environment={"OMP_NUM_THREADS": None}
    )
    assert finished.status == 0, finished
    return directory


@pytest.mark.parametrize("ranks", [2, 11])  # and 4: tests/mpi/test_rules.py
def test_same_bits_on_any_number_of_ranks(ranks: int, one_process: Path, tmp_path: Path) -> None:
    finished = run_program(ranks, tmp_path / "run", "--client.batched=1", "--poison.trigger=cf")
    assert finished.status == 0, finished
    assert _vector(tmp_path / "run").tobytes() == _vector(one_process).tobytes()
    ours, theirs = read_rounds(tmp_path / "run"), read_rounds(one_process)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("round", "accuracy", "macro_f1", "cohort", "update_norms", "train_loss", "bytes_up"):
            assert a[key] == b[key]


def test_one_pass_of_all_clients_is_close_to_one_by_one(one_process: Path, tmp_path: Path) -> None:
    run_here(tmp_path / "run", "--client.optimizer=sgd")
    run_here(tmp_path / "by_one", "--client.optimizer=sgd", "--client.batched=1")
    difference = np.abs(_vector(tmp_path / "run") - _vector(tmp_path / "by_one")).max()
    assert difference < 1e-5


def test_the_run_directory(one_process: Path) -> None:
    assert {path.name for path in one_process.iterdir()} == {
        "config.toml", "environment.json", "partition.json", "rounds.jsonl", "timings.csv", "prompt.safetensors",
        "summary.json", "checkpoint", "communication.json",
    }  # fmt: skip
    rounds = read_rounds(one_process)
    assert [record["round"] for record in rounds] == [0, 1, 2]
    for record in rounds:
        assert {"accuracy", "macro_f1", "loss", "attack_success_rate", "train_loss", "cohort", "update_norms",
                "bytes_down", "bytes_up", "seconds"} <= set(record)  # fmt: skip
        assert set(record["seconds"]) == {"train", "wait", "transfer", "aggregate", "evaluate", "total"}
    assert rounds[1]["bytes_up"] == 10 * 2560 * 4
    summary = json.loads((one_process / "summary.json").read_text())
    assert summary["parameters"] == 2560
    assert summary["bytes_per_client_round"] == 10240
    assert summary["accuracy"] == rounds[-1]["accuracy"]
    environment = json.loads((one_process / "environment.json").read_text())
    assert set(environment) == {"versions", "mpi", "compute_dtype", "dropout", "plugins", "ranks", "earlier"}
    assert environment["mpi"]["library"] == "none (one process)"
    assert set(environment["mpi"]) == {"library", "transport", "thread_level", "survives", "clock_resolution_s"}
    assert [set(rank) for rank in environment["ranks"]] == [{"rank", "host", "node", "device", "threads", "cores"}]
    communication = json.loads((one_process / "communication.json").read_text())
    assert (communication["mode"], communication["rounds"], communication["warmup_rounds"]) == ("observe", 1, 1)
    assert communication["seconds"]["train"]["median"] == pytest.approx(rounds[2]["seconds"]["train"], rel=0.05)
    prompt = load_prompt(one_process)
    assert prompt.metadata["method"] == "soft"
    assert prompt.effective is not None
    np.testing.assert_array_equal(prompt.effective.ravel(), prompt.vector)
    with (one_process / "timings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"round", "rank", "phase", "seconds", "bytes"}
    assert {"train", "evaluate", "aggregate"} <= {row["phase"] for row in rows}


def test_no_name_in_a_file_for_others_ends_with_an_underscore(one_process: Path) -> None:
    for name in ("rounds.jsonl", "summary.json", "environment.json", "partition.json", "communication.json"):
        assert re.findall(r'"\w+_"\s*:', (one_process / name).read_text()) == [], name


def test_its_config_repeats_the_run(one_process: Path, tmp_path: Path) -> None:
    settings = tomllib.loads((one_process / "config.toml").read_text())
    assert settings["client"]["batched"] == 1
    run(parse_settings([f"--config={one_process / 'config.toml'}", f"--output.dir={tmp_path / 'again'}"]))
    assert _vector(tmp_path / "again").tobytes() == _vector(one_process).tobytes()


def test_two_rounds_are_one_and_a_resumed_one(one_process: Path, tmp_path: Path) -> None:
    """Resumed on another number of ranks: the same bits, and no round twice or missing."""
    directory = tmp_path / "run"
    run_here(directory, "--client.batched=1", "--federation.rounds=1")
    begun = (directory / "config.toml").read_text()
    finished = run_program(3, directory, "--client.batched=1", "--output.resume=true")
    assert finished.status == 0, finished
    assert _vector(directory).tobytes() == _vector(one_process).tobytes()
    assert (directory / "config.toml").read_text() == begun.replace("\nrounds = 1", "\nrounds = 2")
    rounds = read_rounds(directory)
    assert [record["round"] for record in rounds] == [0, 1, 2]
    assert all(record["seconds"]["train"] > 0 for record in rounds[1:])
    assert [r["accuracy"] for r in rounds] == [r["accuracy"] for r in read_rounds(one_process)]
    with pytest.raises(SettingsError, match=r"client\.lr = 0\.3 \(now 0\.1\)"):
        run_here(directory, "--client.batched=1", "--output.resume=true", "--client.lr=0.1")


def test_a_part_of_the_clients(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "--federation.fraction=0.3", "--output.evaluate_every=2")
    first, second = read_rounds(tmp_path / "run")[1:]
    assert len(first["cohort"]) == len(second["cohort"]) == 3
    assert first["cohort"] != second["cohort"]
    assert "accuracy" not in first
    assert "accuracy" in second


def test_what_is_not_finite_is_left_out_and_named(tmp_path: Path) -> None:
    flags = ("--poison.clients=[2]", "--poison.attack=nan")
    finished = run_program(3, tmp_path / "run", *flags)
    assert finished.status == 0, finished
    for record in read_rounds(tmp_path / "run")[1:]:
        assert record["dropped"] == [2]
        assert record["update_norms"][2] is None
        assert record["shares"][2] == 0
        assert sum(record["shares"]) == pytest.approx(1)
    assert "round 1/2" in finished.out and "not finite, left out: 2" in finished.out
    (line,) = [line for line in finished.out.splitlines() if line.startswith("  not finite, left out")]
    assert line.endswith("2 updates (client 2: 2)")
    assert np.isfinite(_vector(tmp_path / "run")).all()


def test_what_is_remembered_survives_a_resume_on_other_ranks(tmp_path: Path) -> None:
    """What an attacker saw, the rule's history, the optimiser's moments: the same bits."""
    flags = (
        "--client.batched=1", "--federation.aggregator=foolsgold", "--poison.clients=[0, 6]",
        "--poison.attack=neurotoxin", "--poison.neurotoxin_share=0.5", "--federation.server_optimizer=yogi",
        "--federation.server_lr=0.1",
    )  # fmt: skip
    _check_resumed(tmp_path, *flags)


def test_what_a_short_format_left_behind_survives_a_resume_on_other_ranks(tmp_path: Path) -> None:
    _check_resumed(tmp_path, "--client.batched=1", "--comm.wire=int8", "--federation.fraction=0.5")


def _check_resumed(tmp_path: Path, *flags: str) -> None:
    """Compare three rounds in one go with one in one process and two more on three ranks."""
    run_here(tmp_path / "whole", *flags, "--federation.rounds=3")
    run_here(tmp_path / "run", *flags, "--federation.rounds=1")
    resumed = run_program(3, tmp_path / "run", *flags, "--federation.rounds=3", "--output.resume=true")
    assert resumed.status == 0, resumed
    assert _vector(tmp_path / "run").tobytes() == _vector(tmp_path / "whole").tobytes()


def test_the_clean_run_stands_beside_the_poisoned_one(
    one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--client.batched=1", "--poison.clients=[1]", f"--poison.clean_run={one_process}",
        "--output.evaluate_clients=true", "--federation.rounds=3",
    )  # fmt: skip
    summary = run_here(tmp_path / "run", *flags)
    printed = capsys.readouterr().out
    *matching, longer = read_rounds(tmp_path / "run")
    assert longer["clean_attack_success_rate"] is None  # the clean run ended before
    for ours, theirs in zip(matching, read_rounds(one_process), strict=True):
        clean = theirs["attack_success_rate"]
        assert ours["clean_attack_success_rate"] == clean
        assert f"(clean {100 * clean:.2f} %)" in printed
        if ours["round"]:
            assert len(ours["client_accuracy"]) == len(ours["client_attack_success_rate"]) == 10
    rates = read_rounds(tmp_path / "run")[-1]["client_attack_success_rate"]
    assert summary["malicious_clients_attack_success_rate"] == rates[1]
    assert summary["honest_clients_attack_success_rate"] == pytest.approx((sum(rates) - rates[1]) / 9)
    assert "clean run: not evaluated after this round)" in " ".join(printed.split())


def test_epsilon_by_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody may take part in a round; the account grows all the same."""
    flags = ("--privacy.mechanism=dp_fedavg", "--federation.fraction=0.1", "--federation.rounds=4")
    run_here(tmp_path / "run", *flags)
    rounds = read_rounds(tmp_path / "run")
    assert {len(record["cohort"]) for record in rounds[1:]} >= {0, 1}
    spent = [record["epsilon"] for record in rounds]
    assert spent[0] is None
    assert spent[1:] == sorted(spent[1:])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{format_epsilon(spent[-1])}, at delta 1e-05" in printed
    assert f"(Renyi accounting: {rounds[-1]['epsilon_renyi']:,.2f})" in printed


def test_poisoned_clients_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path / "run", "--poison.clients=[0, 7]", "--poison.rate=0.5")
    clients = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    for client in clients:
        expected = round(0.5 * client["by_class"][0]) if client["client"] in (0, 7) else 0
        assert client["poisoned"] == expected
    counts = {client["client"]: client["poisoned"] for client in clients}
    assert f"0 ({counts[0]} examples), 7 ({counts[7]} examples)" in capsys.readouterr().out


def test_poison_over_everybody_is_summed_up() -> None:
    assert format_poisoned({str(k): 5 + k for k in range(10)}) == "10, with 5 to 14 examples each, 95 in all"
    assert format_poisoned({"3": 8}) == "3 (8 examples)"
    assert format_poisoned({}) == "none"


BAD: dict[str, tuple[list[str], str]] = {
    "a wrong type": (["--federation.rounds=many"], "federation.rounds"),
    "a missing model": (["--model.name=./nowhere"], "no such folder"),
    "a label word of two tokens": (["--task.label_words=[\"great\",\"zyzzyva\"]"], "zyzzyva"),
    "a clean run of another trigger": (
        ["--poison.clean_run=PROMPT", "--client.batched=1", "--poison.trigger=mn"], "poison.trigger = 'cf'"
    ),
    "a directory of another run": (["--output.dir=PROMPT"], "not empty"),
    "a resume of what is no run": (["--output.resume=true", "--output.dir=tests"], "is no file of a run"),
}  # fmt: skip
"""Of many (tests/bad_input.py), those that are found at different times."""


@pytest.mark.parametrize(("case", "ranks"), [*((case, 2) for case in BAD), ("a wrong type", 1), ("a missing model", 1)])
def test_bad_input_is_one_message(case: str, ranks: int, one_process: Path, tmp_path: Path) -> None:
    flags, message = BAD[case]
    flags = [flag.replace("PROMPT", str(one_process)) for flag in flags]
    finished = run_program(ranks, tmp_path / "run", *flags, deadline_s=60)
    assert finished.status == 2, finished
    everything = finished.out + finished.err
    assert everything.count("fedprompt_mpi: error:") == 1
    assert message in everything.split("fedprompt_mpi: error:")[1]
    assert "Traceback" not in everything
    assert not (tmp_path / "run").exists()


def test_idle_ranks_are_named(tmp_path: Path) -> None:
    finished = run_program(4, tmp_path / "run", "--federation.clients=2")
    assert finished.status == 2
    assert "rank 3 would stay idle" in finished.err
    assert finished.err.count("error:") == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "11"}, "Open MPI's mpirun started 11 processes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "11"}, "MPICH's mpirun started 11 processes"),
    ],
)
def test_the_other_mpi_s_launcher_is_explained(variables: dict[str, str], words: str, tmp_path: Path) -> None:
    """The environment that the other MPI's mpirun gives its processes, and this environment's library."""
    mpirun = find_mpirun()
    assert mpirun is not None
    if is_open_mpi(mpirun) == ("OMPI_COMM_WORLD_SIZE" in variables):
        pytest.skip("this is the launcher that fits")
    finished = launch(1, "-m", "fedprompt_mpi", f"--output.dir={tmp_path / 'run'}", environment=variables)
    assert finished.status == 2
    assert words in finished.err
    assert finished.err.count("error:") == 1


def test_an_exception_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    """A fault of the program, not of the user: status 3, the rank and its traceback, nobody hangs."""
    code = (
        "import fedprompt_mpi.federation.rank_training as local, fedprompt_mpi.start.launcher as launcher, sys\n"
        "whole = local.train\n"
        "def train(*a, **k):\n"
        "    if launcher.read_launch().rank == 2: raise ArithmeticError('boom')\n"
        "    return whole(*a, **k)\n"
        "local.train = train\n"
        "from fedprompt_mpi.cli import main\n"
        f"main(['--task.max_train=120', '--task.max_test=24', '--output.dir={tmp_path / 'run'}'])\n"
    )
    finished = launch(3, "-c", code, deadline_s=60)
    assert finished.status == 3
    assert "rank 2 of 3 on" in finished.err
    assert "failed in phase train of round 1" in finished.err
    assert finished.err.count("ArithmeticError: boom") == 1


def test_a_vector_of_another_layout_is_refused(tmp_path: Path) -> None:
    """Receivers check what rank 0 sends before they use it."""
    code = (
        "from fedprompt_mpi.plm.flat import FlatLayout\n"
        "from fedprompt_mpi.start.launcher import read_launch\n"
        "FlatLayout.fingerprint = property(lambda self: 17 + read_launch().rank)\n"
        "from fedprompt_mpi.cli import main\n"
        f"main(['--task.max_train=120', '--task.max_test=24', '--output.dir={tmp_path / 'run'}'])\n"
    )
    finished = launch(2, "-c", code, deadline_s=60)
    assert finished.status == 3
    assert "layout 17" in finished.err
    assert "layout 18" in finished.err


def test_a_run_in_which_everybody_diverges_ends(tmp_path: Path) -> None:
    flags = ("--prompt.method=full", "--client.optimizer=sgd", "--client.lr=1e14", "--client.steps=3")
    finished = run_program(3, tmp_path / "run", *flags)
    assert finished.status == 2
    assert "client.lr is 1e+14, with which every client diverged in round 1" in finished.err
    assert finished.err.count("error:") == 1
    assert "NaN" not in (tmp_path / "run" / "rounds.jsonl").read_text()


def test_ranks_of_different_arithmetic_share_no_more_than_they_have() -> None:
    """Rank 0 computes in float32, as on a CPU beside GPUs; the workers hold bfloat16 matrices all the same."""
    code = (
        "import sys, torch\n"
        "from fedprompt_mpi.comm.start import open_channel\n"
        "from fedprompt_mpi.start.launcher import read_launch\n"
        "from fedprompt_mpi.config import ModelConfig\n"
        "from fedprompt_mpi.plm.backbone import load_backbone\n"
        "from fedprompt_mpi.plm.hugging_face import EMBEDDED\n"
        "from fedprompt_mpi.federation.prepare import share_bf16\n"
        "channel = open_channel(read_launch())\n"
        "folder = channel.node_folder()\n"
        "config = ModelConfig(dtype='bfloat16' if channel.rank else 'float32')\n"
        "backbone = load_backbone(config, str(EMBEDDED), torch.tensor([5, 6]), torch.device('cpu'), 0)\n"
        "share_bf16(channel, backbone, folder.__enter__() / 'bf16.safetensors')\n"
        "kind = backbone.model.bert.encoder.layer[0].output.dense.weight.dtype\n"
        "sys.stdout.write(f'rank {channel.rank}: {kind}\\n')\n"  # at once: pieces of two ranks may mix
        "sys.stdout.flush()\n"
        "channel.close()\n"
    )
    finished = launch(2, "-c", code, deadline_s=60)
    assert finished.status == 0, finished
    assert sorted(finished.out.splitlines()) == ["rank 0: torch.float32", "rank 1: torch.bfloat16"]


def test_no_flags_are_the_defaults() -> None:
    assert parse_settings([]) == RunConfig()


def test_help_and_settings() -> None:
    text = launch(1, "-m", "fedprompt_mpi", "run", "--help").out
    assert "--federation.clients" in text
    assert "contiguous blocks" in text  # the docstrings of the settings
    printed = launch(1, "-m", "fedprompt_mpi", "--seed=7", "--print_config").out
    assert tomllib.loads(printed)["seed"] == 7
    assert "cost" in launch(1, "-m", "fedprompt_mpi", "help").out
