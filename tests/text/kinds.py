"""Tokenizers of the kinds that models have, over small texts in several languages; nothing is downloaded."""

import functools
import string
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = {
    "English": "this is a good film, isn't it? It was so great (really)",
    "Chinese": "这部电影很好看。服务质量太差了",
    "Russian": "Этот фильм очень хороший, а тот плохой",
    "Arabic": "هذا الفيلم جيد جدا",
    "emoji": "good 👍🏽 film 🎬 so bad 😡",
    "white space": "  two  spaces,\n\na line and a\ttab ",
    "empty": "",
}
KINDS = ("WordPiece", "RoBERTa", "GPT-2", "Qwen", "T5", "XLM-R", "Llama")
FAMILIES = {"WordPiece": "masked", "RoBERTa": "masked", "XLM-R": "masked", "T5": "seq2seq"}
"""The others are causal."""
_CORPUS = [
    *TEXTS.values(),
    'Review: So: "it" -- was (not)!',
    *(f"{word} terrible great good bad 好 差" for word in TEXTS),
] * 40
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _special(tokenizer: tokenizers.Tokenizer, single: str) -> Any:
    names = [name for name in single.split() if name != "$A"]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def _word_piece() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        _CORPUS, trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    )
    made.post_processor = _special(made, "[CLS] $A [SEP]")
    return made, {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def _byte_bpe(kind: str) -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "RoBERTa" else ["<|endoftext|>"]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "Qwen":
        split = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(_CORPUS, trainer)
    if kind == "RoBERTa":
        made.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return made, {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made, dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")


def _unigram(kind: str) -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>" if kind == "XLM-R" else "<extra_id_0>"]
    letters = sorted(set("".join(_CORPUS)) - set(string.whitespace))
    words = ["it", "is", "was", "a", "good", "bad", "great", "terrible", "film", "this", "фильм", "хороший", "جيد"]
    pieces = [(name, 0.0) for name in special] + [("▁", -3.0), *((f"▁{word}", -5.0) for word in words)]
    pieces += [(letter, -12.0) for letter in letters]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.add_special_tokens(special)
    made.post_processor = _special(made, "$A </s>" if kind == "T5" else "<s> $A </s>")
    named = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    return made, named | ({"bos": "<s>", "mask": "<mask>"} if kind == "XLM-R" else {})


def _llama() -> Any:
    """BPE over whole texts, with a space in front of them, and bytes for what it does not know."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
    )
    words = [f"▁{word}" for text in _CORPUS for word in text.split()]
    made.train_from_iterator(words, trainer)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = _special(made, "<s> $A")
    return made, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a kind."""
    if kind == "WordPiece":
        made, special = _word_piece()
    elif kind in ("T5", "XLM-R"):
        made, special = _unigram(kind)
    else:
        made, special = _llama() if kind == "Llama" else _byte_bpe(kind)
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": token for name, token in special.items()})
