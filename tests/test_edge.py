"""The table of aggregators and attacks, with fewer of both."""

import importlib.util
import json
import statistics
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedprompt_mpi.rules.aggregators import AGGREGATORS
from tests.jobs import REPOSITORY, SMALL


def test_a_small_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells are made once, compared with the clean run of their own rule, and norm_clip clips at the median norm."""
    spec = importlib.util.spec_from_file_location("edge", REPOSITORY / "launch" / "edge.py")
    assert spec is not None and spec.loader is not None
    edge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edge)
    matrix = tomllib.loads(edge.MATRIX.read_text())
    assert set(matrix["rows"]) == {*AGGREGATORS, "fedavg, noise 0.02"}
    matrix["columns"] = {name: matrix["columns"][name] for name in ("none", "1, boost 10")}
    matrix["rows"] = {name: matrix["rows"][name] for name in ("fedavg", "norm_clip")}
    (tmp_path / "small.toml").write_text(tomli_w.dumps(matrix))
    flags = [*SMALL, "--federation.rounds=1", "--client.steps=1"]
    monkeypatch.setattr(
        sys, "argv", ["edge.py", "--jobs=2", f"--matrix={tmp_path / 'small.toml'}", str(tmp_path), *flags]
    )
    edge.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| aggregator | none | 1, boost 10 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| fedavg", "| norm_clip"]
    cell = tmp_path / "norm_clip" / "1-boost-10"
    summary = json.loads((cell / "summary.json").read_text())
    clean = json.loads((tmp_path / "norm_clip" / "none" / "summary.json").read_text())
    assert summary["clean_attack_success_rate"] == clean["attack_success_rate"]
    assert f"{100 * summary['accuracy']:.1f} / {100 * summary['attack_success_rate']:.1f} |" in lines[3]
    norms = json.loads((tmp_path / "fedavg" / "none" / "rounds.jsonl").read_text().splitlines()[1])["update_norms"]
    assert tomllib.loads((cell / "config.toml").read_text())["federation"]["clip_norm"] == statistics.median(norms)
    before = (cell / "summary.json").stat().st_mtime_ns
    edge.main()
    assert (cell / "summary.json").stat().st_mtime_ns == before
