"""Everything a rank has before the first round: tokens, device, PLM, method, first vector.

The first rank of each node fetches the model and makes the tokens while the others import what they
need; then all of them map the same files. Wrong settings or data on any rank end the run on all.
"""

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.topology import bind_device, thread_count
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.federation.checkpoint import Checkpoint, checkpoints, load_checkpoint
from fedprompt_mpi.federation.clean_run import read_clean_run
from fedprompt_mpi.files import CannotWriteError, read_prompt
from fedprompt_mpi.lock import LOCK_FILE, DirectoryInUseError, DirectoryLock, is_empty
from fedprompt_mpi.records import check_directory, check_records
from fedprompt_mpi.text.corpus import Corpus, build
from fedprompt_mpi.text.tasks import Task

if TYPE_CHECKING:  # torch is imported late, while this rank waits for its data anyway
    from fedprompt_mpi.plm.backbone import Backbone
    from fedprompt_mpi.plm.methods import Method

Result = TypeVar("Result")
MODEL_FOLDER = "model_folder.txt"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What one rank goes into the rounds with."""

    directory: Path
    corpus: Corpus
    backbone: "Backbone"
    method: "Method"
    checkpoint: Checkpoint
    """The first global vector (its values are right on rank 0 alone) and the rounds that are done."""
    threads: int
    shard: tuple[int, int] | None
    """This rank's (index, count) among those that evaluate; None if it does not."""
    clean_rates: dict[int, float]
    """Round -> attack success rate of the clean run beside this one; on rank 0."""


def prepare(config: RunConfig, task: Task, channel: Channel, lock: DirectoryLock) -> Prepared:
    """Load everything, checking it on the way.

    Args:
        config: the settings.
        task: theirs, resolved.
        channel: the ranks.
        lock: for the run directory, which rank 0 makes and takes.

    Raises:
        SettingsError: on every rank, with the message of the lowest rank that found something wrong.
    """
    directory, there, found, clean_rates = together(channel, lambda: _find_start(config, task, channel))
    shared = channel.shared_folder()
    together(channel, lambda: _make_data(config, task, channel, shared))
    corpus = Corpus.map(shared)
    threads, backbone, method = together(channel, lambda: _load_model(config, channel, corpus, shared))
    if config.prompt.method != "full":
        share_bf16(channel, backbone, shared / "bf16.safetensors")
    channel.drop_shared_folder()  # what is mapped stays
    checkpoint = together(channel, lambda: _start(config, channel, backbone, method, found))
    done = np.array([float(checkpoint.round_)])
    checkpoint = dataclasses.replace(checkpoint, round_=int(channel.sum(done)[0]))
    together(channel, lambda: _claim(config, channel, lock, directory, there))
    return Prepared(
        directory=directory,
        corpus=corpus,
        backbone=backbone,
        method=method,
        checkpoint=checkpoint,
        threads=threads,
        shard=shard_of(channel, on_gpu=backbone.device.type == "cuda"),
        clean_rates=clean_rates,
    )


def together(channel: Channel, part: Callable[[], Result]) -> Result:
    """Run a part on every rank; if it is wrong on one of them, raise its words on all."""
    error, result = None, None
    HERE.enter("prepare", 0)
    try:
        result = part()
    except SettingsError as wrong:
        error = str(wrong)
    message = channel.agree(error)
    if message is not None:
        raise SettingsError(message)
    return result  # pyright: ignore[reportReturnType] - there is one, where nobody has an error


def _check_packages(config: RunConfig) -> None:
    """Raise SettingsError if rank 0, which alone uses them, lacks an optional package."""
    for setting, wants, module, package in (
        ("federation.aggregator is flame", config.federation.aggregator == "flame", "sklearn", "scikit-learn"),
        (
            "privacy.mechanism is dp_fedavg",
            config.privacy.mechanism == "dp_fedavg",
            "dp_accounting",
            "dp-accounting",
        ),
        ("output.tensorboard is true", config.output.tensorboard, "tensorboard", "tensorboard"),
    ):
        if wants and importlib.util.find_spec(module) is None:
            raise SettingsError(f"{setting}, which needs a package that is not here: pip install {package}")


def _find_start(
    config: RunConfig, task: Task, channel: Channel
) -> tuple[Path, list[Path], Checkpoint | None, dict[int, float]]:
    """Return the run directory and, on rank 0, what is there already.

    That is its checkpoints, the checkpoint or prompt to start from, if there is to be one, and the rates of the clean
    run.
    """
    name = f"{task.name}-{config.prompt.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(config.output.dir) if config.output.dir else Path("runs") / name
    if channel.rank:
        return directory, [], None, {}
    _check_packages(config)
    check_directory(directory, resume=config.output.resume)
    there, found = checkpoints(directory), None
    if config.output.resume:
        found, warnings = load_checkpoint(directory, config)
        for warning in warnings:
            print(f"fedprompt_mpi: warning: {warning}", file=sys.stderr, flush=True)
    if found is not None:
        check_records(directory, found.round_)
    if found is None and config.prompt.init not in ("vocab", "random"):
        found = Checkpoint(vector=_read_start(config.prompt.init), round_=0, record={})
    return directory, there, found, read_clean_run(config)


def _claim(config: RunConfig, channel: Channel, lock: DirectoryLock, directory: Path, there: list[Path]) -> None:
    """Let rank 0 make the run directory and keep others out: from here on nothing about the settings is wrong.

    Raises:
        SettingsError: if another job is at work there, or has been since its checkpoints were `there`.
    """
    if channel.rank:
        return
    named = f"output.dir is {str(directory)!r}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.take(directory)
    except OSError as error:
        raise SettingsError(f"{named}, which cannot be made ({error.strerror})") from error
    except DirectoryInUseError as error:
        raise SettingsError(
            f"{named}, in which another job is at work ({error}): wait for its end, or name another; "
            f"if that process is gone, remove {LOCK_FILE} in it"
        ) from error
    except CannotWriteError as error:
        raise SettingsError(f"{named}: cannot write {error}. {error.remedy}") from error
    if checkpoints(directory) != there or not (config.output.resume or is_empty(directory)):
        raise SettingsError(f"{named}, in which another job has been at work meanwhile: start again, or name another")


