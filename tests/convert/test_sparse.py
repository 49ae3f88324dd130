"""Dense to sparse and back: the links that a fresh run would draw, everything else bit for bit as it was."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_cht.convert import shards, source
from llm_cht.convert.masks import strongest
from llm_cht.convert.run import Request, convert
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.topology.keys import Keys
from tests.convert.checkpoints import WORDS, converted, llama, started, weights

LAYERS = 2 * 7


def same_but_for(folder, dense, masks):
    before, after = weights(dense), weights(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        expected = tensor * masks[layer] if layer in masks else tensor
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], expected)


@pytest.mark.parametrize("by", ["magnitude", "ri", "er", "brf", "bsw", "bsf"])
@pytest.mark.parametrize("budget", ["uniform", "er", "erk"])
def test_links_are_those_of_a_run_that_starts_from_the_checkpoint(tmp_path, by, budget):
    dense = llama(tmp_path / "dense")
    folder = converted(dense, tmp_path / "sparse", sparsity=0.8, by=by, budget=budget, seed=3)
    sparse = started(dense, by, budget)
    topology = read_topology(folder)
    assert (topology.preset, topology.step, len(topology.masks)) == (by, 0, LAYERS)
    for name, layer in sparse.layers.items():
        assert torch.equal(topology.masks[name], layer.mask), name
    same_but_for(folder, dense, topology.masks)


def test_the_folder_is_one_that_stock_transformers_loads(tmp_path):
    dense = llama(tmp_path / "dense", tie_word_embeddings=True)
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "optimizer.bin").write_bytes(b"0")
    folder = converted(dense, tmp_path / "sparse", sparsity=0.9)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder)("3").input_ids == [3]
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    expected = {path.name for path in dense.iterdir()} - {"optimizer.bin"}
    assert {path.name for path in folder.iterdir()} == expected | {"topology.json", "topology.safetensors"}
    assert json.loads((folder / "config.json").read_text()) == json.loads((dense / "config.json").read_text())


@pytest.mark.parametrize("by", ["magnitude", "ri"])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_sparse_dense_sparse_comes_back_bit_for_bit(tmp_path, monkeypatch, by, budget):
    monkeypatch.setattr(shards, "SHARD", 5000)  # several files
    monkeypatch.setattr(source, "BLOCK", 300)  # several blocks a tensor
    dense = llama(tmp_path / "dense", shard="4KB")
    first = converted(dense, tmp_path / "first", sparsity=0.75, by=by, budget=budget)
    assert len(list(first.glob("model-*.safetensors"))) > 2
    back = converted(first, tmp_path / "back", dense=True)
    assert not list(back.glob("topology*"))
    assert {n: t.tolist() for n, t in weights(back).items()} == {n: t.tolist() for n, t in weights(first).items()}
    AutoModelForCausalLM.from_pretrained(back)
    again = converted(back, tmp_path / "again", sparsity=0.75, budget=budget)
    if by == "magnitude" or budget == "uniform":  # the layers have the same numbers of links
        assert (again / "topology.safetensors").read_bytes() == (first / "topology.safetensors").read_bytes()
        for file in first.glob("model*"):
            assert (again / file.name).read_bytes() == file.read_bytes()


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    st.sampled_from([1, 3, 1000]),
    st.floats(0, 1),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_global_threshold_is_exact_and_ties_go_by_random_bits(shapes, values, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"layer{i}": torch.randint(0, values, shape, generator=generator) / 7.0 for i, shape in enumerate(shapes)}
    total = sum(map(math.prod, shapes))
    k = round(share * (total - 1)) + 1
    masks = strongest(scores.__getitem__, {name: tuple(score.shape) for name, score in scores.items()}, k, seed)
    keys = []
    for name, score in scores.items():
        bits = Keys(seed, 0, name).bits("tie", torch.arange(score.numel())).tolist()
        keys += [
            (value, bit, name, i) for i, (value, bit) in enumerate(zip(score.view(-1).tolist(), bits, strict=True))
        ]
    chosen = {(name, i) for _, _, name, i in sorted(keys, reverse=True)[:k]}
    for name, mask in masks.items():
        assert {(name, i) for i in mask.view(-1).nonzero().squeeze(1).tolist()} == {c for c in chosen if c[0] == name}


def test_equal_random_bits_are_taken_in_order(monkeypatch):
    monkeypatch.setattr(Keys, "bits", lambda self, purpose, index: torch.full_like(index, 9))
    scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[1.0, 1.0]])}
    masks = strongest(scores.__getitem__, {"a": (1, 2), "b": (1, 2)}, 3, 0)
    assert (masks["a"].tolist(), masks["b"].tolist()) == ([[True, True]], [[True, False]])


def test_a_global_budget_gives_the_strongest_of_all_layers(tmp_path):
    dense = llama(tmp_path / "dense", dtype=torch.bfloat16)  # many equal weights
    masks = read_topology(converted(dense, tmp_path / "sparse", sparsity=0.6, budget="global")).masks
    sizes = {name: weights(dense)[f"{name}.weight"].float().abs() for name in masks}
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == math.floor(0.4 * total + 0.5)
    kept = torch.cat([sizes[name][mask] for name, mask in masks.items()])
    lost = torch.cat([sizes[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= lost.max()
    alone = {"include": ["0.mlp.up_proj"], "sparsity": 0.6}
    by_all = converted(dense, tmp_path / "all", budget="global", **alone)
    by_layer = converted(dense, tmp_path / "layer", **alone)
    assert (by_all / "topology.safetensors").read_bytes() == (by_layer / "topology.safetensors").read_bytes()


def test_each_tensor_keeps_its_type_in_a_mixture(tmp_path):
    dense = llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(tensors.items())}
    mixed["odd"] = torch.arange(3, dtype=torch.uint8)  # three bytes: what follows must be aligned all the same
    save_file(mixed, dense / "model.safetensors", {"format": "pt"})
    folder, said = tmp_path / "sparse", []
    convert(Request(str(dense), folder, sparsity=0.5, budget="global"), said.append)
    assert said == [
        "note: the tensors have several types (7 of F32, 7 of BF16, 7 of F16), which they keep; `--dtype` "
        "makes them one"
    ]
    same_but_for(folder, dense, read_topology(folder).masks)
    raw = (folder / "model.safetensors").read_bytes()
    start = int.from_bytes(raw[:8], "little")
    for name, about in json.loads(raw[8 : 8 + start]).items():
        if name != "__metadata__":
            assert (8 + start + about["data_offsets"][0]) % source.TYPES[about["dtype"]].itemsize == 0


def test_types_are_converted_on_request(tmp_path):
    dense = llama(tmp_path / "dense")
    folder = converted(dense, tmp_path / "sparse", sparsity=0.5, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    plain = converted(dense, tmp_path / "plain", sparsity=0.5)
    assert (folder / "topology.safetensors").read_bytes() == (plain / "topology.safetensors").read_bytes()


def test_percolation_leaves_the_outputs(tmp_path):
    dense = llama(tmp_path / "dense", dtype=torch.float64)
    told = {}
    for name, options in {"cut": {}, "percolated": {"percolate": True}}.items():
        request = Request(str(dense), tmp_path / name, sparsity=0.95, by="er", **options)
        told[name] = convert(request, lambda text: None)
    assert "neurons active" in told["percolated"]
    cut, passing = (sum(c.links for c in verify_folder(tmp_path / name).values()) for name in told)
    assert passing < cut
    ids = torch.arange(WORDS)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)(ids).logits for name in told
        )
    assert (first - second).abs().max() < 1e-10


def test_layers_are_chosen_by_expressions(tmp_path):
    dense = llama(tmp_path / "dense")
    folder = converted(dense, tmp_path / "sparse", sparsity=0.5, include=["mlp", "q_proj"], exclude=["layers.1"])
    names = {f"model.layers.0.{end}" for end in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert read_topology(folder).masks.keys() == names


def test_names_without_the_prefix_of_the_base_model_become_those_of_the_model(tmp_path):
    dense = llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, dense / "model.safetensors", {"format": "pt"})
    folder = converted(dense, tmp_path / "sparse", sparsity=0.5)
    assert weights(folder).keys() == tensors.keys()
    assert len(read_topology(folder).masks) == LAYERS


def test_a_folder_without_tokenizer_is_told_and_converted(tmp_path):
    dense = llama(tmp_path / "dense")
    for path in dense.glob("tokenizer*"):
        path.unlink()
    said = []
    convert(Request(str(dense), tmp_path / "sparse", sparsity=0.5), said.append)
    assert len(said) == 1
    assert "has no tokenizer" in said[0]
    assert len(verify_folder(tmp_path / "sparse")) == LAYERS
