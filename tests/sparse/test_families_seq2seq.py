"""Marian, BART and T5: what is swapped, float64 outputs that percolation leaves as they are, a few updates, folders."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    MarianMTModel,
    T5Config,
)

from llm_cht.evolve.shards import Whole
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.folder import Topology, save_model_folder
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology import bits
from llm_cht.topology.method import resolve
from llm_cht.topology.percolate import Heads, Mlp, QueryKey, ValueOutput, percolate, with_dead_heads
from llm_cht.topology.settings import MethodSettings
from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.export import described, write_model
from tests.sparse.family_checks import biased, cut, learn, percolated, same, tokenizer

WORDS = 30
NO_BIAS: frozenset[str] = frozenset()
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SIZES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 28}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
BART = TOKENS | SIZES | HEADS | {"forced_eos_token_id": 1, "max_position_embeddings": 32}
T5 = TOKENS | {"d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3}
SEPARATE = {"share_encoder_decoder_embeddings": False}
CONFIGS = {
    "marian": MarianConfig(**BART, activation_function="relu", scale_embedding=True),
    "marian separate": MarianConfig(**BART, **SEPARATE, activation_function="swish"),
    "bart": BartConfig(**BART | {"bos_token_id": 0, "decoder_start_token_id": 1}),
    "t5": T5Config(**T5),
    "t5 gated": T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
SOURCE, TARGET = (torch.arange(2, 2 + 2 * n).view(2, n) for n in (7, 5))


def built(name: str, dtype=torch.float64):
    """A small model in evaluation mode, with biases and norms that are not those of the start."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model):
    mask = torch.ones_like(SOURCE)
    mask[1, 5:] = 0
    with torch.no_grad():
        return model(input_ids=SOURCE, attention_mask=mask, labels=TARGET).logits


# ---- structure ----


def test_a_marian_is_swapped_in_both_stacks_and_in_cross_attention():
    model = built("marian")
    before = outputs(model)
    sparse = sparsify(model, SparseSettings())
    assert torch.equal(outputs(model), before)
    assert (len(sparse.layers), sparse.dense) == (2 * 6 + 2 * 10, ("lm_head",))
    layer = "model.decoder.layers.1"
    groups = {group.name: group for group in sparse.groups}
    assert len(groups) == 2 * 2 + 2 * 3
    assert list(groups)[:2] == ["model.encoder.layers.0.self_attn", "model.encoder.layers.0"]
    assert groups[layer].layers == (f"{layer}.fc1", f"{layer}.fc2")
    assert groups[layer].units == (Mlp((f"{layer}.fc1",), f"{layer}.fc2"),)
    assert groups[layer].heads == {}
    for attention, heads in {f"{layer}.encoder_attn": 4, "model.encoder.layers.1.self_attn": 2}.items():
        query, key, value, out = (f"{attention}.{part}_proj" for part in ("q", "k", "v", "out"))
        assert set(groups[attention].layers) == {query, key, value, out}
        assert groups[attention].units == (
            QueryKey(query, key, heads, heads, "position"),
            ValueOutput(value, out, heads, heads),
        )
        assert groups[attention].heads == {query: heads, key: heads, value: heads}
    assert "32 with" in sparse.report()
    assert "10 groups, 16 percolation units" in sparse.report()


def test_a_t5_has_its_own_names_and_heads():
    sparse = sparsify(built("t5 gated"), SparseSettings())
    assert sparse.dense == ("lm_head",)
    groups = {group.name: group for group in sparse.groups}
    mlp, cross = "decoder.block.0.layer.2.DenseReluDense", "decoder.block.1.layer.1.EncDecAttention"
    assert groups[mlp].units == (Mlp((f"{mlp}.wi_0", f"{mlp}.wi_1"), f"{mlp}.wo"),)
    assert groups[cross].units[0] == QueryKey(f"{cross}.q", f"{cross}.k", 3, 3, "position")
    assert groups[cross].heads == {f"{cross}.q": 3, f"{cross}.k": 3, f"{cross}.v": 3}
    plain = sparsify(built("t5"), SparseSettings()).groups
    assert all(len(unit.gates) == 1 for group in plain for unit in group.units if isinstance(unit, Mlp))
    assert sum(isinstance(unit, Mlp) for group in plain for unit in group.units) == 4


def test_a_neuron_of_query_and_key_is_one_position_of_a_head_of_that_stack():
    for name, shapes in {"bart": {(2, 8), (4, 4)}, "t5": {(3, 6)}}.items():
        sparse = sparsify(built(name), SparseSettings())
        masks = {layer: sparse.layers[layer].mask for layer in sparse.layers}
        units = [unit for group in sparse.groups for unit in group.units if isinstance(unit, QueryKey)]
        assert {tuple(unit.dead(masks, NO_BIAS).shape) for unit in units} == shapes


@pytest.mark.parametrize("config", [MarianConfig(**BART, activation_function="sigmoid"), T5Config(**T5)])
def test_the_activation_that_the_model_has_decides_on_the_mlp(config):
    if config.model_type == "t5":
        config = T5Config(**T5, feed_forward_proj="gated-sigmoid")
    sparse = sparsify(AutoModelForSeq2SeqLM.from_config(config), SparseSettings())
    assert not any(isinstance(unit, Mlp) for group in sparse.groups for unit in group.units)


