"""From settings to everything that a rank has before the first round: tokens, device, PLM, method, first vector.

The first rank of each node downloads the model and makes the tokens while the others import the model's class; then all
of them map the same files. Wrong settings or data on any rank end the run on all ranks.
"""

import dataclasses
import errno
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.comm.placement import bind_device, thread_count
from fedprompt_mpi.config import RunConfig, SettingsError, to_dict
from fedprompt_mpi.federation.server import make_rule
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.state import check_state
from fedprompt_mpi.files import CannotWriteError, RunFile
from fedprompt_mpi.liveness.output import printable
from fedprompt_mpi.plugins.load import hashes
from fedprompt_mpi.rundir.checkpoint import BOUNDED_SUM, Checkpoint, check_numerics, load_checkpoint
from fedprompt_mpi.rundir.clean_run import read_clean_run
from fedprompt_mpi.rundir.directory import check_directory, check_records, check_writable, make_directory
from fedprompt_mpi.rundir.journal import numeric_versions
from fedprompt_mpi.rundir.lock import DirectoryInUseError, DirectoryLock
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import read_prompt
from fedprompt_mpi.rundir.records import RoundRecord
from fedprompt_mpi.rundir.tracking import missing_packages, trackers_of
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.tasks import Task

if TYPE_CHECKING:  # torch is imported late, while this rank waits for its data anyway
    from fedprompt_mpi.plm.backbone import Backbone
    from fedprompt_mpi.plm.flat import FlatLayout
    from fedprompt_mpi.plm.method_base import Method

