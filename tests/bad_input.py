"""What users get wrong: settings, files, checkpoints. Each case is flags, and words that the one message has."""

import dataclasses
import gzip
import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.numpy import save_file

from fedprompt_mpi.commands.settings import parse_settings
from fedprompt_mpi.config import ClientConfig, RunConfig, to_dict
from fedprompt_mpi.rundir.checkpoint import Checkpoint, save_checkpoint
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import RoundRecord
from tests.jobs import SMALL

Make = Callable[[Path], list[str]]
"""Makes what the case needs in a folder, and returns the flags."""
GOOD_CSV = "text,label\n" + "".join(f"fine film number {k},{k % 2}\n" for k in range(40))
OTHER = RunConfig(seed=7, client=ClientConfig(lr=0.5))
PARAMETERS = 2560
"""Of a soft prompt for the embedded model."""


def _nonsense() -> Iterator[tuple[str, str]]:
    """Yield each setting that is no free text, with values that it cannot have."""
    for section in dataclasses.fields(RunConfig):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        hints = typing.get_type_hints(section.default_factory)
        for field in dataclasses.fields(typing.cast("Any", section.default_factory)):
            kinds = {hints[field.name], *typing.get_args(hints[field.name])}
            name, named = f"{section.name}.{field.name}", field.metadata["names"]
            if bool in kinds:
                values = ["maybe"]
            elif int in kinds:
                values = ["many", "1.5", "-7"]
            elif float in kinds:
                values = ["much", "nan", "inf", "-7"]
            elif str in kinds:
                values = [] if named is None or field.name == "name" else ["nonsense"]
            else:
                values = ["nonsense"]
            yield from ((name, value) for value in values)


FREEZE_A = ("--prompt.method=lora", "--prompt.lora.aggregation=freeze_a")
PRODUCT = ("--prompt.method=lora", "--prompt.lora.aggregation=product")


SECURE = "--privacy.secure_aggregation=true"
BOUND = (SECURE, "--federation.update_bound=1")


class _Settings(tuple[str, ...]):
    """Flags that are wrong by themselves: no model, no data and no other rank is needed to say so."""

    def __call__(self, root: Path) -> list[str]:
        return list(self)


def _flags(*flags: str) -> Make:
    return _Settings(flags)


def _beside(*flags: str) -> Make:
    """Return flags that are wrong beside the model, the data or the machine."""
    return lambda root: list(flags)


def _data(name: str, content: str | bytes, *flags: str, test: str | None = GOOD_CSV) -> Make:
    """Return what makes a data set of a train file, a test file (None: none) and the flags to read it."""

    def make(root: Path) -> list[str]:
        folder = root / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if test is not None:
            (folder / "test.csv").write_text(test)
        return ["--task.name=sst2", f"--task.data={folder}", *flags]

    return make


def _toml(content: str | bytes) -> Make:
    def make(root: Path) -> list[str]:
        root.mkdir(parents=True, exist_ok=True)
        file = root / "bad.toml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [f"--config={file}"]

    return make


def _prompt(tensors: dict[str, np.ndarray] | bytes, *flags: str) -> Make:
    def make(root: Path) -> list[str]:
        root.mkdir(parents=True, exist_ok=True)
        file = root / "some.safetensors"
        if isinstance(tensors, bytes):
            file.write_bytes(tensors)
        else:
            save_file(tensors, file)
        return [f"--prompt.init={file}", *flags]

    return make


def _directory(files: dict[str, str], *flags: str) -> Make:
    """Return what makes an output directory that has files already."""

    def make(root: Path) -> list[str]:
        for name, content in files.items():
            (root / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "out" / name).write_text(content)
        return [f"--output.dir={root / 'out'}", *flags]

    return make


