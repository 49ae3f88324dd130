"""FLOPs against hand counts."""

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht.train.flops import Flops, training_flops_per_token


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
