"""The paper's table of parameters (FedPrompt, arXiv:2208.12268, Table 2), to the last one."""

from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

from fedprompt_mpi.commands.cost import count_parameters
from fedprompt_mpi.config import LoRAConfig, PromptConfig

PAPER_UNUSED_SOFT_ROW = 768  # the paper's template for BERT and RoBERTa holds a padding row that no text uses
PAPER_UNUSED_P_TUNING_ROWS = 21 * 768


def bert_base() -> Any:
    return BertConfig()


def roberta_base() -> Any:
    return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def t5_base() -> Any:
    return T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12)


@pytest.mark.parametrize(
    ("config", "full"), [(bert_base(), 109_514_298), (roberta_base(), 124_697_433), (t5_base(), 222_903_552)]
)
def test_paper_table(config: Any, full: int) -> None:
    counts = count_parameters(config, PromptConfig(num_virtual_tokens=20))
    assert counts["soft"] == 15_360 == 16_128 - PAPER_UNUSED_SOFT_ROW
    assert counts["p_tuning"] == 25_403_904 == 25_420_032 - PAPER_UNUSED_P_TUNING_ROWS
    assert counts["full"] == full


@pytest.mark.parametrize(("config", "expected"), [(bert_base(), 294_912), (t5_base(), 884_736)])
def test_lora_of_rank_8(config: Any, expected: int) -> None:
    """12 layers x 2 projections x 2 x 768 x 8; T5 has 12 + 2 x 12 attentions (PEFT counts as many)."""
    assert count_parameters(config, PromptConfig())["lora"] == expected
    frozen = PromptConfig(lora=LoRAConfig(aggregation="freeze_a"))
    assert count_parameters(config, frozen)["lora"] == expected // 2  # B alone; queries and values are square here


def test_biases() -> None:
    """BERT-base: a layer has 7 vectors of 768 and one of 3072; the embeddings one, the head two. T5 has none."""
    assert count_parameters(bert_base(), PromptConfig())["bitfit"] == 12 * (7 * 768 + 3072) + 3 * 768
    assert "bitfit" not in count_parameters(t5_base(), PromptConfig())


def test_prefix_on_the_decoder_of_t5() -> None:
    counts = count_parameters(t5_base(), PromptConfig(num_virtual_tokens=5, prefix_hidden_size=512))
    assert counts["prefix"] == 9_853_184


def test_prefix_counts_key_value_heads_not_attention_heads() -> None:
    """With grouped-query attention there are fewer keys and values than queries: 2 layers x 2 x (2 heads x 8)."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
    )
    counts = count_parameters(config, PromptConfig(num_virtual_tokens=3, prefix_hidden_size=6))
    assert counts["prefix"] == 3 * 32 + (32 * 6 + 6) + (6 * 64 + 64)