def _run_without(name: str, content: str | None = None) -> Make:
    """Return what makes the directory of a run after its first round, one of whose files is gone, or another."""

    def make(root: Path) -> list[str]:
        flags = [*SMALL, f"--output.dir={root / 'out'}"]
        config = parse_settings(flags)
        records = {"rounds.jsonl": '{"round": 0}\n', "timings.csv": "round,rank,phase,seconds,bytes\n"}
        (root / "out").mkdir(parents=True, exist_ok=True)
        for file, usual in records.items():
            text = content if file == name else usual
            (root / "out" / file).unlink(missing_ok=True)
            if text is not None:
                (root / "out" / file).write_text(text)
        checkpoint = Checkpoint(vector=_vector(), round_=1, record=RoundRecord(round=1))
        save_checkpoint(RunPaths(root / "out"), checkpoint, config)
        return [*flags, "--output.resume=true"]

    return make


def _model(files: dict[str, str]) -> Make:
    def make(root: Path) -> list[str]:
        (root / "model").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "model" / name).write_text(content)
        return [f"--model.name={root / 'model'}"]

    return make


def _vector(size: int = PARAMETERS, value: float = 0.0) -> np.ndarray:
    return np.full(size, value, dtype=np.float32)


CASES: dict[str, tuple[Make, str]] = {
    **{f"{name}={value}": (_flags(f"--{name}={value}"), name) for name, value in _nonsense()},
    "seed=-1": (_flags("--seed=-1"), "seed"),
    "seed=x": (_flags("--seed=x"), "seed"),
    "an unknown setting": (_flags("--federation.colour=red"), "federation.colour"),
    "an unknown section": (_flags("--weather.rain=1"), "weather"),
    "no flag at all": (_flags("please"), "please"),
    "an unknown task": (_flags("--task.name=weather"), "task.name is 'weather'"),
    "no data": (_beside("--task.name=sst2"), "task.data is not given"),
    "a missing folder": (_beside("--task.name=sst2", "--task.data=./nowhere"), "no such folder"),
    "a missing model": (_beside("--model.name=./nowhere"), "no such folder"),
    "a fraction above 1": (_flags("--federation.fraction=1.5"), "federation.fraction is 1.5"),
    "a rate above 1": (_flags("--poison.rate=1.5"), "poison.rate"),
    "more poisoned clients than clients": (
        _flags("--federation.clients=2", "--poison.clients=[0,1,2]"), "poison.clients"
    ),
    "an unknown poisoned client": (_flags("--poison.clients=[10]"), "client 10"),
    "a negative poisoned client": (_flags("--poison.clients=[-1]"), "client -1"),
    "no list of clients": (_flags("--poison.clients=some"), "expecting list in JSON"),
    "a target that is no class": (_beside("--poison.target=2", "--poison.trigger=cf"), "poison.target is 2"),
    "a trigger that the tokenizer loses": (_beside("--poison.trigger=cf 日本"), "poison.trigger is 'cf 日本'"),
    "too many to withstand": (
        _flags("--federation.aggregator=krum", "--federation.assumed_malicious=4"), "assume at most 3"
    ),
    "too large a server data set": (
        _beside("--federation.aggregator=fltrust", "--federation.server_examples=111"), "keep at most 110"
    ),
    "no clean run": (_beside("--poison.clean_run=./nothing"), "cannot be read as a run"),
    "text for a list": (_flags("--task.label_words=great"), "expecting list in JSON"),
    "a label word of two tokens": (_beside('--task.label_words=["great","zyzzyva"]'), "zyzzyva"),
    "one label word twice": (_beside('--task.label_words=["great","great"]'), "great"),
    "more clients than examples": (_beside("--task.max_train=5"), "only 5 training examples"),
    "no natural clients": (_beside("--federation.partition=natural"), "task.user"),
    "too long for the model": (_beside("--model.max_length=190"), "192 positions"),
    "no GPU": (_beside("--model.device=cuda"), "sees no GPU"),
    "an update bound of another rule": (
        _flags("--federation.update_bound=1", "--federation.aggregator=median"), "which is a bound of fedavg"
    ),
    "an update bound under dp_fedavg": (
        _flags("--federation.update_bound=1", "--privacy.mechanism=dp_fedavg"), "privacy.mechanism is dp_fedavg"
    ),
    "a threshold without secure aggregation": (_flags("--privacy.threshold=3"), "privacy.secure_aggregation is false"),
    "secure aggregation without a bound": (_flags(SECURE), "federation.update_bound is not given"),
    "secure aggregation by a rule that must see": (
        _flags(SECURE, "--federation.aggregator=krum"), "it must see each update"
    ),
    "a threshold above the clients": (_flags(*BOUND, "--privacy.threshold=11"), "take at most 10"),
    "a threshold above those of a round": (
        _flags(*BOUND, "--privacy.threshold=6", "--federation.fraction=0.5"), "take at most 5"
    ),
    "a threshold above those of a round of dp_fedavg": (
        _flags(SECURE, "--privacy.mechanism=dp_fedavg", "--federation.fraction=0.3", "--privacy.threshold=10"),
        "take at most 3",
    ),
    "canaries without a mechanism": (_flags('--privacy.audit=["canary"]'), "privacy.mechanism is none"),
    "canaries of a mechanism without a bound": (
        _flags('--privacy.audit=["canary"]', "--privacy.mechanism=ldp"), "nothing bounds an update"
    ),
    "an attack that there is not": (_flags('--privacy.audit=["telepathy"]'), "privacy.audit"),
    "secure aggregation of one client": (_flags(*BOUND, "--federation.clients=1"), "whose update would be the sum"),
    "secure aggregation in a short format": (_flags(*BOUND, "--comm.wire=int8"), "comm.wire is int8"),
    "secure aggregation of mixed updates": (_flags(*BOUND, "--federation.mixing=true"), "federation.mixing is true"),
    "secure aggregation with the example filter": (_flags(*BOUND, "--federation.filter_round=1"), "filter_round is 1"),
    "secure aggregation with evaluated clients": (
        _flags(*BOUND, "--output.evaluate_clients=true"), "output.evaluate_clients is true"
    ),
    "secure aggregation of products": (_flags(*BOUND, *PRODUCT), "prompt.lora.aggregation is product"),
    "everybody drops out": (_flags("--federation.dropout=1"), "federation.dropout"),
    "products of a rule without weights": (_flags(*PRODUCT, "--federation.aggregator=median"), "no weighted sum"),
    "products of a mixed rule without weights": (
        _flags(*PRODUCT, "--federation.aggregator=trimmed_mean", "--federation.mixing=true"), "no weighted sum"
    ),
    "products that are reduced": (_flags(*PRODUCT, "--comm.collective=reduce"), "each client's factors"),
    "products with noise": (_flags(*PRODUCT, "--privacy.mechanism=dp_fedavg"), "is not bounded"),
    "products with momentum": (_flags(*PRODUCT, "--federation.server_optimizer=momentum"), "sums of updates"),
    "products with a server's rate": (_flags(*PRODUCT, "--federation.server_lr=0.5"), "federation.server_lr is 0.5"),
    "products with a signal": (
        _flags(*PRODUCT, "--output.backdoor_snr=true", "--poison.trigger=cf"), "output.backdoor_snr is True"
    ),
    "ranks above the rank": (_flags("--prompt.method=lora", "--prompt.lora.ranks=[2, 16]"), "prompt.lora.rank 8"),
    "ranks of nobody": (_flags("--prompt.method=lora", "--prompt.lora.ranks=[]"), "prompt.lora.ranks is []"),
    "ranks with noise on their zeros": (
        _flags("--prompt.method=lora", "--prompt.lora.ranks=[2, 8]", "--privacy.mechanism=ldp"), "rows of zeros"
    ),
    "ranks with a server's own update": (
        _flags("--prompt.method=lora", "--prompt.lora.ranks=[2, 8]", "--federation.aggregator=fltrust"), "has one rank"
    ),
    "ranks of a frozen A": (_flags(*FREEZE_A, "--prompt.lora.ranks=[2, 8]"), "part of a frozen A"),
    "a frozen A that is read": (_flags(*FREEZE_A, "--prompt.init=somewhere"), "A is drawn, not read"),
    "products of clipped updates": (_flags(*PRODUCT, "--federation.aggregator=norm_clip"), "not bounded"),
    "products of scaled updates": (_flags(*PRODUCT, "--federation.aggregator=fltrust"), "not bounded"),
    "products in a short format": (_flags(*PRODUCT, "--comm.wire=int8"), "comm.wire is int8"),
    "products and a rule's memory": (_flags(*PRODUCT, "--federation.aggregator=foolsgold"), "over rounds"),
    "reduce with a rule that compares": (
        _flags("--comm.collective=reduce", "--federation.aggregator=krum"), "reduce"
    ),
    "reduce in a short format": (_flags("--comm.collective=reduce", "--comm.wire=int8"), "comm.wire is int8"),
    "noise twice": (
        _flags("--privacy.mechanism=dp_fedavg", "--federation.aggregator=median"), "leave the aggregator out"
    ),
    "whole models in one pass": (_flags("--prompt.method=full", "--client.batched=2"), "client.batched is 2"),
    "a missing config": (_flags("--config=./nothing.toml"), "no such file"),
    "a config that is no TOML": (_toml("[federation\nrounds = 3"), "bad.toml"),
    "a config of another type": (_toml('[federation]\nrounds = "many"'), "rounds"),
    "a config with an unknown key": (_toml("[federation]\ncolour = 1"), "colour"),
    "a config with an unknown table": (_toml("[weather]\nrain = 1"), "weather"),
    "a config with a key twice": (_toml("[federation]\nrounds = 1\nrounds = 2"), "bad.toml"),
    "a config of bytes": (_toml(b"\xff\xfe\x00"), "bad.toml"),
    "a table for a number": (_toml("[federation.rounds]\na = 1"), "rounds"),
    "a huge config": (_toml("# " + "x" * 2**21), "bad.toml"),
    "no test file": (_data("train.csv", GOOD_CSV, "--task.eval_split=dev", test=None), "and a dev file"),
    "no train file": (_data("other.csv", GOOD_CSV), "needs a train file"),
    "an empty file": (_data("train.csv", ""), "train.csv"),
    "a header alone": (_data("train.csv", "text,label\n"), "train.csv"),
    "a missing column": (_data("train.csv", "words,label\nfine,1\n"), "task.text is 'text'"),
    "a column of another name": (_data("train.csv", GOOD_CSV, "--task.label=stars"), "task.label is 'stars'"),
    "a quote that never ends": (_data("train.csv", GOOD_CSV + 'fine,"1\n' * 3 + "fi\"ne\",,,\n"), "train.csv"),
    "a row too long": (_data("train.csv", GOOD_CSV + "a,b,c,d,1\n"), "train.csv"),
    "invalid UTF-8": (_data("train.csv", GOOD_CSV.encode() + b"caf\xe9,1\n"), "train.csv"),
    "NUL bytes": (_data("train.csv", b"\0\0\0\0"), "train.csv"),
    "a label out of range": (_data("train.csv", GOOD_CSV + "fine,7\n"), "has the label"),
    "a negative label": (_data("train.csv", GOOD_CSV + "fine,-1\n"), "has the label"),
    "a label that is no number": (_data("train.csv", GOOD_CSV + "fine,good\n"), "has the label"),
    "a label between two": (_data("train.csv", GOOD_CSV + "fine,0.5\n"), "has the label"),
    "a row without a label": (_data("train.csv", GOOD_CSV + "fine,\n"), "label"),
    "one class alone": (_data("train.csv", "text,label\n" + "fine,1\n" * 30), "no example of class 0"),
    "a broken gzip": (_data("train.csv.gz", gzip.compress(GOOD_CSV.encode())[:-20]), "train.csv.gz"),
    "no gzip at all": (_data("train.csv.gz", GOOD_CSV), "train.csv.gz"),
    "a broken parquet": (_data("train.parquet", b"PAR1nonsensePAR1"), "train.parquet"),
    "lines that are no JSON": (_data("train.jsonl", '{"text": "fine", "label": 1}\nnonsense\n'), "train.jsonl"),
    "a test set that is broken": (_data("train.csv", GOOD_CSV, test="text,label\nfine,9\n"), "has the label"),
    "a prompt that is not there": (_beside("--prompt.init=./nothing.safetensors"), "cannot be read as a prompt"),
    "a torn prompt": (_prompt(b"\x10\0\0\0\0\0\0\0{}"), "cannot be read as a prompt"),
    "an empty prompt": (_prompt(b""), "cannot be read as a prompt"),
    "a prompt that claims a huge header": (_prompt(b"\xff" * 8 + b"{}"), "cannot be read as a prompt"),
    "a pickle for a prompt": (_prompt(b"\x80\x04K\x01."), "cannot be read as a prompt"),
    "a prompt without a vector": (_prompt({"prompt": _vector()}), "it has no vector"),
    "a prompt of two dimensions": (_prompt({"vector": np.zeros((20, 128), dtype=np.float32)}), "it has no vector"),
    "a prompt of another length": (
        _prompt({"vector": _vector()}, "--prompt.num_virtual_tokens=3"), f"{PARAMETERS} parameters"
    ),
    "a prompt of another method": (_prompt({"vector": _vector()}, "--prompt.method=prefix"), "parameters"),
    "a prompt of another type": (_prompt({"vector": np.zeros(PARAMETERS)}), "float64"),
    "a prompt of NaN": (_prompt({"vector": _vector(value=np.nan)}), "not finite"),
    "a prompt of infinity": (_prompt({"vector": _vector(value=np.inf)}), "not finite"),
    "a directory of another run": (_directory({"config.toml": "seed = 0\n"}), "not empty"),
    "a directory below a file": (_directory({"file": ""}, "--output.dir=tests/jobs.py/run"), "jobs.py"),
    "a place that is not ours": (_beside("--output.dir=/proc/run"), "cannot be written to"),
    "a resume of what is no run": (
        _directory({"notes.txt": ""}, "--output.resume=true"), "notes.txt is no file of a run"
    ),
    "a resume of what has no settings": (
        _directory({"config.toml": "seed = 7\n"}, "--output.resume=true"), "no run of this program"
    ),
    "a resume with other settings": (
        _directory({"config.toml": tomli_w.dumps(to_dict(OTHER))}, "--output.resume=true"),
        "client.lr = 0.5 (now 0.3)",
    ),
    "a resume of a run that lost its records": (_run_without("rounds.jsonl"), "rounds.jsonl"),
    "a resume of a run that lost its timings": (_run_without("timings.csv"), "timings.csv"),
    "a resume of a run that lost a round": (_run_without("rounds.jsonl", '{"round": 1}\n'), "line 1: round is 1"),
    "a resume of a run whose records are nonsense": (_run_without("rounds.jsonl", "nonsense\n"), "rounds.jsonl"),
    "a resume of a torn checkpoint": (
        _directory({"checkpoint/round-00000001.safetensors": "torn"}, "--output.resume=true"), "is damaged"
    ),
    "a model without weights": (_model({"config.json": json.dumps({"model_type": "bert"})}), "model"),
    "a model of an unknown kind": (_model({"config.json": json.dumps({"model_type": "abacus"})}), "model"),
    "a model whose config is no JSON": (_model({"config.json": "nonsense"}), "model"),
    "a model without a config": (_model({"README": ""}), "model"),
}  # fmt: skip


LATE = [case for case, (make, _) in CASES.items() if not isinstance(make, _Settings)]
"""Cases that a rank finds once MPI has started."""


def arguments(case: str, root: Path) -> list[str]:
    """Make a case in a folder and return its command line; unless it is about that, the run goes to `root / "run"`."""
    return [*SMALL, f"--output.dir={root / 'run'}", *CASES[case][0](root)]