def _read_start(path: str) -> np.ndarray:
    """Return the first vector `[P]` from a prompt of an earlier run, or a PEFT adapter."""
    from fedprompt_mpi.plm.adapter import is_adapter, read_adapter

    return read_adapter(path).ravel() if is_adapter(path) else read_prompt(path)[0]["vector"]


def _make_data(config: RunConfig, task: Task, channel: Channel, shared: Path) -> None:
    """Fetch the model and make the tokens, once per node; meanwhile the other ranks import the model's class."""
    from fedprompt_mpi.plm import backbone

    HERE.alive()
    if channel.place.local_rank == 0:
        folder = backbone.download(config.model.name)
        HERE.alive()
        family = backbone.family_of(backbone.read_config(folder))
        build(config, task, backbone.load_tokenizer(folder), family).save(shared)
        (shared / MODEL_FOLDER).write_text(folder)
    elif Path(config.model.name).is_dir() or config.model.name == "embedded":
        backbone.import_model_class(config.model.name)


def _load_model(config: RunConfig, channel: Channel, corpus: Corpus, shared: Path) -> "tuple[int, Backbone, Method]":
    import torch

    HERE.alive()
    from fedprompt_mpi.plm.backbone import load_backbone
    from fedprompt_mpi.plm.methods import make_method

    HERE.alive()
    one_client = config.client.batched == 1
    threads = thread_count(channel.place, os.environ.get("OMP_NUM_THREADS"), one_client_a_pass=one_client)
    torch.set_num_threads(threads)
    gpus = 0 if config.model.device == "cpu" else torch.cuda.device_count()
    trains = channel.rank > 0 or channel.size == 1
    if config.model.device == "cuda" and gpus == 0 and trains:
        raise SettingsError(
            f"model.device is cuda but rank {channel.rank} on {channel.place.host} sees no GPU: use auto or cpu"
        )
    device = torch.device(bind_device(gpus, channel.place, is_worker=trains))
    folder = (shared / MODEL_FOLDER).read_text()
    label_ids = torch.from_numpy(corpus.label_ids)
    backbone = load_backbone(config.model, folder, label_ids, device, int(corpus.mask_id))
    method = make_method(config.prompt, backbone.geometry, backbone.model)
    virtual = config.prompt.num_virtual_tokens if config.prompt.method != "full" else 0
    positions = backbone.geometry.max_positions
    if positions is not None and config.model.max_length + virtual > positions:
        raise SettingsError(
            f"model.max_length is {config.model.max_length} and prompt.num_virtual_tokens {virtual}, but the model has "
            f"{positions} positions: give a max_length of at most {positions - virtual}"
        )
    return threads, backbone, method


def share_bf16(channel: Channel, backbone: "Backbone", file: Path) -> None:
    """Let the ranks that compute in bfloat16 hold their matrices so, those on the CPU one copy per node.

    Every rank calls this, also one that computes in float32: rank 0 may, beside workers on GPUs.
    """
    from fedprompt_mpi.plm.backbone import cast_matrices, map_matrices, save_matrices

    maps = backbone.bf16 and backbone.device.type == "cpu"
    if maps and channel.place.local_rank == 0:
        save_matrices(backbone, file)
    channel.node_barrier()
    if maps and file.exists():
        map_matrices(backbone, file)
    elif backbone.bf16:
        cast_matrices(backbone)


def _start(
    config: RunConfig, channel: Channel, backbone: "Backbone", method: "Method", found: Checkpoint | None
) -> Checkpoint:
    """Check or make the first global vector on rank 0; the other ranks make room for it."""
    size = method.layout.size
    if channel.rank:
        import torch

        room: Any = np.zeros(size, dtype=np.float32)
        if config.comm.gpu_aware:
            room = torch.zeros(size, device=backbone.device)
            if backbone.device.type == "cuda":
                channel.synchronise = lambda: torch.cuda.synchronize(backbone.device)
        return Checkpoint(vector=room, round_=0, record={})
    if found is None:
        embeddings = backbone.embedding_matrix.detach().float().cpu().numpy()
        vector = method.initial(embeddings, seeds.generator(config.seed, "initial vector"))
        found = Checkpoint(vector=vector, round_=0, record={})
    _check_vector(found.vector, size, config)
    return found


def _check_vector(vector: np.ndarray, size: int, config: RunConfig) -> None:
    if vector.shape != (size,) or vector.dtype != np.float32:
        raise SettingsError(
            f"the prompt to start from has {vector.size} parameters ({vector.dtype}), but method "
            f"{config.prompt.method} with model {config.model.name} has {size} (float32): "
            "take one of the same model and method"
        )
    if not np.isfinite(vector).all():
        raise SettingsError("the prompt to start from holds numbers that are not finite: take another")


def shard_of(channel: Channel, *, on_gpu: bool) -> tuple[int, int] | None:
    """Let all ranks evaluate, or those with a GPU if there are any."""
    fast: Any = np.zeros(channel.size)
    fast[channel.rank] = on_gpu
    fast = channel.sum(fast) > 0
    evaluators = np.flatnonzero(fast) if fast.any() else np.arange(channel.size)
    (position,) = np.nonzero(evaluators == channel.rank)
    return (int(position[0]), len(evaluators)) if len(position) else None