Result = TypeVar("Result")
MODEL_FOLDER = "model_folder.txt"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What rank 0 finds in the run directory; the other ranks only know the directory."""

    paths: RunPaths
    existing: list[RunFile]
    """The checkpoints."""
    checkpoint: Checkpoint | None
    """The checkpoint, or the prompt of another run, to start from."""
    clean_rates: dict[int, float]


def prepare(
    config: RunConfig, task: Task, channel: Channel, lock: DirectoryLock, started: float
) -> tuple[Setup, Checkpoint]:
    """Load everything, and check it.

    Args:
        config: the settings.
        task: the resolved task of the settings.
        channel: between the ranks.
        lock: of the run directory, which rank 0 makes and locks.
        started: start of the run, on the clock of `time.perf_counter`.

    Returns:
        What this rank has, and the state to start from.

    Raises:
        SettingsError: on every rank, with the message of the lowest rank that found something wrong.
    """
    start = run_on_all_ranks(channel, lambda: _find_start(config, task, channel))
    plugins = hashes()
    everyone = channel.collect(json.dumps(plugins).encode())
    run_on_all_ranks(channel, lambda: check_same(everyone))
    with channel.node_folder() as folder:
        run_on_all_ranks(channel, lambda: _make_data(config, task, channel, folder))
        corpus = Corpus.map(folder)
        threads, backbone, method = run_on_all_ranks(channel, lambda: _load_model(config, channel, corpus, folder))
        if config.prompt.method != "full":
            share_bf16(channel, backbone, folder / "bf16.safetensors")
    numerics = {**numeric_versions(), "arithmetic": _arithmetic(channel, backbone)}
    if make_rule(config).bound is not None:
        numerics[BOUNDED_SUM] = "whole numbers"
    numerics |= {f"plugin {name}": sha256 for name, sha256 in plugins.items()}

    def first_state() -> Checkpoint:
        if start.checkpoint is not None and not config.output.other_versions:
            check_numerics(start.checkpoint, numerics)
        return _first_state(config, channel, backbone, method, start.checkpoint)

    checkpoint = run_on_all_ranks(channel, first_state)
    done = np.array([checkpoint.round_])
    channel.tell(done)
    paths = run_on_all_ranks(channel, lambda: _claim(config, channel, lock, start))
    setup = Setup(
        config=config,
        task=task,
        channel=channel,
        corpus=corpus,
        backbone=backbone,
        method=method,
        paths=paths,
        threads=threads,
        shard=shard_of(channel, on_gpu=backbone.device.type == "cuda"),
        clean_rates=start.clean_rates,
        numerics=numerics,
        started=started,
    )
    return setup, dataclasses.replace(checkpoint, round_=int(done[0]))


def run_on_all_ranks(channel: Channel, part: Callable[[], Result]) -> Result:
    """Run a part on every rank; if it fails on one of them, raise that error's message on all.

    Raises:
        SettingsError: on every rank.
    """
    error, result = None, None
    channel.phases.liveness.enter("prepare", 0)
    try:
        result = part()
    except SettingsError as wrong:
        error = str(wrong)
    except OSError as wrong:  # a name that is too long, a place that is no folder
        if wrong.filename is None or wrong.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            raise
        error = f"{str(wrong.filename)[:200]!r}: {wrong.strerror}: name another"
    message = channel.agree(error)
    if message is not None:
        raise SettingsError(message)
    return result  # pyright: ignore[reportReturnType] - there is a result if no rank has an error


def _check_packages(config: RunConfig) -> None:
    """Raise SettingsError if a rank that uses them lacks an optional package."""
    rule, filters = config.federation.aggregator, config.federation.filter_round is not None
    for setting, is_set, module, package in (
        (f"federation.aggregator is {rule}", rule in ("flame", "freqfed"), "sklearn", "scikit-learn"),
        ("federation.filter_round is given", filters, "sklearn", "scikit-learn"),
        ("privacy.secure_aggregation is true", config.privacy.secure_aggregation, "cryptography", "cryptography"),
        ("privacy.mechanism is dp_fedavg", config.privacy.mechanism == "dp_fedavg", "dp_accounting", "dp-accounting"),
    ):
        if is_set and importlib.util.find_spec(module) is None:
            raise SettingsError(f"{setting}, which needs a package that is not here: pip install {package}")
    trackers = trackers_of(to_dict(config))
    if missing := missing_packages(trackers):
        raise SettingsError(
            f"output.track is {', '.join(trackers)}, which needs packages that are not here: pip install "
            f"{' '.join(missing)}"
        )


def _find_start(config: RunConfig, task: Task, channel: Channel) -> _Start:
    """Find the run directory and, on rank 0, the state to start from."""
    default = Path("runs") / f"{task.name}-{config.prompt.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = RunPaths(Path(config.output.dir) if config.output.dir else default)
    filters, is_secure = config.federation.filter_round is not None, config.privacy.secure_aggregation
    uses_packages = config.poison.fitted or filters or is_secure  # clients do, too
    if channel.rank == 0 or uses_packages:
        _check_packages(config)
    if channel.rank:
        return _Start(paths=paths, existing=[], checkpoint=None, clean_rates={})
    if config.output.dir is None:
        check_writable(default)
    else:
        check_directory(paths, resume=config.output.resume)
    existing, found = paths.checkpoints(), None
    if config.output.resume:
        found, warnings = load_checkpoint(paths, to_dict(config))
        for warning in warnings:
            print(printable(f"fedprompt_mpi: warning: {warning}"), file=sys.stderr, flush=True)
    if found is not None:
        check_records(paths, found.round_, config)
    if found is None and config.prompt.init not in ("vocab", "random") and not _is_lora_adapter(config):
        found = _read_first(config.prompt.init)
    return _Start(paths=paths, existing=existing, checkpoint=found, clean_rates=read_clean_run(config))


def check_same(everyone: list[bytes]) -> None:
    """Check that all ranks have the same plug-ins.

    Args:
        everyone: for each rank the hashes of its plug-ins by name, in JSON; [] on other ranks than 0.

    Raises:
        SettingsError: naming a rank that has another.
    """
    hashes = [json.loads(own) for own in everyone]
    for rank, own in enumerate(hashes):
        for name in sorted({*own, *hashes[0]}):
            ours, theirs = hashes[0].get(name, "nothing"), own.get(name, "nothing")
            if ours != theirs:
                raise SettingsError(
                    f"plugin {name} is another file on rank {rank} ({theirs[:12]}) than on rank 0 ({ours[:12]}): "
                    "give every node the same"
                )


def _claim(config: RunConfig, channel: Channel, lock: DirectoryLock, start: _Start) -> RunPaths:
    """Let rank 0 make and lock the run directory, and return it; from here on the settings are right.

    Raises:
        SettingsError: if another job uses the directory, or has used it since its checkpoints were read.
    """
    paths = start.paths
    if channel.rank:
        return paths
    named = f"output.dir is {str(paths.directory)!r}"
    try:
        paths = RunPaths(make_directory(paths.directory, is_new=config.output.dir is None))
        lock.take(paths.directory)
    except OSError as error:
        raise SettingsError(f"{named}, which cannot be made ({error.strerror})") from error
    except DirectoryInUseError as error:
        raise SettingsError(
            f"{named}, which another job is using ({error}): wait for its end, or name another; "
            f"if that process is gone, remove {paths.lock.name} in it"
        ) from error
    except CannotWriteError as error:
        raise SettingsError(f"{named}: cannot write {error}. {error.remedy}") from error
    if paths.checkpoints() != start.existing or not (config.output.resume or paths.is_empty()):
        raise SettingsError(f"{named}, which another job has used meanwhile: start again, or name another")
    return paths


def _read_first(path: str) -> Checkpoint:
    """Return the state before the first round from a prompt of an earlier run, or a PEFT adapter."""
    from fedprompt_mpi.plm.adapter import is_adapter, read_adapter

    if is_adapter(path):
        return Checkpoint(vector=read_adapter(path).ravel(), round_=0, record=RoundRecord(round=0))
    tensors, _ = read_prompt(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name != "vector"}
    return Checkpoint(vector=tensors["vector"], round_=0, record=RoundRecord(round=0), shapes=shapes)


def _is_lora_adapter(config: RunConfig) -> bool:
    """Return whether the run starts from LoRA that PEFT has saved: its order is known once the model is loaded."""
    from fedprompt_mpi.plm.adapter import is_adapter

    return config.prompt.method == "lora" and is_adapter(config.prompt.init)


def _make_data(config: RunConfig, task: Task, channel: Channel, folder: Path) -> None:
    """Download the model and make the tokens, once per node; meanwhile the other ranks import the model's class."""
    channel.progress.stage("loading PyTorch and transformers")
    from fedprompt_mpi.plm import hugging_face
    from fedprompt_mpi.plm.supported import check_supported

    liveness = channel.phases.liveness
    liveness.alive()
    if channel.placement.local_rank == 0:
        hugging_face.transformers_quiet()
        channel.progress.stage(f"looking for the model {config.model.name}")
        model = hugging_face.download(config.model.name)
        liveness.alive()
        plm = hugging_face.read_config(model)
        check_supported(plm, config.prompt.method, config.model.name)
        channel.progress.stage("reading texts")
        tokenizer, family = hugging_face.load_tokenizer(model), hugging_face.family_of(plm)
        build(config, task, tokenizer, family, channel.progress).save(folder)
        (folder / MODEL_FOLDER).write_text(model)
    elif Path(config.model.name).is_dir() or config.model.name == "embedded":
        hugging_face.model_class(hugging_face.read_config(config.model.name))