# ---- percolation ----


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", ["exact", "paper"])
@settings(deadline=None, max_examples=12)
@given(density=st.sampled_from([0.02, 0.06, 0.15, 0.4]), dead_heads=st.booleans(), seed=st.integers(0, 2**31))
def test_percolation_leaves_the_outputs(name, rule, density, dead_heads, seed):
    model = built(name)
    sparse = sparsify(model, SparseSettings())
    cut(sparse, density, seed)
    if rule == "paper":
        for layer in sparse.layers.values():
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    before = outputs(model)
    removed = percolated(sparse, biased(sparse) if rule == "exact" else NO_BIAS, dead_heads)
    assert (outputs(model) - before).abs().max() <= 1e-10
    assert sum(removed.values()) > 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_links_go_in_encoder_decoder_and_cross_attention(name, rule):
    sparse = sparsify(built(name), SparseSettings())
    cut(sparse, 0.1, seed=1)
    removed = percolated(sparse, biased(sparse) if rule == "exact" else NO_BIAS, dead_heads=True)
    for place in ("encoder.", "decoder.", "encoder_attn" if "t5" not in name else "EncDecAttention"):
        assert sum(count for layer, count in removed.items() if place in layer) > 0, place
    last = {layer.rpartition(".")[2] for layer, count in removed.items() if count}
    inputs = {"fc1", "v_proj", "wi", "wi_0", "wi_1", "v"}
    assert last & inputs
    if rule == "paper" or "t5" in name:
        assert last == {layer.rpartition(".")[2] for layer in removed}


def test_biases_decide_whether_the_papers_rule_changes_the_function():
    model = built("marian")
    sparse = sparsify(model, SparseSettings())
    cut(sparse, 0.1, seed=1)
    before = outputs(model)
    percolated(sparse, NO_BIAS, dead_heads=False)
    assert (outputs(model) - before).abs().max() > 1e-4


def test_active_neurons_by_hand():
    sparse = sparsify(built("marian"), SparseSettings())
    group = next(group for group in sparse.groups if group.name == "model.decoder.layers.0.encoder_attn")
    query, value, out = (f"{group.name}.{part}_proj" for part in ("q", "v", "out"))
    masks = {name: sparse.layers[name].mask.clone() for name in group.layers}
    masks[query][3] = False  # a dead query row, with its key row
    masks[value][4:8] = False  # head 1 of 4
    masks[out][:, 9] = False
    _, active, total = percolate(group, masks, NO_BIAS)
    assert (active, total) == (32 - 1 - 4 - 1, 32)
    _, active, total = percolate(group, masks, biased(sparse))
    assert (active, total) == (32 - 1, 32)  # only the column that nobody hears
    whole = replace(group, units=with_dead_heads(group.units))
    assert isinstance(whole.units[-1], Heads)
    new, active, total = percolate(whole, masks, NO_BIAS)
    assert (active, total) == (32 - 1 - 4 - 1 - 4, 32)
    assert not new[query][4:8].any()


# ---- updates and folders ----


def started(name, **overrides):
    model = built(name, torch.float32).train()
    sparse = sparsify(model, SparseSettings())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    method = MethodSettings(preset="chts", sparsity=0.7, update_interval=5, **overrides)
    method = resolve(method, total_steps=20)
    draw_start(sparse, method, 0)
    return model, optimizer, TopologyUpdater(sparse, method, Whole(optimizer), 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("overrides", [{}, {"per_head": True, "dead_heads": True, "percolate_bias": "paper"}])
def test_chts_trains_and_stock_transformers_loads_the_same_model(name, overrides, tmp_path):
    model, optimizer, updater = started(name, **overrides)
    first = {layer: mask.clone() for layer, mask in updater.masks.items()}
    losses = learn(lambda: model(input_ids=SOURCE, labels=TARGET).loss, optimizer, updater)
    assert losses[-1] < losses[0]
    for layer, mask in updater.masks.items():
        assert int(mask.sum()) == int(first[layer].sum())
        assert not torch.equal(mask, first[layer])
        assert not updater.sparse.layers[layer].weight[~mask].any()
    model.eval()
    save_model_folder(tmp_path / "m", model, model.state_dict(), tokenizer(WORDS), Topology(updater.masks, "chts", 20))
    same(tmp_path / "m", model, outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_of_any_kind_is_exported_as_its_own_stock_class(name, tmp_path):
    model, _, updater = started(name)
    model.eval()
    model.generation_config.max_length = 17
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    state = {"model": described(model), "settings": {"method": {"preset": "chts"}}}
    tensors = {"model": model.state_dict(), "topology": {f"mask.{n}": bits.pack(m) for n, m in updater.masks.items()}}
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    checkpoint = store.load(store.save(3, tensors, state))
    write_model([checkpoint], tokenizer(WORDS), tmp_path / "m", torch.float32)
    same(tmp_path / "m", model, outputs)
    assert type(model).from_pretrained(tmp_path / "m").generation_config.max_length == 17
    write_model([checkpoint], tokenizer(WORDS), tmp_path / "short", torch.bfloat16)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "short")
    assert torch.equal(outputs(loaded.eval()), outputs(copy.deepcopy(model).to(torch.bfloat16)))


def test_tied_tables_are_written_once(tmp_path):
    for name, tables in {"marian": 1, "marian separate": 2}.items():
        model = built(name, torch.float32)
        save_model_folder(tmp_path / name, model, model.state_dict(), tokenizer(WORDS), Topology({}, "dense", 0))
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            large = [key for key in file.keys() if file.get_slice(key).get_shape() == [WORDS, 16]]  # noqa: SIM118
        assert len(large) == tables
        assert isinstance(MarianMTModel.from_pretrained(tmp_path / name), MarianMTModel)
