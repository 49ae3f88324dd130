"""Families of language models (and BERT): what is swapped, percolation leaves the outputs, updates, folders, FLOPs."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llm_cht.errors import UserError
from llm_cht.evolve.shards import Whole
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.families import FAMILIES
from llm_cht.sparse.folder import Topology, save_model_folder
from llm_cht.sparse.linear import SparseLayer
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.method import resolve
from llm_cht.topology.percolate import Mlp, QueryKey, Rows, ValueOutput
from llm_cht.topology.settings import MethodSettings
from llm_cht.train.flops import training_flops_per_token
from tests.sparse.family_checks import biased, cut, learn, percolated, same, tokenizer

WORDS = 30
LAYERS = 2
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 32}
HEADS = {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZES = TOKENS | HEADS | {"hidden_size": 32, "intermediate_size": 20}
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 6}  # heads * head_dim is not hidden_size
BIASES = {"attention_bias": True, "mlp_bias": True}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
OPT = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 20}

GPT2 = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 1, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
GPT2 |= {"n_positions": 32} | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)

CONFIGS = {
    "llama": ("llama", SIZES),
    "llama grouped": ("llama", GROUPED | BIASES),
    "llama one key head": ("llama", SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | {"sliding_window": 4}),
    "gemma3_text": (
        "gemma3_text",
        WIDE | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo": ("olmo", GROUPED | {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", GROUPED),
    "phi3": ("phi3", GROUPED),
    "phi3 partial": ("phi3", GROUPED | {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", SIZES | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}),
    "gpt_neox whole": (
        "gpt_neox",
        SIZES | {"attention_bias": False, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    ),
    "gpt_neox sequential": (
        "gpt_neox",
        SIZES | {"use_parallel_residual": False, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "opt": ("opt", OPT | {"word_embed_proj_dim": 32}),
    "opt projected": ("opt", OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 relu": (
        "gpt2",
        GPT2 | {"n_inner": 20, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
    ),
    "bert": ("bert", SIZES),
}
CAUSAL = [name for name in CONFIGS if name != "bert"]
NORMALISED = ("qwen3", "gemma3_text", "olmo2")
PARTIAL = {"phi3 partial": 4, "gpt_neox": 2, "gpt_neox sequential": 4}

LLAMA = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
SWAPPED = {
    "llama": ("model.layers", LLAMA),
    "phi3": ("model.layers", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "opt": ("model.decoder.layers", {f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")} | {"fc1", "fc2"}),
    "gpt2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "bert": (
        "bert.encoder.layer",
        {f"attention.self.{x}" for x in ("query", "key", "value")}
        | {"attention.output.dense", "intermediate.dense", "output.dense"},
    ),
}
DENSE = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.decoder"),
    "opt projected": ("model.decoder.project_out", "model.decoder.project_in", "lm_head"),
}
IDS = torch.arange(2, 2 + 2 * 11).view(2, 11)


def configured(name: str, **changes):
    model_type, keys = CONFIGS[name]
    return AutoConfig.for_model(model_type, **copy.deepcopy(keys | changes))


def built(name: str, dtype=torch.float64, **changes):
    """A small model in evaluation mode, with biases and norms that are not those of the start."""
    torch.manual_seed(0)
    maker = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model = maker.from_config(configured(name), **changes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model):
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=mask).logits


def units_of(sparse, kind):
    return [unit for group in sparse.groups for unit in group.units if isinstance(unit, kind)]


# ---- structure ----


def test_every_row_is_tested_here_or_with_translation():
    assert FAMILIES.keys() == {model_type for model_type, _ in CONFIGS.values()} | {"marian", "bart", "t5"}


def test_no_end_of_a_name_ends_with_another_of_its_family():
    for family in FAMILIES.values():
        assert not [(a, b) for a in family.layers for b in family.layers if a.endswith(f".{b}")]


@pytest.mark.parametrize("name", CONFIGS)
def test_just_the_projections_of_the_blocks_are_swapped(name):
    model = built(name)
    before, state = outputs(model), list(model.state_dict())
    sparse = sparsify(model, SparseSettings())
    blocks, ends = SWAPPED.get(CONFIGS[name][0], SWAPPED["llama"])
    assert set(sparse.layers) == {f"{blocks}.{i}.{end}" for i in range(LAYERS) for end in ends}
    assert sparse.dense == DENSE.get(name, ("lm_head",))
    assert {n for n, module in model.named_modules() if isinstance(module, SparseLayer)} == set(sparse.layers)
    assert (outputs(model) - before).abs().max() <= 1e-10
    assert list(model.state_dict()) == state
    assert len(sparse.groups) == 2 * LAYERS  # an attention and an MLP each
    assert len(units_of(sparse, ValueOutput)) == len(units_of(sparse, Mlp)) == LAYERS
    assert len(units_of(sparse, QueryKey)) == (0 if name in NORMALISED else LAYERS)
    assert all(unit.rotary_dim == PARTIAL.get(name) for unit in units_of(sparse, QueryKey))
    paired = {unit.pairing for unit in units_of(sparse, QueryKey)}
    assert paired <= {"position" if CONFIGS[name][0] in ("opt", "gpt2", "bert") else "rotary"}


def test_a_bert_has_groups_that_lie_in_several_modules():
    attention, mlp = sparsify(built("bert"), SparseSettings()).groups[:2]
    a, b = "bert.encoder.layer.0.attention", "bert.encoder.layer.0"
    query, key, value, out = (f"{a}.{x}" for x in ("self.query", "self.key", "self.value", "output.dense"))
    assert attention.layers == (query, key, value, out)
    assert attention.units == (QueryKey(query, key, 4, 4, "position"), ValueOutput(value, out, 4, 4))
    assert attention.heads == {query: 4, key: 4, value: 4}
    assert mlp.units == (Mlp((f"{b}.intermediate.dense",), f"{b}.output.dense"),)


def test_parts_of_fused_layers_are_rows_as_the_models_split_them():
    attention, mlp = sparsify(built("phi3"), SparseSettings()).groups[:2]
    fused, gate_up = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
    cuts = {"query": (0, 32), "key": (32, 48), "value": (48, 64)}
    assert attention.parts == {f"{fused}/{part}": Rows(fused, 1, *rows) for part, rows in cuts.items()}
    assert attention.heads == {fused: 4 + 2 + 2}
    assert mlp.parts == {f"{gate_up}/gate": Rows(gate_up, 1, 0, 20), f"{gate_up}/up": Rows(gate_up, 1, 20, 40)}
    attention = sparsify(built("gpt_neox"), SparseSettings()).groups[0]
    fused = "gpt_neox.layers.0.attention.query_key_value"
    cuts = {"query": (0, 8), "key": (8, 16), "value": (16, 24)}
    assert attention.parts == {f"{fused}/{part}": Rows(fused, 4, *rows) for part, rows in cuts.items()}
    assert attention.heads == {fused: 12}


def test_parts_of_a_conv1d_are_rows_of_the_network_not_of_the_stored_weight():
    sparse = sparsify(built("gpt2"), SparseSettings())
    attention, mlp = sparse.groups[:2]
    block = "transformer.h.0"
    fused, out = f"{block}.attn.c_attn", f"{block}.attn.c_proj"
    query, key, value = (f"{fused}/{part}" for part in ("query", "key", "value"))
    assert attention.parts == {part: Rows(fused, 1, 32 * i, 32 * i + 32) for i, part in enumerate((query, key, value))}
    assert attention.units == (QueryKey(query, key, 4, 4, "position"), ValueOutput(value, out, 4, 4))
    assert attention.heads == {fused: 12}
    assert mlp.units == (Mlp((f"{block}.mlp.c_fc",), f"{block}.mlp.c_proj"),)
    assert sparse.layers[fused].mask.shape == sparse.layers[fused].weight.shape == (32, 96)
    assert "2 x c_attn (96, 32)" in sparse.report()


def test_the_cross_attention_of_a_gpt2_stays_dense():
    sparse = sparsify(AutoModelForCausalLM.from_config(configured("gpt2", add_cross_attention=True)), SparseSettings())
    crossing = {
        f"transformer.h.{i}.crossattention.{end}" for i in range(LAYERS) for end in ("c_attn", "q_attn", "c_proj")
    }
    assert set(sparse.dense) == crossing | {"lm_head"}


def test_an_odd_number_of_rotary_rows_is_one_more_as_the_models_have_it():
    config = configured("gpt_neox", rope_parameters=ROPE | {"partial_rotary_factor": 0.4})  # 3 of 8
    sparse = sparsify(AutoModelForCausalLM.from_config(config), SparseSettings())
    assert {unit.rotary_dim for unit in units_of(sparse, QueryKey)} == {4}


# ---- percolation ----


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_percolation_leaves_the_outputs(name, rule):
    removed: dict[str, int] = {}
    for seed, density in enumerate([0.02, 0.04, 0.08, 0.15, 0.4]):
        model = built(name)
        sparse = sparsify(model, SparseSettings())
        cut(sparse, density, seed)
        if rule == "paper":
            for layer in sparse.layers.values():
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        before = outputs(model)
        has_bias = biased(sparse) if rule == "exact" else frozenset()
        for layer, count in percolated(sparse, has_bias, seed % 2 == 0).items():
            kind = layer.rpartition(".")[2]
            removed[kind] = removed.get(kind, 0) + count
        assert before.std() > 0.1
        assert (outputs(model) - before).abs().max() <= 1e-10
    assert sum(removed.values()) > 0
    if not has_bias:
        kept = {"q_proj", "k_proj"} if name in NORMALISED else set()
        assert {kind for kind, count in removed.items() if count == 0} <= kept


def changed_by(name: str, change) -> float:
    """How much the outputs differ after percolation with units that ``change`` has changed."""
    model = built(name)
    sparse = sparsify(model, SparseSettings())
    cut(sparse, 0.05, seed=3)
    for layer in sparse.layers.values():
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    before = outputs(model)
    percolated(replace(sparse, groups=tuple(map(change, sparse.groups))), frozenset(), dead_heads=False)
    return float((outputs(model) - before).abs().max())


def with_pairs(**changes):
    def change(group):
        units = (replace(unit, **changes) if isinstance(unit, QueryKey) else unit for unit in group.units)
        return replace(group, units=tuple(units))

    return change


def with_normalised_pairs(group):
    if not group.name.endswith("self_attn"):
        return group
    query, key = (f"{group.name}.{x}_proj" for x in "qk")
    return replace(group, units=(QueryKey(query, key, 4, 2, "rotary"), *group.units))


def with_parts_one_after_the_other(group):
    heights = {name: (rows.stop - rows.start) * rows.blocks for name, rows in group.parts.items()}
    starts = {name: i * height for i, (name, height) in enumerate(heights.items())}
    parts = {n: Rows(r.layer, 1, starts[n], starts[n] + heights[n]) for n, r in group.parts.items()}
    return replace(group, parts=parts)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, with_normalised_pairs) for name in NORMALISED),
        *((name, with_pairs(pairing="position")) for name in ("mistral", "phi3", *PARTIAL)),
        *((name, with_pairs(rotary_dim=None)) for name in PARTIAL),
        ("gpt_neox", with_parts_one_after_the_other),
    ],
)
def test_other_rules_would_change_the_outputs(name, change):
    assert changed_by(name, lambda group: group) <= 1e-10
    assert changed_by(name, change) > 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_an_activation_that_does_not_keep_zero_has_no_mlp_unit(name):
    model_type = CONFIGS[name][0]
    config = configured(name, **{FAMILIES[model_type].activation: "sigmoid"})
    maker = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    assert not units_of(sparsify(maker.from_config(config), SparseSettings()), Mlp)


# ---- updates and folders ----


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("overrides", [{}, {"per_head": True, "dead_heads": True, "percolate_bias": "paper"}])
def test_chts_trains_and_stock_transformers_loads_the_same_model(name, overrides, tmp_path):
    model = built(name, torch.float32).train()
    sparse = sparsify(model, SparseSettings())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = MethodSettings(preset="chts", sparsity=0.7, update_interval=5, **overrides)
    method = resolve(method, total_steps=20)
    draw_start(sparse, method, 0)
    updater = TopologyUpdater(sparse, method, Whole(optimizer), 0)
    first = {layer: mask.clone() for layer, mask in updater.masks.items()}
    losses = learn(lambda: model(input_ids=IDS, labels=IDS).loss, optimizer, updater)
    assert losses[-1] < losses[0]
    for layer, mask in updater.masks.items():
        assert int(mask.sum()) == int(first[layer].sum())
        assert not torch.equal(mask, first[layer])
        assert not updater.sparse.layers[layer].weight[~mask].any()
    model.eval()
    save_model_folder(tmp_path / "m", model, model.state_dict(), tokenizer(WORDS), Topology(updater.masks, "chts", 20))
    same(tmp_path / "m", model, outputs)


# ---- models without a row ----


def test_a_model_without_a_row_is_swapped_inside_its_blocks_and_nothing_percolates(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match=r"`bloom` has no row .* all 8 linear layers .*alone, and nothing percolates"):
        sparse = sparsify(model, SparseSettings())
    ends = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert list(sparse.layers) == [f"transformer.h.{i}.{end}" for i in range(2) for end in ends]
    assert [group.layers for group in sparse.groups] == [(name,) for name in sparse.layers]
    assert not any(group.units or group.heads for group in sparse.groups)
    assert sparse.dense == ("lm_head",)
    cut(sparse, 0.3, seed=0)
    masks = {name: layer.mask for name, layer in sparse.layers.items()}
    save_model_folder(tmp_path / "m", model, model.state_dict(), tokenizer(WORDS), Topology(masks, "static", 0))
    same(tmp_path / "m", model, outputs)


def test_a_model_without_a_row_can_be_of_conv1d():
    config = AutoConfig.for_model("openai-gpt", vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model(input_ids=IDS).logits
    with pytest.warns(UserWarning, match=r"`openai-gpt` has no row"):
        sparse = sparsify(model, SparseSettings())
    assert {name.rpartition(".")[2] for name in sparse.layers} == {"c_attn", "c_proj", "c_fc"}
    assert sparse.transposed == sparse.layers.keys()
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_list_of_layers_is_no_list_of_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 4)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    with pytest.warns(UserWarning, match="`Model` has no row"):
        sparse = sparsify(Model(), SparseSettings())
    assert list(sparse.layers) == [f"blocks.{i}.experts.{j}" for i in range(2) for j in range(2)]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"inside a block .*e\.g\. 0.*`sparse\.include`"):
        sparsify(nn.Sequential(nn.Linear(4, 4)), SparseSettings())


# ---- FLOPs ----


@pytest.mark.parametrize("name", CAUSAL)
def test_a_step_counts_what_torch_counts(name):
    model = built(name, torch.float32, attn_implementation="eager").train()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    counts = counter.get_flop_counts()
    angles = sum(sum(kinds.values()) for module, kinds in counts.items() if module.endswith("rotary_emb"))
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # biases and norms, which torch leaves out
    assert len(tables) == (2 if CONFIGS[name][0] in ("opt", "gpt2") else 1)
    per_token = training_flops_per_token(model, IDS.shape[1]) - 6 * vectors
    assert per_token * IDS.numel() == counter.get_total_flops() - angles
