"""FLOPs against hand counts, and against what torch counts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, MarianConfig, T5Config

from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.train.flops import Flops, PairFlops, pair_flops, training_flops_per_token


@pytest.mark.parametrize("tied", [False, True])
def test_training_flops_of_a_hand_counted_model(tied):
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config)
    block = 4 * 4 * 4 + 3 * 4 * 6 + 2 * 4  # attention, MLP, two norms
    used = 2 * block + 4 + 4 * 10  # blocks, last norm, output layer
    assert training_flops_per_token(model, 16) == 6 * used + 12 * 2 * 4 * 16


def test_a_step_counts_links_and_the_dense_gradient_where_it_is_taken():
    flops = Flops(dense_per_token=1000, positions=100)
    assert flops.of_step(10, links=100, dense_gradient=False) == 10 * 1000
    assert flops.of_step(10, links=20, dense_gradient=False) == 10 * (1000 - 600 + 6 * 20)
    assert flops.of_step(10, links=20, dense_gradient=True) == 10 * (1000 - 600 + 4 * 20 + 2 * 100)
    assert Flops(1000, 0).of_step(3, 0, dense_gradient=False) == 3000


TOKENS = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def marian(**overrides):
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 12, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "forced_eos_token_id": 1}
    return AutoModelForSeq2SeqLM.from_config(
        MarianConfig(**sizes, **heads, **TOKENS, **overrides), attn_implementation="eager"
    )


def t5():
    sizes = {"d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(
        T5Config(**sizes, **TOKENS, feed_forward_proj="gated-gelu"), attn_implementation="eager"
    )


def pairs(*lengths):
    """What a batch of pairs of these source and target lengths holds."""
    return SimpleNamespace(
        source=sum(s for s, _ in lengths),
        target=sum(t for _, t in lengths),
        source_squares=sum(s * s for s, _ in lengths),
        target_squares=sum(t * t for _, t in lengths),
        products=sum(s * t for s, t in lengths),
    )


def test_a_translation_model_counted_by_hand():
    model = marian()
    attention, norm = 4 * (8 * 8 + 8), 2 * 8
    mlps = {"encoder": 8 * 12 + 12 + 12 * 8 + 8, "decoder": 8 * 20 + 20 + 20 * 8 + 8}
    crossing = 3 * 2 * (8 * 8 + 8)  # keys and values of 3 cross-attentions
    encoder, decoder = 2 * (attention + mlps["encoder"] + 2 * norm), 3 * (2 * attention + mlps["decoder"] + 3 * norm)
    sparse = sparsify(model, SparseSettings())
    positions = {name: layer.mask.numel() for name, layer in sparse.layers.items()}
    assert pair_flops(model, positions) == PairFlops(
        source_weights=encoder + crossing,
        target_weights=decoder - crossing + 8 * 40,
        source_positions=2 * (4 * 64 + 2 * 96) + 3 * 2 * 64,
        target_positions=3 * (6 * 64 + 2 * 160),
        encoder_width=2 * 8,
        decoder_width=3 * 8,
    )


@pytest.mark.parametrize("make", [marian, lambda: marian(share_encoder_decoder_embeddings=False), t5])
def test_a_translation_step_counts_what_torch_counts(make):
    model = make().train()
    source, target = torch.randint(2, 40, (3, 7)), torch.randint(2, 40, (3, 5))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=source, labels=target).loss.backward()
    tokens = pairs(*[(7, 5)] * 3)
    vectors = PairFlops(*_vectors(model), 0, 0, 0, 0)  # biases and norms, which torch leaves out
    assert pair_flops(model, {}).of_dense(tokens) - vectors.of_dense(tokens) == counter.get_total_flops()


def _vectors(model):
    """Elements of the parameters that are no matrices, of encoder and decoder."""
    sizes = {"encoder": 0, "decoder": 0}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            crossing = "encoder_attn" in name and name.endswith(("k_proj", "v_proj"))
            side = "encoder" if "encoder" in name.split(".") or crossing else "decoder"
            sizes[side] += parameter.numel() if parameter.dim() == 1 and not isinstance(module, nn.Embedding) else 0
    return sizes["encoder"], sizes["decoder"]


def test_a_translation_step_counts_links_on_both_sides():
    flops = PairFlops(1000, 2000, 100, 300, encoder_width=16, decoder_width=8)
    tokens = pairs((2, 3), (4, 1))
    dense = 6 * (6 * 1000 + 4 * 2000) + 12 * (16 * (4 + 16) + 8 * (9 + 1) + 8 * (6 + 4))
    assert flops.of_dense(tokens) == dense
    assert flops.of_step(tokens, 400, dense_gradient=False) == dense
    assert flops.of_step(tokens, 100, dense_gradient=False) == dense - 6 * (6 * 75 + 4 * 225)
    assert flops.of_step(tokens, 100, dense_gradient=True) == dense - 4 * (6 * 75 + 4 * 225)
    assert PairFlops(1000, 2000, 0, 0, 16, 8).of_step(tokens, 0, dense_gradient=False) == dense