def _load_model(config: RunConfig, channel: Channel, corpus: Corpus, folder: Path) -> "tuple[int, Backbone, Method]":
    liveness, placement = channel.phases.liveness, channel.placement
    import torch

    liveness.alive()
    from fedprompt_mpi.federation.trial_batch import try_longest
    from fedprompt_mpi.plm.backbone import check_fit, load_backbone
    from fedprompt_mpi.plm.methods import make_method

    liveness.alive()
    channel.progress.stage(f"loading the model {config.model.name}")
    one_client = config.client.batched == 1
    threads = thread_count(placement, os.environ.get("OMP_NUM_THREADS"), one_client_a_pass=one_client)
    torch.set_num_threads(threads)
    gpus = 0 if config.model.device == "cpu" else torch.cuda.device_count()
    trains = channel.rank > 0 or channel.size == 1
    if config.model.device == "cuda" and gpus == 0 and trains:
        raise SettingsError(
            f"model.device is cuda but rank {channel.rank} on {placement.host} sees no GPU: use auto or cpu"
        )
    device = torch.device(bind_device(gpus, placement, is_worker=trains))
    model = (folder / MODEL_FOLDER).read_text()
    label_ids = torch.from_numpy(corpus.label_ids)
    backbone = load_backbone(config.model, model, label_ids, device, int(corpus.mask_id))
    backbone.weigh(corpus.label_shares)
    if config.drops_out:
        backbone.take_no_shortcuts()
    method = make_method(config.prompt, backbone.geometry, backbone.model)
    check_fit(config, backbone, corpus.largest_id)
    channel.progress.stage("trying the longest texts")
    try_longest(config, backbone, method, corpus)
    channel.progress.stage("waiting for the other ranks")
    return threads, backbone, method


