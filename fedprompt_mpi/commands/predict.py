"""The command predict, and `load_prompt`: classify texts with a tuned prompt.

prompt = load_prompt("runs/sst2")
for answer in prompt.predict(["a gripping film", "two hours too long"]):
    print(answer.word, answer.probability)
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedprompt_mpi.commands.answers import Asked, accuracy_line, check_ending, read_texts, write_answers
from fedprompt_mpi.commands.settings import add_plugins, command_parser, parse
from fedprompt_mpi.config import RunConfig, SettingsError, from_record
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.output import one_line
from fedprompt_mpi.plugins.load import load_plugins
from fedprompt_mpi.rules.setting import NO_TEXT
from fedprompt_mpi.rundir.checkpoint import load_checkpoint
from fedprompt_mpi.rundir.directory import check_content
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.prompt import read_prompt
from fedprompt_mpi.rundir.records import read_settings
from fedprompt_mpi.text.tasks import resolve

if TYPE_CHECKING:  # torch is imported when something is predicted
    from fedprompt_mpi.plm.backbone import Backbone
    from fedprompt_mpi.plm.method_base import Method
    from fedprompt_mpi.text.cloze import Cloze


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The model's classification of one text."""

    label: int
    """The class, from 0."""
    name: str
    """Its label, if the settings list labels, or its label words."""
    word: str
    """Its label words."""
    probability: float
    """Of that class, among the label words."""
    probabilities: tuple[float, ...]
    """Of each class."""


