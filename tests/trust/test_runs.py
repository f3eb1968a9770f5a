"""Run directories that were changed by somebody: one message that names the file, from every command that reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedprompt_mpi.commands import export, predict, report
from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.commands.sweep import Plan, sweep
from fedprompt_mpi.config import SettingsError, to_dict
from fedprompt_mpi.liveness.liveness import Liveness
from tests.jobs import SMALL, run_here

Damage = Callable[[str], str]


def _report(run: Path, out: Path) -> None:
    report.main([str(run)], Liveness())


def _compare(run: Path, out: Path) -> None:
    report.main([str(run), str(run), f"--dir={out}"], Liveness())


def _export(run: Path, out: Path) -> None:
    export.main([str(run), str(out)], Liveness())


def _predict(run: Path, out: Path) -> None:
    predict.main([str(run), "--text=a fine film"], Liveness())


def _sweep(run: Path, out: Path) -> None:
    sweep([Plan(directory=run, flags=[*SMALL, "--federation.rounds=1"])], say=lambda line: None)


def _continue(run: Path, out: Path) -> None:
    run_here(run, "--federation.rounds=1", "--federation.filter_round=1", "--output.resume=true")


COMMANDS = {
    "report": _report, "compare": _compare, "export": _export, "predict": _predict, "sweep": _sweep, "run": _continue
}  # fmt: skip
ALL_PAGES = ("report", "compare")
READERS = {
    "config.toml": (*ALL_PAGES, "export", "predict", "sweep"),
    "environment.json": ALL_PAGES,
    "partition.json": (*ALL_PAGES, "export"),
    "rounds.jsonl": (*ALL_PAGES, "run"),
    "timings.csv": (*ALL_PAGES, "run"),
    "communication.json": ALL_PAGES,
    "summary.json": (*ALL_PAGES, "export"),
    "filtered.json": (*ALL_PAGES, "run"),
    "prompt.safetensors": ("export", "predict"),
}


def _json(change: Callable[[dict], object]) -> Damage:
    def damage(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return damage


def _line(number: int, change: Callable[[dict], object]) -> Damage:
    def damage(text: str) -> str:
        lines = text.splitlines()
        lines[number] = _json(change)(lines[number])
        return "".join(f"{line}\n" for line in lines)

    return damage


def _replaced(old: str, new: str) -> Damage:
    def damage(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return damage


_LAST = ("norms that are missing", "clients that are none", "rounds without order", "a client twice in a round")
"""Of the last round's line, which a run that goes on writes again from the checkpoint."""
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "an empty file of settings": ("config.toml", lambda _: "", "it has no seed"),
    "no section": ("config.toml", lambda text: text[: text.index("[federation]")], "it has no federation"),
    "words for a number": ("config.toml", _replaced("rounds = 1", 'rounds = "many"'), "federation.rounds is 'many'"),
    "a table for a number": ("config.toml", _replaced("lr = 0.3", "lr = {a = 1}"), "client.lr is"),
    "a list for a name": ("config.toml", _replaced('method = "soft"', 'method = ["soft"]'), "prompt.method is"),
    "an unknown method": ("config.toml", _replaced('"soft"', '"hard"'), "prompt.method is 'hard'"),
    "an unknown setting": ("config.toml", _replaced("[client]", "[client]\ncolour = 1"), "client.colour"),
    "a rule that is none": ("config.toml", _replaced('"fedavg"', '"none"'), "federation.aggregator is 'none'"),
    "a list for an environment": ("environment.json", lambda _: "[]", "expecting a table"),
    "no ranks": ("environment.json", _json(lambda made: made.pop("ranks")), "has no ranks"),
    "ranks of words": ("environment.json", _json(lambda made: made.update(ranks="all")), "ranks is 'all'"),
    "a rank without a host": ("environment.json", _json(lambda made: made["ranks"][0].pop("host")), "has no host"),
    "a version that is a list": ("environment.json", _json(lambda made: made["versions"].update(a=[])), "versions.a"),
    "no clients": ("partition.json", _json(lambda made: made.update(clients=[])), "it has 0 clients"),
    "a class too few": ("partition.json", _json(lambda made: made["clients"][0]["by_class"].pop()), "with 1 classes"),
    "a client twice": ("partition.json", _json(lambda made: made["clients"][1].update(client=0)), "clients.1"),
    "words of numbers": ("partition.json", _json(lambda made: made.update(label_words=[1, 2])), "label_words"),
    "a half line of nonsense": ("rounds.jsonl", lambda text: "nonsense\n" + text, "line 1"),
    "a round of words": ("rounds.jsonl", _line(1, lambda made: made.update(round="one")), "line 2: round is 'one'"),
    "seconds of words": ("rounds.jsonl", _line(0, lambda made: made["seconds"].update(total="x")), "seconds.total"),
    "norms that are missing": ("rounds.jsonl", _line(1, lambda made: made["update_norms"].pop()), "update_norms has 9"),
    "clients that are none": ("rounds.jsonl", _line(1, lambda made: made["cohort"].append(77)), "beyond 0 to 9"),
    "rounds without order": ("rounds.jsonl", _line(1, lambda made: made.update(round=7)), "round is 7"),
    "a client twice in a round": ("rounds.jsonl", _line(1, lambda made: made.update(cohort=[0] * 10)), "twice"),
    "a million rounds": ("rounds.jsonl", lambda text: text + '{"round": 2}\n' * 1_000_000, "line 3: the run has 1"),
    "a line of a million lists": (
        "rounds.jsonl", lambda text: '{"round": 0, "x": [' + "[]," * 1_100_000 + "[]]}\n" + text, "lists and tables"
    ),
    "a phase of an age": ("timings.csv", lambda text: text + "1,0,train,1e308,0\n", "timings.csv cannot be read"),
    "1,001 words": (
        "partition.json",
        _json(
            lambda made: made.update(
                label_words=["a"] * 1001, clients=[{**client, "by_class": [0] * 1001} for client in made["clients"]]
            )
        ),
        "label words",
    ),
    "numbers that are none": ("rounds.jsonl", _line(1, lambda made: made.update(train_loss=[])), "train_loss"),
    "timings of words": ("timings.csv", lambda text: text + "1,0,train,long,0\n", "timings.csv cannot be read"),
    "an unknown phase": ("timings.csv", lambda text: text + "1,0,dance,1.0,0\n", "dance"),
    "a negative rank": ("timings.csv", lambda text: text + "1,-1,train,1.0,0\n", "timings.csv cannot be read"),
    "endless seconds": ("timings.csv", lambda text: text + "1,0,train,inf,0\n", "timings.csv cannot be read"),
    "another head": ("timings.csv", lambda text: "a,b\n" + text, "line 1"),
    "phases of words": ("communication.json", _json(lambda made: made.update(seconds="x")), "seconds is 'x'"),
    "a phase without a median": (
        "communication.json", lambda _: '{"mode": "observe", "launches": 1, "rounds": 1, "warmup_rounds": 0, '
        '"seconds": {"train": {}}}', "seconds.train has no median",
    ),
    "a filter without groups": ("filtered.json", _json(lambda made: made.pop("groups")), "has no groups"),
    "a filter of words": ("filtered.json", _json(lambda made: made.update(left_out=["all"])), "left_out"),
    "a list for a summary": ("summary.json", lambda _: "[]", "expecting a table"),
    "an accuracy of words": ("summary.json", _json(lambda made: made.update(accuracy="best")), "accuracy is 'best'"),
    "a ratio that is missing": ("summary.json", _json(lambda made: made.pop("ratio")), "has no ratio"),
    "a million lists": ("summary.json", lambda _: "[" + "[]," * 1_100_000 + "[]]", "lists and tables"),
    "a client too many": (
        "partition.json", _json(lambda made: made["clients"].append({**made["clients"][0], "client": 10})),
        "has 11 clients",
    ),
    "words that are none": (
        "partition.json", _json(lambda made: made.update(label_words=["\ud800", "b"])), "which is no text"
    ),
    "a loss without end": ("rounds.jsonl", _line(1, lambda made: made.update(train_loss=float("inf"))), "train_loss"),
    "clients of words": ("summary.json", _json(lambda made: made.update(malicious_clients="0")), "malicious_clients"),
    "a tensor file of text": ("prompt.safetensors", lambda _: "nonsense", "cannot be read as a prompt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_here(directory, "--federation.rounds=1", "--federation.filter_round=1", "--comm.warmup=0")
    return directory


@pytest.mark.parametrize("case", DAMAGES)
def test_one_message_names_the_file(case: str, finished: Path, tmp_path: Path) -> None:
    name, damage, says = DAMAGES[case]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / name).read_bytes().decode(errors="replace")
    (run / name).write_text(damage(text))
    for command in READERS[name]:
        if command == "run" and case in _LAST:
            continue
        with pytest.raises(SettingsError) as caught:
            COMMANDS[command](run, tmp_path / "out")
        message = str(caught.value)
        assert "\n" not in message and len(message) < 1000, command
        assert name in message or command in ("run", "sweep"), command
        if command != "run":
            assert says in message, command


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", "x"), ("round", "-3"), ("round", "9" * 5000), ("round", "1000000000"), ("settings", "["),
        ("settings", "[1]"), ("settings", "[" * 100_000), ("record", '{"round": "x"}'), ("numerics", "[]"),
        ("record", '{"round": 0}'), ("record", '{"round": 99}'), ("record", '{"round": 1, "cohort": [99999]}'),
        ("record", '{"round": 1, "cohort": [1], "update_norms": [1.0, 2.0]}'),
    ],
)  # fmt: skip
def test_a_checkpoint_that_was_signed_again(name: str, value: str, finished: Path, tmp_path: Path) -> None:
    """The checksum holds, the content does not: it is damaged like any other."""
    from safetensors.numpy import save_file

    from fedprompt_mpi.files import read_tensors
    from fedprompt_mpi.rundir.checkpoint import _checksum

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for file in (run / "checkpoint").iterdir():
        tensors, metadata = read_tensors(file, "a checkpoint")
        metadata = {**metadata, name: value}
        save_file(tensors, file, {**metadata, "sha256": _checksum(tensors, metadata)})
    with pytest.raises(SettingsError, match=r"safetensors is damaged"):
        run_here(run, "--federation.rounds=2", "--output.resume=true")