def share_bf16(channel: Channel, backbone: "Backbone", file: Path) -> None:
    """Convert the matrices of ranks that compute in bfloat16; the CPU ranks of a node share one copy.

    Every rank calls this, also one that computes in float32: rank 0 may, beside workers on GPUs.
    """
    from fedprompt_mpi.plm.backbone import cast_matrices, map_matrices, save_matrices

    maps = backbone.bf16 and backbone.device.type == "cpu"
    if maps and channel.placement.local_rank == 0:
        save_matrices(backbone, file)
    channel.agree(None)  # the file is written
    if maps and file.exists():
        map_matrices(backbone, file)
    elif backbone.bf16:
        cast_matrices(backbone)


def _arithmetic(channel: Channel, backbone: "Backbone") -> str:
    """Return the arithmetic of the workers' PLM; every rank calls this."""
    trains = channel.rank > 0 or channel.size == 1
    in_bf16 = channel.sum(np.array([float(backbone.bf16 and trains)]))
    return "bfloat16" if in_bf16.any() else "float32"


def _first_state(
    config: RunConfig, channel: Channel, backbone: "Backbone", method: "Method", found: Checkpoint | None
) -> Checkpoint:
    """Return the state to start from on rank 0, and a buffer for the vector on the other ranks."""
    size = method.layout.size
    if channel.rank:
        return Checkpoint(vector=_buffer(config, backbone, size), round_=0, record=RoundRecord(round=0))
    if found is None and _is_lora_adapter(config):
        from fedprompt_mpi.plm.adapter import read_lora_adapter

        vector = read_lora_adapter(config.prompt.init, method.layout, config.prompt.lora)
        found = Checkpoint(vector=vector, round_=0, record=RoundRecord(round=0))
    elif found is None:
        vector = method.initial(backbone.word_embeddings(), seeds.generator(config.seed, "initial vector"))
        found = Checkpoint(vector=vector, round_=0, record=RoundRecord(round=0))
    _check_vector(found, method.layout, config)
    if found.round_:
        check_state(found, config)
    return found


def _buffer(config: RunConfig, backbone: "Backbone", size: int) -> Vector:
    import torch

    if config.comm.gpu_aware:
        return torch.zeros(size, device=backbone.device)
    return np.zeros(size, dtype=np.float32)


def _check_vector(found: Checkpoint, layout: "FlatLayout", config: RunConfig) -> None:
    vector, named = found.vector, f"method {config.prompt.method} with model {config.model.name}"
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise SettingsError(
            f"the prompt to start from has {vector.size} parameters ({vector.dtype}), but {named} has {layout.size} "
            "(float32): take one of the same model and method"
        )
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if found.shapes and found.shapes.get(name) != shape:
            raise SettingsError(
                f"the prompt to start from has {name} as {found.shapes.get(name, 'nothing')}, but {named} as {shape}: "
                "take one of the same model, method and sizes"
            )
    if not np.isfinite(vector).all():
        raise SettingsError("the prompt to start from holds numbers that are not finite: take another")


def shard_of(channel: Channel, *, on_gpu: bool) -> tuple[int, int] | None:
    """Return this rank's (index, count) among the evaluating ranks: those with a GPU if there are any, else all."""
    mine = np.zeros(channel.size)
    mine[channel.rank] = on_gpu
    fast = channel.sum(mine) > 0
    evaluators = np.flatnonzero(fast) if fast.any() else np.arange(channel.size)
    (position,) = np.nonzero(evaluators == channel.rank)
    return (int(position[0]), len(evaluators)) if len(position) else None
