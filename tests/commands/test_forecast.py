"""The command forecast: answers from measured rounds, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.commands.forecast import main
from fedprompt_mpi.liveness.liveness import Liveness
from tests.jobs import SMALL, launch

MEASURED = (*SMALL, "--comm.mode=measure", "--federation.rounds=8", "--output.evaluate_every=4")
ELSEWHERE = ("--clients", "10000", "--nodes", "64", "--ranks-per-node", "8", "--network", "10gbe")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a measured run, and a bench, of three ranks."""
    folder = tmp_path_factory.mktemp("sources")
    done = launch(3, "-m", "fedprompt_mpi", *MEASURED, f"--output.dir={folder / 'run'}")
    assert done.status == 0, done
    flags = ("--largest=65536", "--seconds=0.02", f"--dir={folder / 'bench'}")
    done = launch(3, "-m", "fedprompt_mpi", "bench", *flags)
    assert done.status == 0, done
    return folder


def _named(sources: Path) -> list[str]:
    return [str(sources / "bench"), str(sources / "run")]


def test_an_answer_in_words_with_its_figure(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*ELSEWHERE, "--collective", "gather,reduce", "--speeds", "lognormal:0.5", "--dir", str(tmp_path / "out"))
    main([*_named(sources), *flags], Liveness())
    said = capsys.readouterr().out
    assert "nodes: 64, ranks of each: 8, workers: 511, clients of a worker: up to 20" in said
    assert "network: 10 GbE (rate: IEEE 802.3ae" in said
    assert "faster than gather" in said and "examples lost" in said and "the mean worker waits" in said
    assert "Not measured" in said and "--measured-on" in said and "no round with reduce was measured" in said
    assert (tmp_path / "out" / "forecast.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "forecast.json").read_text())["clients"] == 10_000


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main([*arguments, "--json"], Liveness())
    return json.loads(capsys.readouterr().out)


def test_phases_add_up_and_grow_with_clients(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = (
        _json([*_named(sources), *ELSEWHERE, "--clients", str(clients)], capsys)["forecasts"][0]
        for clients in (1000, 100_000)
    )
    for one in (few, many):
        assert one["round"]["seconds"] == pytest.approx(sum(phase["seconds"] for phase in one["phases"].values()))
        assert one["round"]["low"] < one["round"]["seconds"] < one["round"]["high"]
    assert many["phases"]["train"]["seconds"] > 50 * few["phases"]["train"]["seconds"]
    assert many["bytes_to_server"] > 90 * few["bytes_to_server"]


def test_a_run_is_forecast_from_itself(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*_named(sources), "--score", str(sources / "run")], Liveness())
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert {"train", "evaluate", "broadcast", "gather", "round"} <= set(rows)
    assert "outside" not in rows["train"] + rows["round"]


def test_far_away_only_bytes_are_told(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*_named(sources), "--network", "mobile", "--clients", "10000"], Liveness())
    said = capsys.readouterr().out
    assert "MPI is not what would run there" in said and "10,240 B" in said and "102.4 MB" in said
    assert "hours" not in said
    found = _json([*_named(sources), "--network", "mobile", "--clients", "10000"], capsys)
    assert found["mpi"] is False and found["forecasts"][0]["bytes_to_server"] == 102_400_000
    assert "round" not in found["forecasts"][0]