class Prompt:
    """A run's global prompt."""

    def __init__(self, directory: Path) -> None:
        """Read it; see `load_prompt`."""
        self.directory = directory
        self.note = ""
        """What is to be said of it; empty of a finished run."""
        tensors, self.metadata = self._read()
        self.vector: np.ndarray = tensors.pop("vector")
        if self.vector.dtype != np.float32 or not np.isfinite(self.vector).all():
            raise SettingsError(f"{directory}: its prompt is no vector of finite float32 numbers: name another run")
        """`[P]` float32: the trainable parameters."""
        self._effective: np.ndarray | None = tensors.pop("effective_prompt", None)
        self.parameters = tensors
        """The same numbers as `vector`, by name; empty of an unfinished run."""

    def _read(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the tensors and the metadata of prompt.safetensors, or of an unfinished run's last checkpoint."""
        paths = RunPaths(self.directory)
        if self.directory.is_dir():
            check_content(paths, own_only=False)
            if not paths.summary.exists() and paths.checkpoints():
                found, _ = load_checkpoint(paths, read_settings(paths))
                assert found is not None  # there is one
                rounds = max(self.config.federation.rounds, found.round_)
                self.note = f"{self.directory} is not finished: its checkpoint after round {found.round_} of {rounds}"
                self.note += " is used"
                return {"vector": found.vector}, {"round": str(found.round_)}
        return read_prompt(self.directory)

    @functools.cached_property
    def effective(self) -> np.ndarray | None:
        """The virtual tokens in front of the text `[V, D]`, or a prefix `[L, 2, H, V, d]`; None for whole models."""
        if self._effective is None and self.note:
            return self._model[2].named(self.vector).get("effective_prompt")
        return self._effective

    @property
    def cloze(self) -> "Cloze":
        """The task's question in the ids of the model's tokenizer."""
        return self._model[0]

    @property
    def named(self) -> dict[str, np.ndarray]:
        """The trainable parameters by name, as the method lays them out."""
        named = self._model[2].named(self.vector)
        named.pop("effective_prompt", None)
        return named

    @property
    def keeps_matrices_transposed(self) -> bool:
        """True if the model keeps the matrices that LoRA adds to as `[in, out]`, as GPT-2 does."""
        from transformers.pytorch_utils import Conv1D

        modules = dict(self._model[1].model.named_modules())
        return any(isinstance(modules[name.rpartition(".")[0]], Conv1D) for name in self.named)

    @property
    def plm_parameters(self) -> int:
        """Parameters of the model."""
        return self._model[1].num_parameters

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called; the model's tokenizer has a say in it."""
        return resolve(self.config.task).class_names(self._model[0].verbalizer.words)

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings of its run."""
        return from_record(read_settings(RunPaths(self.directory)))

    def predict(self, texts: Sequence[str], texts_b: Sequence[str] | None = None) -> list[Answer]:
        """Classify texts as the run's model would; the model is loaded at the first call.

        Args:
            texts: N texts.
            texts_b: of a task of pairs, the N second ones.

        Returns:
            N answers, in their order.

        Raises:
            SettingsError: if the model cannot be loaded, or the task has pairs and no second texts were given.
        """
        import torch

        from fedprompt_mpi.federation.client_training import score_batch, to_device
        from fedprompt_mpi.plm.backbone import check_fit
        from fedprompt_mpi.text.batches import collate, evaluation_batches
        from fedprompt_mpi.text.examples import Examples

        if (texts_b is None) != (resolve(self.config.task).text_b is None):
            raise SettingsError(
                f"task {self.config.task.name} asks about {'one text' if texts_b else 'pairs of texts'}"
            )
        if not texts:
            return []
        cloze, backbone, method = self._model
        if any(NO_TEXT.search(text) for text in (*texts, *(texts_b or ()))):
            raise SettingsError("a text to predict holds NUL or bytes that are no UTF-8: give another")
        table = cloze.encode(Examples(texts=texts, texts_b=texts_b, labels=np.zeros(len(texts), dtype=np.int64)))
        check_fit(self.config, backbone, max(table.largest_id, int(cloze.verbalizer.ids.max())))
        probabilities = np.empty((len(texts), len(cloze.verbalizer.words)))
        with torch.no_grad():
            injection = method.inject(method.leaves(to_device(self.vector, backbone.device)[None]))
            virtual = self.config.prompt.num_virtual_tokens if method.adds_tokens else 0
            for rows in evaluation_batches(table.lengths, virtual):
                logits = score_batch(backbone, collate(table, rows), injection)
                probabilities[rows] = torch.softmax(logits.double(), dim=1).cpu().numpy()
        names = self.class_names
        return [
            Answer(
                label=int(row.argmax()),
                name=names[int(row.argmax())],
                word="/".join(cloze.verbalizer.words[int(row.argmax())]),
                probability=float(row.max()),
                probabilities=tuple(row.tolist()),
            )
            for row in probabilities
        ]

    @functools.cached_property
    def _model(self) -> "tuple[Cloze, Backbone, Method]":
        import torch

        from fedprompt_mpi.plm.backbone import load_backbone
        from fedprompt_mpi.plm.hugging_face import download, family_of, load_tokenizer, read_config
        from fedprompt_mpi.plm.methods import make_method
        from fedprompt_mpi.text.cloze import Cloze

        config = self.config
        folder = download(config.model.name)
        family = family_of(read_config(folder))
        cloze = Cloze(load_tokenizer(folder), resolve(config.task), family, config.model.max_length)
        on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        backbone = load_backbone(config.model, folder, torch.from_numpy(cloze.verbalizer.ids), device, cloze.mask_id)
        backbone.weigh(cloze.verbalizer.shares)
        method = make_method(config.prompt, backbone.geometry, backbone.model)
        if method.layout.size != len(self.vector):
            raise SettingsError(
                f"{self.directory} has {len(self.vector)} parameters, but method {config.prompt.method} with "
                f"model {config.model.name} has {method.layout.size}: is it the same model?"
            )
        return cloze, backbone, method


def load_prompt(directory: str | Path) -> Prompt:
    """Read the prompt of a run directory.

    Raises:
        SettingsError: if there is none.
    """
    return Prompt(Path(directory))


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print class, label and probability of texts, or write them into a file."""
    parser = command_parser("predict", "the classes of texts, by the prompt of a run")
    parser.add_argument("run", help="run directory; of an unfinished run, the last checkpoint is used")
    parser.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    parser.add_argument("--text_b", action="append", default=[], help="the second text of each, if the task has pairs")
    parser.add_argument("--file", help="table with the task's columns, .txt file of lines, or - for the standard input")
    parser.add_argument("--out", help="file for class, label and probabilities of each text: .csv or .jsonl")
    add_plugins(parser)
    parsed = parse(parser, arguments)
    load_plugins(parsed.plugin)
    if bool(parsed.text) == bool(parsed.file):
        raise SettingsError("give either --text, or --file FILE (- for the standard input)")
    if parsed.text_b and len(parsed.text_b) != len(parsed.text):
        raise SettingsError(f"there are {len(parsed.text)} --text and {len(parsed.text_b)} --text_b: give as many")
    if parsed.out:
        check_ending(parsed.out)
    prompt = load_prompt(parsed.run)
    if prompt.note:
        print(f"fedprompt_mpi: {prompt.note}", file=sys.stderr, flush=True)
    asked = Asked(texts=parsed.text, texts_b=parsed.text_b or None)
    if parsed.file:
        asked = read_texts(parsed.file, prompt.config)
    if asked.note:
        print(f"fedprompt_mpi: {asked.note}", file=sys.stderr, flush=True)
    answers = prompt.predict(asked.texts, asked.texts_b)
    if parsed.out:
        write_answers(parsed.out, answers, prompt.class_names)
        print(f"{len(answers):,} answers in {parsed.out}")
    else:
        print("\n".join(f"{answer.label} {one_line(answer.name)} {answer.probability:.4f}" for answer in answers))
    if asked.labels is not None and len(answers):
        print(accuracy_line(answers, asked.labels))
