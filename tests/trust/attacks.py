"""Files of somebody else who means harm. Each case makes them in a folder, and says what the one message has.

A case that succeeds runs code or touches a file: then `WAS_HERE`, in the folder beside it, exists, or `KEPT` is another
one.
"""

import base64
import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from safetensors.numpy import save_file

from tests.bad_input import GOOD_CSV

WAS_HERE, KEPT = "was_here", "kept"
MODULE = "theirs_of_a_test"
TOUCHES = "import pathlib\npathlib.Path({marker!r}).touch()\n"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One case."""

    make: Callable[[Path], list[str]]
    """Makes the files in a folder and returns the flags of the run."""
    says: str
    """Part of the one message."""


def code(root: Path) -> str:
    """Put a module that leaves a mark when it is imported beside the files; returns its name."""
    (root / f"{MODULE}.py").write_text(TOUCHES.format(marker=str(root / WAS_HERE)) + "class T: ...\n")
    return MODULE


def recipe(text: str, says: str) -> Attack:
    """A recipe; {module} in it is a module that leaves a mark."""

    def make(root: Path) -> list[str]:
        (root / "recipe.toml").write_text(text.replace("{module}", code(root)))
        return [f"--config={root / 'recipe.toml'}"]

    return Attack(make=make, says=says)


def flags(says: str, *given: str) -> Attack:
    return Attack(make=lambda root: [flag.replace("{module}", code(root)) for flag in given], says=says)


def data(name: str, content: Callable[[Path], bytes], says: str, *given: str) -> Attack:
    """A data file of a name, beside a good test file."""

    def make(root: Path) -> list[str]:
        folder = root / "data"
        folder.mkdir()
        (folder / name).write_bytes(content(root))
        (folder / "test.csv").write_text(GOOD_CSV)
        return ["--task.name=sst2", f"--task.data={folder}", *given]

    return Attack(make=make, says=says)


def parquet_of(columns: dict[str, Any], schema: pa.Schema | None = None, **options: Any) -> bytes:
    return parquet_of_table(pa.table(columns, schema=schema), **options)


def parquet_of_table(table: pa.Table, **options: Any) -> bytes:
    out = pa.BufferOutputStream()
    parquet.write_table(table, out, **options)
    return out.getvalue().to_pybytes()


def _image_parquet(root: Path) -> bytes:
    """A column that a library decodes as images, by opening the path in it."""
    (root / "secret.png").write_bytes(b"secret")
    text = [{"bytes": None, "path": str(root / "secret.png")}] * 40
    features = {"info": {"features": {"text": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}
    table = pa.table({"text": text, "label": [k % 2 for k in range(40)]})
    out = pa.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), out)
    return out.getvalue().to_pybytes()


def _bomb(ending: str) -> Callable[[Path], bytes]:
    """A small file that expands to 300 MB or more."""

    def make(root: Path) -> bytes:
        rows = 300
        text = "x" * 1_000_000
        if ending == "csv.gz":
            line = f"{text},1\n".encode()
            return gzip.compress(b"text,label\n" + rows * line, 6)
        columns = {"text": [text] * rows, "label": [k % 2 for k in range(rows)]}
        return parquet_of(columns, use_dictionary=ending == "dictionary", compression="zstd")

    return make


def model(config: dict[str, Any], says: str, files: dict[str, str] | None = None) -> Attack:
    """A folder of a tiny BERT whose config has some more keys, with other files in it; {root} is the folder above."""

    def make(root: Path) -> list[str]:
        from tests.tiny import save_tiny

        folder = save_tiny("bert", root / "model")
        name = code(root)
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**own, **config}))
        for file, content in (files or {}).items():
            (folder / file).write_text(content.replace("{root}", str(root)).replace("{module}", name))
        return [f"--model.name={folder}", '--task.label_words=["terrible","great"]']

    return Attack(make=make, says=says)


def adapter(config: str, says: str) -> Attack:
    """A folder that claims to be a PEFT adapter."""

    def make(root: Path) -> list[str]:
        folder = root / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config)
        save_file({"prompt_embeddings": np.zeros((20, 128), dtype=np.float32)}, folder / "adapter_model.safetensors")
        return [f"--prompt.init={folder}"]

    return Attack(make=make, says=says)


def _links(file: str, target: str) -> Attack:
    """An output directory in which a name is a link to a file or folder that must stay as it is."""

    def make(root: Path) -> list[str]:
        (root / "home").mkdir()
        (root / "home" / ".profile").write_text("mine")
        (root / KEPT).write_text("mine")
        (root / "out").mkdir()
        (root / "out" / file).symlink_to(root / target)
        return [f"--output.dir={root / 'out'}", "--output.resume=true"]

    return Attack(make=make, says=f"{file} is a link")


def _special(file: str, kind: str) -> Attack:
    """An output directory in which a name is a pipe, which would be waited for, or leads to a device without end."""

    def make(root: Path) -> list[str]:
        (root / "out").mkdir()
        if kind == "pipe":
            os.mkfifo(root / "out" / file)
        else:
            (root / "out" / file).symlink_to("/dev/zero")
        return [f"--output.dir={root / 'out'}", "--output.resume=true"]

    return Attack(make=make, says=f"{file} is a link, a pipe or a device")


def _hard_link(root: Path) -> list[str]:
    """A lock that is another name of a file of the user's."""
    (root / KEPT).write_text("mine")
    (root / "out").mkdir()
    (root / "out" / ".lock").hardlink_to(root / KEPT)
    return [f"--output.dir={root / 'out'}"]