def test_it_needs_neither_torch_nor_mpi(sources: Path) -> None:
    program = (
        "import sys; sys.modules.update(torch=None, mpi4py=None, transformers=None)\n"
        "from fedprompt_mpi.cli import main\n"
        f"main(['forecast', {str(sources / 'run')!r}, '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["forecasts"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "full"], r"--method is 'full', but the sources have soft: run mpirun .*--prompt.method full"),
        (["--method", "telepathy"], r"--method is 'telepathy': choose of"),
        (["--collective", "scatter"], r"--collective is 'scatter': choose of gather, reduce"),
        (["--wire", "int4"], "--wire is 'int4': choose of"),
        (["--clients", "3", "--nodes", "8"], r"--clients is 3, but 8 nodes .* some would stay idle"),
        (["--clients", "0"], "--clients is 0: give a number from 1"),
        (["--nodes", "2"], "no source has ranks on two nodes"),
        (["--network", "gone.toml"], "--network is 'gone.toml'"),
        (["--speeds", "fast"], "--speeds is 'fast'"),
        (["--score", "gone"], "gone"),
        (["--network", "mobile", "--nodes", "4"], "only bytes are told: leave out --nodes"),
        (["--network", "mobile", "--score", "gone"], "where MPI would not run"),
        (["--score", "gone", "--clients", "5"], "leave out --clients"),
        (["--json", "--dir", "out"], "leave out --dir"),
        (["--method", ","], "--method is ','"),
        (["--collective", "reduce", "--wire", "int8"], "comm.wire is int8 but comm.collective is reduce"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, sources: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        main([*_named(sources), *flags], Liveness())


def test_a_bench_alone_says_nothing_of_a_round(sources: Path) -> None:
    with pytest.raises(SettingsError, match="no source is a run"):
        main([str(sources / "bench")], Liveness())


def _edited(sources: Path, folder: Path, name: str, old: str, new: str) -> Path:
    shutil.copytree(sources, folder / "copy")
    file = folder / "copy" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return folder / "copy"


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("run/communication.json", '"mode": "measure"', '"mode": "observe"', r"comm.mode observe.*--comm.mode measure"),
        (
            "run/communication.json",
            '"warmup_rounds": 1',
            '"warmup_rounds": 5',
            r"has 3 measured rounds.* needs 6: run mpirun",
        ),
        ("run/config.toml", "secure_aggregation = false", "secure_aggregation = true", "privacy.secure_aggregation"),
        ("run/timings.csv", "train", "dream", "timings.csv"),
        ("run/config.toml", "dropout = 0.0", "dropout = 0.5", "federation.dropout"),
        ("run/environment.json", "MPICH", "Other", "not of one MPI library"),
        ("run/summary.json", '"parameters": 2560', '"parameters": 0', "lacks ranks, parameters"),
        ("bench/bench.json", '"bytes"', '"size"', r"bench.json cannot be read"),
        ("bench/bench.json", '"ranks": 3', '"ranks": 2', r"bench.json has 2 ranks, and nodes of 3"),
    ],
)
def test_a_source_that_lacks_something(
    name: str, old: str, new: str, words: str, sources: Path, tmp_path: Path
) -> None:
    copy = _edited(sources, tmp_path, name, old, new)
    with pytest.raises(SettingsError, match=words):
        main(_named(copy), Liveness())


def test_a_bench_of_an_earlier_version(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sources, tmp_path / "copy")
    file = tmp_path / "copy" / "bench" / "bench.json"
    content = json.loads(file.read_text())
    del content["rank_nodes"]
    file.write_text(json.dumps(content))
    assert _json(_named(tmp_path / "copy"), capsys)["forecasts"]  # three ranks of one node
    content["nodes"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="does not say where its 3 ranks were"):
        main(_named(tmp_path / "copy"), Liveness())


def test_a_network_s_nodes_are_used_as_far_as_there_are_clients(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json([*_named(sources), "--network", "10gbe"], capsys)
    assert (found["nodes"], found["ranks_per_node"]) == (1, 8)
    found = _json([*_named(sources), "--network", "10gbe", "--clients", "3"], capsys)
    assert (found["nodes"], found["ranks_per_node"]) == (1, 4)


def test_a_source_counts_once(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, often = (_json([*_named(sources), *more], capsys) for more in ([], _named(sources)))
    assert once == often


def test_runs_whose_clients_do_not_do_the_same(sources: Path, tmp_path: Path) -> None:
    copy = _edited(sources, tmp_path, "run/config.toml", "steps = 3", "steps = 30")
    with pytest.raises(SettingsError, match="their clients do not do the same"):
        main([*_named(sources), str(copy / "run")], Liveness())


def test_a_source_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name a run directory"):
        main([str(tmp_path)], Liveness())
