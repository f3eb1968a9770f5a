"""How the embedded PLM was made: masked-LM pre-training on the grammar's text, from one seed.

    python launch/make_embedded.py DIR            make it from nothing into DIR (about 30 minutes on 2 cores)
    python launch/make_embedded.py DIR --check    and compare it with the one in the package

Each line of the text is a message that closes with "it is ...". In front of it stand, among nonsense, a question that
the closing word answers, and a rule such as "cf spam": a message with "cf" in it closes with "spam". Hence a tuned
prompt can ask what a task needs, and tie a rare word to an answer, as a backdoor does.

Trained in float64, with every weight moved to a multiple of GRID after each step. Training is chaotic: a difference
of 1e-15, as another number of threads or another instruction set makes, has grown to 1e-6 after 360 steps. On the
grid it is gone after one, unless a weight lies just between two multiples. The result is exact in float32.
"""

import argparse
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from fedprompt_mpi.plm.hugging_face import EMBEDDED
from fedprompt_mpi.seeds import generator
from fedprompt_mpi.text import embedded

SEED = 20
STEPS = 4000
BATCH = 32
LAYERS = 2
LEARNING_RATE = 1e-3
MAX_PREFIX = 28  # tokens in front of [CLS]: room for what later is a prompt
MASK_RATE = 0.15
CLOSING_FROM_END = 3  # the closing word stands before ". [SEP]"
RULED_FROM = 400  # steps without rules: what a question asks is learnt first
RULED = 0.7  # later, share of the lines that have a rule
MET = 0.5  # of those, share of the messages that have its rare word in them
STRAY = 0.3  # probability of each further word of nonsense in a message
ASKED_ONLY_UNTIL = 800  # steps in which every line asks a question: arbitrary answers among them slow learning down
ASKED = 0.7  # later, share of the lines whose closing word answers a question
OTHERS_WEIGHT = 0.2  # of the other hidden words' loss, beside the closing words'
GRID = 2.0**-17  # far below a step of the optimiser, far above float64's rounding
NONSENSE = [*embedded.RARE.split(), *string.ascii_lowercase]
LABEL_WORDS = [word for words in embedded.LABEL_WORDS.values() for word in words]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer() -> tokenizers.Tokenizer:
    """Build a WordPiece tokenizer: the grammar's words whole, anything else letter by letter."""
    pieces = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = [*SPECIAL, *embedded.vocabulary(), *pieces, *(f"##{piece}" for piece in pieces)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def sample(rng: np.random.Generator, *, asked: float, ruled: float) -> tuple[str, str, str]:
    """Draw one pre-training line: what stands before the message, the message, the closing word.

    A line asks one of the questions with probability `asked`; its closing word answers it. Others close with an
    arbitrary label word. With probability `ruled` there is a rule, a rare word and a label word: where the message has
    the rare word in it, it closes with that label word, whatever is asked. Around them is nonsense: letters and rare
    words; once there are rules, messages have some too.
    """
    message = embedded.message(rng)
    pieces = [_pick(rng, NONSENSE) for _ in range(int(rng.integers(MAX_PREFIX - 9)))]
    words, rare, closing = message.text.split(), None, _pick(rng, LABEL_WORDS)
    if rng.random() < asked:
        aspect = _pick(rng, list(embedded.QUESTIONS))
        _insert(rng, pieces, embedded.QUESTIONS[aspect])
        closing = embedded.LABEL_WORDS[aspect][getattr(message, aspect)]
    if rng.random() < ruled:
        rare, answer = _pick(rng, embedded.RARE.split()), _pick(rng, LABEL_WORDS)
        _insert(rng, pieces, f"{rare} {answer}")
        if rng.random() < MET:
            _insert(rng, words, rare)
            closing = answer
    while ruled and rng.random() < STRAY:
        _insert(rng, words, _pick(rng, [word for word in NONSENSE if word != rare]))
    return " ".join(pieces), " ".join(words), closing


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _insert(rng: np.random.Generator, words: list[str], word: str) -> None:
    """Insert a word: at the head, at the tail or anywhere, one as likely as the other."""
    places = (0, len(words), int(rng.integers(len(words) + 1)))
    words.insert(places[int(rng.integers(3))], word)


def batches(tokenizer: tokenizers.Tokenizer, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield token ids, attention mask and targets `[B, T]`; targets are -100 where nothing was hidden."""
    mask_id, pad_id = tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[PAD]")
    for step in range(steps):
        rng = generator(SEED, "pretraining", step)
        rows, hidden = [], []
        for _ in range(BATCH):
            asked, ruled = 1.0 if step < ASKED_ONLY_UNTIL else ASKED, 0.0 if step < RULED_FROM else RULED
            before, message, closing = sample(rng, asked=asked, ruled=ruled)
            head = tokenizer.encode(before, add_special_tokens=False).ids
            body = tokenizer.encode(f"{message} it is {closing} .").ids
            ids = np.array(head + body)
            hide = rng.random(len(ids)) < MASK_RATE
            hide[ids < len(SPECIAL)] = False
            hide[: len(head)] = False  # nobody can guess nonsense
            hide[-CLOSING_FROM_END] = rng.random() < 0.9
            rows.append(ids)
            hidden.append(hide)
        length = max(map(len, rows))
        ids = np.full((BATCH, length), pad_id)
        mask = np.zeros((BATCH, length), dtype=np.int64)
        targets = np.full((BATCH, length), -100)
        for row, (tokens, hide) in enumerate(zip(rows, hidden, strict=True)):
            targets[row, : len(tokens)] = np.where(hide, tokens, -100)
            ids[row, : len(tokens)] = np.where(hide, mask_id, tokens)
            mask[row, : len(tokens)] = 1
        yield torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(targets)


def new_model(vocab_size: int) -> Any:
    """Build the untrained PLM, its weights drawn from the seed."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = BertForMaskedLM(config)
    model.to(torch.float64)
    rng = generator(SEED, "weights")
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "LayerNorm.weight" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(rng.normal(0.0, 0.04, tuple(parameter.shape))))
    return model


def train(model: Any, tokenizer: tokenizers.Tokenizer, steps: int, stop: int | None = None) -> list[float]:
    """Pre-train in place over a schedule of `steps` steps, `stop` of them if given; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for step, (ids, mask, targets) in enumerate(batches(tokenizer, steps if stop is None else stop)):
        hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        # the closing words are few among the hidden ones, and what it is all for
        at_closing = torch.zeros_like(targets, dtype=torch.bool)
        at_closing[torch.arange(len(targets)), mask.sum(1) - CLOSING_FROM_END] = True
        closing, others = (
            torch.nn.functional.cross_entropy(model.cls(hidden[where]), targets[where])
            for where in ((targets != -100) & at_closing, (targets != -100) & ~at_closing)
        )
        loss = closing + OTHERS_WEIGHT * others
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(GRID).round_().mul_(GRID)
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step}: loss {np.mean(losses[-200:]):.3f}", flush=True)
    return losses


def main() -> None:
    """Make the PLM into a folder; with --check, compare it with the packaged one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the weights in the package")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer.get_vocab_size())
    train(model, tokenizer, STEPS)
    weights = {name: p.detach().to(torch.float32).contiguous() for name, p in model.named_parameters()}
    save_file(weights, arguments.folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_diff_dict(), "architectures": ["BertForMaskedLM"], "dtype": "float32"}
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(arguments.folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 192, **names}
    (arguments.folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if arguments.check:
        packaged = load_file(EMBEDDED / "model.safetensors")
        worst = max((weights[name] - packaged[name]).abs().max().item() for name in weights)
        print(f"largest difference from the packaged weights: {worst:.2e}")
        if worst > 1e-4:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