@pytest.mark.parametrize("command", ["report", "compare", "export"])
def test_label_words_that_are_not_those_of_the_settings(command: str, finished: Path, tmp_path: Path) -> None:
    """`predict` takes the words of the settings, a page and a card those of the partition."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(_replaced("[task]", '[task]\nlabel_words = ["great", "terrible"]')(text))
    with pytest.raises(SettingsError, match="label words are"):
        COMMANDS[command](run, tmp_path / "out")


STATEFUL = {
    "momentum": ["--federation.server_optimizer=momentum"],
    "second_moment": ["--federation.server_optimizer=adam"],
    "foolsgold_history": ["--federation.aggregator=foolsgold"],
    "vector_before": ["--poison.clients=[0]", "--poison.attack=neurotoxin"],
    "client_residuals": ["--comm.wire=int8"],
    "server_residual": ["--comm.wire=int8"],
}


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_of_a_checkpoint_is_that_of_its_settings(name: str, tmp_path: Path) -> None:
    """Missing, of another shape, of another type, not finite, too many: never used, and never left out in silence."""
    import numpy as np
    from safetensors.numpy import save_file

    from fedprompt_mpi.files import read_tensors
    from fedprompt_mpi.rundir.checkpoint import _checksum

    run = tmp_path / "run"
    run_here(run, "--federation.rounds=1", *STATEFUL[name])
    (file,) = (run / "checkpoint").iterdir()
    tensors, metadata = read_tensors(file, "a checkpoint")
    metadata.pop("sha256")
    own = tensors[name]
    for other in (
        None,
        own.reshape(-1)[:7],
        own.astype(np.float64),
        np.zeros((), own.dtype),
        own * np.float32("nan"),
        own,
    ):
        changed = (
            {key: value for key, value in tensors.items() if key != name} if other is None else {**tensors, name: other}
        )
        if other is own:
            changed["another"] = own
        changed = {key: np.ascontiguousarray(value) for key, value in changed.items()}
        save_file(changed, file, {**metadata, "sha256": _checksum(changed, metadata)})
        with pytest.raises(SettingsError, match="the checkpoint of round 1 is damaged"):
            run_here(run, "--federation.rounds=2", "--output.resume=true", *STATEFUL[name])
    save_file(tensors, file, {**metadata, "sha256": _checksum(tensors, metadata)})
    assert run_here(run, "--federation.rounds=2", "--output.resume=true", *STATEFUL[name])["rounds"] == 2


def test_a_prompt_of_other_numbers(finished: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from fedprompt_mpi.files import read_tensors

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tensors, metadata = read_tensors(run / "prompt.safetensors", "a prompt")
    nan, short = np.full_like(tensors["vector"], np.nan), tensors["effective_prompt"][0]
    for changed, commands in (
        ({"vector": nan}, (_export, _predict)),
        ({"vector": tensors["vector"].astype(np.uint16)}, (_export, _predict)),
        ({"effective_prompt": short}, (_export,)),
        ({"effective_prompt": tensors["effective_prompt"].astype(np.int8)}, (_export,)),
    ):
        save_file({**tensors, **changed}, run / "prompt.safetensors", metadata)
        for command in commands:
            with pytest.raises(SettingsError, match="finite float32 numbers"):
                command(run, tmp_path / "out")
    tensors.pop("effective_prompt")
    save_file(tensors, run / "prompt.safetensors", metadata)
    with pytest.raises(SettingsError, match="has no effective_prompt"):
        _export(run, tmp_path / "out")


def test_a_sweep_s_log_and_names(tmp_path: Path) -> None:
    """No link is followed, no pipe waited for, and no name leads out of the folder of the runs."""
    from fedprompt_mpi.commands import sweep as command

    (tmp_path / "x.toml").write_text("seed = 1\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "runs" / "x.log").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match="symbolic"):
        sweep([Plan(directory=tmp_path / "runs" / "x", flags=[*SMALL])], say=lambda line: None)
    assert (tmp_path / "kept").read_text() == "mine"
    for name in ("..toml", "...toml", "a\nb.toml", "a\x1b[2J.toml"):
        (tmp_path / name).write_text("seed = 1\n")
        with pytest.raises(SettingsError, match="its run is named after it"):
            command.main([str(tmp_path / name), f"--runs={tmp_path / 'runs'}"], Liveness())


@pytest.mark.parametrize(
    "arguments",
    [["export", "{run}", "/dev/null"], ["export", "{run}", "/proc/x"], ["export", "{run}", "{run}/rounds.jsonl/x"],
     ["report", "{run}", "{run}", "--dir=/proc/x"], ["sweep", "{run}/config.toml", "--runs={run}/rounds.jsonl"],
     ["sweep", "{run}/config.toml", "--launch='x"], ["sweep", "{run}/config.toml", "--launch=/nonexistent"],
     ["cost", "--num_virtual_tokens=1" + "0" * 400], ["export", "{run}", "x" * 5000]],
)  # fmt: skip
def test_places_and_numbers_of_commands(arguments: list[str], finished: Path, tmp_path: Path) -> None:
    """One message, whatever the command."""
    from fedprompt_mpi.cli import dispatch

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(SettingsError):
        dispatch([argument.format(run=run) for argument in arguments], Liveness())


def test_a_card_cannot_lose_its_warning(finished: Path, tmp_path: Path) -> None:
    """The summary says that nobody was malicious, the settings say who was."""
    run = tmp_path / "run"
    run_here(run, "--federation.rounds=1", "--poison.clients=[3]")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "malicious_clients": []}))
    with pytest.raises(SettingsError, match=r"clients \[\] were malicious"):
        export.export(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", READERS)
def test_a_link_in_a_received_run_is_named(name: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    for command in COMMANDS:
        with pytest.raises(SettingsError, match=f"{name} is a link"):
            COMMANDS[command](run, tmp_path / "out")


def test_other_versions_are_both_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr("fedprompt_mpi.rundir.journal.versions", lambda: {"torch": "9.9", "numpy": "1.0"})
    again = ("--federation.rounds=2", "--federation.filter_round=1", "--output.resume=true")
    with pytest.raises(SettingsError, match=r"torch \d\S+ \(now 9\.9\)"):
        run_here(run, *again)
    run_here(run, *again, "--output.other_versions=true")
    environment = json.loads((run / "environment.json").read_text())
    (earlier,) = environment["earlier"]
    assert earlier["until"] == 1 and earlier["versions"]["torch"] != "9.9"


def test_another_arithmetic_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    settings = parse_settings([*SMALL, "--federation.filter_round=1", f"--output.dir={run}"])
    from fedprompt_mpi.rundir.checkpoint import check_numerics, load_checkpoint
    from fedprompt_mpi.rundir.paths import RunPaths

    checkpoint, _ = load_checkpoint(RunPaths(run), to_dict(settings))
    assert checkpoint is not None and checkpoint.numerics["arithmetic"] == "float32"
    check_numerics(checkpoint, checkpoint.numerics)
    with pytest.raises(SettingsError, match=r"arithmetic float32 \(now bfloat16\)"):
        check_numerics(checkpoint, {**checkpoint.numerics, "arithmetic": "bfloat16"})
