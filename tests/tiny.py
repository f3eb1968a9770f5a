"""Tiny PLMs of every family in Hugging Face form, with tokenizers of the right kind; no network."""

import json
import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fedprompt_mpi import seeds
from fedprompt_mpi.text import embedded

MASKED = ("bert", "roberta", "distilbert", "albert", "electra")
CAUSAL = ("gpt2", "llama")
KINDS = (*MASKED, "t5", *CAUSAL)


def _texts(count: int = 400) -> list[str]:
    rng = seeds.generator(0, "tiny tokenizer")
    words = ["terrible", "great", "sports", "music", "normal", "spam", "it is", "."]
    return [f"{embedded.message(rng).text} it is {words[i % len(words)]} ." for i in range(count)] + [
        " " + word for word in embedded.vocabulary() for _ in range(20)
    ]


def _word_piece() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    from launch.make_embedded import make_tokenizer

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return make_tokenizer(), special


def _byte_bpe(kind: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return tokenizer, {
            "bos": "<s>",
            "pad": "<pad>",
            "eos": "</s>",
            "unk": "<unk>",
            "mask": "<mask>",
            "cls": "<s>",
            "sep": "</s>",
        }
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {"bos": "</s>", "eos": "</s>", "unk": "</s>"}


def _metaspace(kind: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    special = ["<pad>", "</s>", "<unk>", "<s>", "<extra_id_0>"]
    pieces = [(token, 0.0) for token in special]
    pieces += [(f"▁{word}", -5.0) for word in embedded.vocabulary()]
    pieces += [(letter, -12.0) for letter in "▁" + string.ascii_lowercase + ".,!?"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    single = "$A </s>" if kind == "t5" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return tokenizer, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "bos": "<s>"}


def _tokenizer(kind: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    if kind in ("roberta", "gpt2"):
        return _byte_bpe(kind)
    if kind in ("t5", "llama"):
        return _metaspace(kind)
    return _word_piece()


def _model(kind: str, vocab_size: int) -> Any:
    import transformers as t

    common: dict[str, Any] = {"vocab_size": vocab_size}
    bert_like = {
        **common,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 192,
    }
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(**bert_like))
    if kind == "roberta":
        return t.RobertaForMaskedLM(t.RobertaConfig(**bert_like, pad_token_id=1, bos_token_id=0, eos_token_id=2))
    if kind == "distilbert":
        return t.DistilBertForMaskedLM(
            t.DistilBertConfig(**common, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=192)
        )
    if kind == "albert":
        return t.AlbertForMaskedLM(t.AlbertConfig(**bert_like, embedding_size=16))
    if kind == "electra":
        return t.ElectraForMaskedLM(t.ElectraConfig(**bert_like, embedding_size=16))
    if kind == "t5":
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
        return t.T5ForConditionalGeneration(t.T5Config(**{**common, **sizes, **ids}))
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=192))
    return t.LlamaForCausalLM(t.LlamaConfig(**bert_like, num_key_value_heads=2))


def save_tiny(kind: str, folder: Path) -> Path:
    """Make a tiny PLM with random weights, large enough to tell one position from another."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, special = _tokenizer(kind)
    torch.manual_seed(0)
    model = _model(kind, tokenizer.get_vocab_size())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in special.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