def tokenizer(change: Callable[[dict[str, Any]], object], says: str, kind: str = "bert", text: str = "") -> Attack:
    """A tiny model whose tokenizer.json is another one; {text} is in all training texts."""

    def make(root: Path) -> list[str]:
        from tests.tiny import save_tiny

        folder = save_tiny(kind, root / "model")
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        flags = [f"--model.name={folder}", '--task.label_words=["terrible","great"]']
        if text:
            (root / "data").mkdir()
            for split in ("train", "test"):
                rows = "".join(f"{text},{k % 2}\n" for k in range(40))
                (root / "data" / f"{split}.csv").write_text(f"text,label\n{rows}")
            flags += ["--task.name=sst2", f"--task.data={root / 'data'}"]
        return flags

    return Attack(make=make, says=says)


def _grows(content: dict[str, Any]) -> None:
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 34}


def _template(content: dict[str, Any]) -> None:
    """A template of 20,000 tokens, 400 times a special token of 50 ids."""
    token = {"id": "[X]", "ids": [2] * 50, "tokens": ["[X]"] * 50}
    single = [*[{"SpecialToken": {"id": "[X]", "type_id": 0}}] * 400, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"[X]": token}
    }  # fmt: skip


def _nonsense(content: dict[str, Any]) -> None:
    content["post_processor"] = {"type": "TemplateProcessing", "single": ["a"], "pair": 3, "special_tokens": []}


def _repeats(content: dict[str, Any]) -> None:
    """A template that is 20,000 times the text."""
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * 20_000
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}
    }  # fmt: skip


def _panics(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "z"}


def _far_id(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["great"] = 999_999


def _float8(root: Path) -> list[str]:
    header = b'{"prompt_embeddings":{"dtype":"F8_E4M3","shape":[20,128],"data_offsets":[0,2560]}}'
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    content = len(header).to_bytes(8, "little") + header + bytes(2560)
    (root / "adapter" / "adapter_model.safetensors").write_bytes(content)
    return [f"--prompt.init={root / 'adapter'}"]


def _endless(flag: str, says: str, kind: str) -> Attack:
    """A flag that names a pipe or a device, which have no end."""

    def make(root: Path) -> list[str]:
        if kind == "pipe":
            os.mkfifo(root / "pipe")
        return [f"{flag}={root / 'pipe' if kind == 'pipe' else '/dev/zero'}"]

    return Attack(make=make, says=says)


def _pattern(root: Path) -> list[str]:
    """A folder's name that is a pattern for another folder's, which would be read in its place."""
    for name in ("data1", "data[1]"):
        (root / name).mkdir()
        for split in ("train", "test"):
            rows = GOOD_CSV if name == "data[1]" else "text,label\nother,0\n"
            (root / name / f"{split}.csv").write_text(rows)
    return ["--task.name=sst2", f"--task.data={root / 'data[1]'}", "--task.max_train=1000"]


def _dotted(form: str) -> str:
    many = ".".join(["a"] * 400_000)
    return {"key": f"{many} = 1\n", "table": f"[{many}]\n", "quoted": '"a" . ' * 150_000 + "a = 1\n"}[form]


PICKLE = base64.b64decode("gASVIQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAR0cnVllIWUUpQu")
"""A pickle that calls os.system("true")."""

REFUSED: dict[str, Attack] = {
    "a class path in a recipe": recipe('[task]\nclass_path = "{module}.T"\n', "task.class_path"),
    "a class path beside arguments": recipe(
        '[task]\nclass_path = "{module}.T"\ninit_args = {name = "x"}\n', "no setting 'task."
    ),
    "a class path for all": recipe('class_path = "{module}.T"\n', "no setting 'class_path'"),
    "keyword arguments": recipe("[client.dict_kwargs]\nx = 1\n", "client.dict_kwargs"),
    "a class path for a value": recipe('[task]\nname = {class_path = "{module}.T"}\n', "task.name"),
    "a class path in a list": recipe('[task]\nlabel_words = [{class_path = "{module}.T"}]\n', "task.label_words"),
    "a recipe in a recipe": recipe('config = "/etc/hostname"\n', "no setting 'config'"),
    "a section that is a file": recipe('task = "/etc/hostname"\n', "task is"),
    "a section as a flag": flags("no setting '--task'", '--task={"class_path": "{module}.T"}'),
    "help of a class": flags("no setting '--task.help'", "--task.help={module}.T"),
    "a class path as a flag": flags("no setting '--task.class_path'", "--task.class_path={module}.T"),
    "an appended list": flags("no setting '--poison.clients+'", "--poison.clients+=3"),
    "keys of 400,000 parts": recipe(_dotted("key"), "more than 8 parts"),
    "a table of 400,000 parts": recipe(_dotted("table"), "more than 8 parts"),
    "quoted keys of 150,000 parts": recipe(_dotted("quoted"), "more than 8 parts"),
    "a number of 1,000 digits": recipe(f"seed = {'9' * 1000}\n", "seed"),
    "a name of 100,000 digits": recipe(f"[task]\nname = 0x{'f' * 100_000}\n", "task.name is a number of more than 64"),
    "a name that leads out": recipe('[task]\nname = "../../out"\n', "task.name is '../../out'"),
    "an absolute name": flags("task.name is '/tmp/out'", "--task.name=/tmp/out"),
    "a name of escapes": recipe('[task]\nname = "a\\u001b[2J"\n', "task.name is"),
    "an endless recipe": _endless("--config", "no regular file", "device"),
    "a recipe from a pipe": _endless("--config", "no regular file", "pipe"),
    "an endless prompt": _endless("--prompt.init", "no regular file", "device"),
    "a prompt from a pipe": _endless("--prompt.init", "no regular file", "pipe"),
    "a protocol for data": flags("no such folder", "--task.name=sst2", "--task.data=da::t"),
    "an address for data": flags("no such folder", "--task.name=sst2", "--task.data=http://127.0.0.1:9/x"),
    "a path for data": flags("no such folder", "--task.name=sst2", "--task.data=tests/none"),
    "a file name for data": flags("no such folder", "--task.name=sst2", "--task.data=train.csv"),
    "a path for a model": flags("no such folder", "--model.name=tests/none"),
    "a file name for a model": flags("no such folder", "--model.name=model.safetensors"),
    "images that name files": data("train.parquet", _image_parquet, "only text and numbers"),
    "lists for texts": data(
        "train.parquet", lambda _: parquet_of({"text": [["a"]] * 4, "label": [0, 1] * 2}), "only text and numbers"
    ),
    "bytes for texts": data(
        "train.parquet", lambda _: parquet_of({"text": [b"a"] * 4, "label": [0, 1] * 2}), "only text and numbers"
    ),
    "lists for texts in JSON": data(
        "train.jsonl", lambda _: b'{"text": ["a"], "label": 1}\n' * 9, "row 1 has a list in column 'text'"
    ),
    "tables for texts in JSON": data(
        "train.jsonl", lambda _: b'{"text": {"path": "/etc/passwd"}, "label": 1}\n', "row 1 has a table"
    ),
    "JSON without depth": data("train.jsonl", lambda _: b"[" * 100_000, "train.jsonl cannot be read"),
    "a bomb in gzip": data("train.csv.gz", _bomb("csv.gz"), "expands to"),
    "a bomb in Parquet": data("train.parquet", _bomb("plain"), "expands to"),
    "two columns of a name": data(
        "train.parquet",
        lambda _: parquet_of_table(pa.table([["a", "b"], ["c", "d"], [0, 1]], names=["text", "text", "label"])),
        "two columns of the same name",
    ),
    "a bomb of a dictionary": data("train.parquet", _bomb("dictionary"), "expands to"),
    "a text of 2 MB": data("train.csv", lambda _: b"text,label\n" + b"x" * 2**21 + b",1\n", "train.csv cannot be read"),
    "a pickle for data": data("train.parquet", lambda _: PICKLE, "train.parquet cannot be read"),
    "attention from a hub": model({"attn_implementation": "theirs/kernel"}, "attn_implementation"),
    "attention for all parts": model({"attn_implementation": {"": "theirs/kernel:f"}}, "attn_implementation"),
    "attention below": model({"text_config": {"_attn_implementation": "theirs/kernel"}}, "attn_implementation"),
    "experts from a hub": model({"experts_implementation": "theirs/kernel"}, "experts_implementation"),
    "quantisation by other code": model({"quantization_config": {"quant_method": "gptq"}}, "bitsandbytes alone"),
    "quantisation by a name": model({"quantization_config": "theirs/kernel"}, "bitsandbytes alone"),
    "quantisation with more": model(
        {"quantization_config": {"load_in_4bit": True, "kernel": "theirs/kernel"}}, "which is no setting of"
    ),
    "a pattern without end": model(
        {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["(a+)+$"]}}, "which is no setting of"
    ),
    "fusions": model({"fusion_config": {"patch_embeddings": True}}, "fusion_config"),
    "other weights": model({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
    "weights of elsewhere": model(
        {}, "a model's weights lie in its own folder",
        {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../other.safetensors"}})},
    ),
    "a vocabulary of elsewhere": model(
        {}, "files lie in its own folder", {"tokenizer_config.json": json.dumps({"vocab_file": "/etc/passwd"})}
    ),
    "an adapter for a model": model(
        {}, "an adapter of another model", {"adapter_config.json": '{"base_model_name_or_path": "theirs/model"}'}
    ),
    "a config that is no table": model({}, "is no table", {"tokenizer_config.json": "[]"}),
    "a config without depth": model({}, "nested too deeply", {"generation_config.json": "[" * 100_000}),
    "an adapter that names code": adapter('{"peft_type": "LORA", "auto_mapping": {"x": "y"}}', "of type LORA"),
    "an adapter that is a list": adapter("[]", "cannot be read as a PEFT adapter's"),
    "an adapter without depth": adapter("[" * 100_000, "cannot be read as a PEFT adapter's"),
    "a lock that is a link": _links(".lock", KEPT),
    "checkpoints in the home folder": _links("checkpoint", "home"),
    "figures in the home folder": _links("figures", "home"),
    "scalars in the home folder": _links("tensorboard", "home"),
    "settings that are a link": _links("config.toml", KEPT),
    "records that are a link": _links("rounds.jsonl", KEPT),
    "timings that are a link": _links("timings.csv", KEPT),
    "a page that is a link": _links("report.html", KEPT),
    "a prompt that is a link": _links("prompt.safetensors", KEPT),
    "a link to nothing": _links("summary.json", "nothing"),
    "settings that are a pipe": _special("config.toml", "pipe"),
    "records without end": _special("rounds.jsonl", "device"),
    "timings without end": _special("timings.csv", "device"),
    "a lock that is a pipe": _special(".lock", "pipe"),
    "a lock of two names": Attack(make=_hard_link, says=".lock is a link"),
    "a row without end": data("train.csv", lambda _: b"text,label\n" + b'"a\n",' * 1_000_000, "a row of more than"),
    "a model without layers": model({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "layers in chunks": model({"chunk_size_feed_forward": 3}, "chunk_size_feed_forward = 3"),
    "label words of 300 characters": flags("at most 200", f'--task.label_words=["{"a" * 300}","b"]'),
    "1,001 label words": flags("1,000 words", f"--task.label_words={json.dumps([str(k) for k in range(1001)])}"),
    "a pull of 1e39": flags("client.proximal is 1e+39", "--client.proximal=1e39"),
    "a noise of 1e308": flags("federation.noise_std is 1e+308", "--federation.noise_std=1e308"),
    "hardly any noise": flags("privacy.noise_multiplier is 1e-160", "--privacy.noise_multiplier=1e-160"),
    "a tokenizer that adds 20,000 tokens": tokenizer(_template, "adds 4"),
    "a tokenizer whose template is none": tokenizer(_nonsense, "whose tokenizer cannot be read"),
    "a tokenizer that repeats texts": tokenizer(_repeats, "times as long"),
    "a tokenizer that grows texts": tokenizer(_grows, "times as long"),
    "a tokenizer that panics": tokenizer(_panics, "cannot encode a text", text="x" * 40_000),
    "a tokenizer of another model": tokenizer(_far_id, "makes the token 999999"),
    "a tokenizer without words": tokenizer(lambda made: made.update(pre_tokenizer=None), "splits into"),
    "a thousand million labels": model({"num_labels": 10**9}, "num_labels"),
    "a thousand million layers": model({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a million lists in a config": model({"x": [[]] * 1_100_000}, "lists and tables"),
    "numbers that numpy has not": Attack(make=_float8, says="cannot be read as a PEFT adapter"),
    "half of a pair": data("train.jsonl", lambda _: b'{"text": "a \\ud800 film", "label": 1}\n', "surrogate pair"),
    "a line of millions of fields": data("train.csv", lambda _: b"," * 2**23, "more than 4,194,304 characters"),
    "a line of millions of lists": data(
        "train.jsonl", lambda _: b"[" + b"[]," * 2**21, "more than 4,194,304 characters"
    ),
    "a gzip name without end": data(
        "train.csv.gz", lambda _: b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"x" * 10**7, "a name without end"
    ),
    "a folder with NUL": recipe('[output]\ndir = "a\\u0000b"\n', "output.dir is"),
    "a model of 5,000 letters": flags("no such folder", f"--model.name={'m' * 5000}"),
    "data of 5,000 letters": flags("File name too long", "--task.name=sst2", f"--task.data={'m' * 5000}"),
    "a prompt of 5,000 letters": flags("File name too long", f"--prompt.init=./{'m' * 5000}"),
    "clients without number": flags("federation.clients is", f"--federation.clients={10**15}", "--poison.clients=all"),
    "tokens without number": flags("prompt.num_virtual_tokens is", f"--prompt.num_virtual_tokens={10**12}"),
    "a template of doubled braces": flags("task.template is", "--task.template={{text}} {mask}"),
    "a template of an open brace": flags("task.template is", "--task.template={text} {mask} {"),
    "a flag that is no text": flags("task.template is", "--task.template={text} \udcff {mask}"),
}  # fmt: skip

HARMLESS: dict[str, Attack] = {
    "a pattern for a folder": Attack(make=_pattern, says=""),
    "code beside a model": model(
        {"auto_map": {"AutoConfig": f"{MODULE}.T", "AutoModelForMaskedLM": f"{MODULE}.T"}},
        "",
        {f"{MODULE}.py": "1/0\n"},
    ),
    "a template that computes": model(
        {}, "", {"chat_template.jinja": "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}{% endfor %}"}
    ),
    "code to generate with": model(
        {}, "", {"generation_config.json": '{"max_length": 9}', "custom_generate.py": "1/0\n"}
    ),
}  # fmt: skip
"""Cases that are read, and in which nothing of the attack happens."""
