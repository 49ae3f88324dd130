"""Inactive neurons are removed: float64 outputs stay, files get smaller, for every family with a row."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from llm_cht.convert.compact import SIZES
from llm_cht.convert.run import Request, convert
from llm_cht.errors import UserError
from llm_cht.sparse.families import FAMILIES
from llm_cht.sparse.folder import Topology, read_topology, save_model_folder, verify_folder
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.percolate import Mlp, ValueOutput
from tests.convert.checkpoints import converted, weights
from tests.sparse import test_families_causal as causal
from tests.sparse import test_families_seq2seq as seq2seq
from tests.sparse.family_checks import cut, tokenizer

ROOMS = {**dict.fromkeys(causal.CONFIGS, causal), **dict.fromkeys(seq2seq.CONFIGS, seq2seq)}
WITH_HEADS = {"llama", "llama grouped", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "phi3"}


def kill(sparse, seed):
    """A third of all neurons, and half of the heads of every attention, not the same in all."""
    generator = torch.Generator().manual_seed(seed)
    for place, group in enumerate(sparse.groups):
        whole = {name: sparse.layers[name].as_OI(sparse.layers[name].mask) for name in group.layers}
        masks = group.split(whole)
        for unit in group.units:
            if isinstance(unit, Mlp):
                masks[unit.out][:, torch.rand(masks[unit.out].shape[1], generator=generator) < 0.35] = False
            if isinstance(unit, ValueOutput) and unit.num_kv_heads > 1:
                columns = masks[unit.out].view(len(masks[unit.out]), unit.num_kv_heads, -1)
                columns[:, place % 2 :: 2] = False  # of a single head of keys and values none
        for name, mask in group.join(masks, whole).items():
            sparse.layers[name].set_mask(sparse.layers[name].as_stored(mask))


def folder_of(model, folder):
    sparse = sparsify(model, SparseSettings())
    cut(sparse, 0.5, seed=1)
    kill(sparse, 2)
    masks = {name: layer.mask for name, layer in sparse.layers.items()}
    words = tokenizer(causal.WORDS)
    save_model_folder(folder, model, model.state_dict(), words, Topology(masks, "chts", 70), torch.float64)
    return folder


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def test_every_family_is_here():
    assert FAMILIES.keys() == SIZES.keys()


@pytest.mark.parametrize("name", ROOMS)
def test_outputs_stay_and_files_get_smaller(tmp_path, name):
    room = ROOMS[name]
    model = room.built(name)
    folder = folder_of(model, tmp_path / "sparse")
    small = converted(folder, tmp_path / "small", compact=True)
    assert size(small) < size(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    loaded, info = type(model).from_pretrained(small, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    assert (room.outputs(loaded.eval()) - room.outputs(model)).abs().max() < 1e-10
    topology = read_topology(small)
    assert (topology.preset, topology.step) == ("chts", 70)
    assert verify_folder(small).keys() == read_topology(folder).masks.keys()
    before, after = (getattr(m.config, "num_attention_heads", None) for m in (model, loaded))
    assert (before != after) == (name.removesuffix(" partial") in WITH_HEADS)
    links, before = (sum(int(mask.sum()) for mask in read_topology(f).masks.values()) for f in (small, folder))
    assert 0 < links <= before


def test_sizes_by_hand(tmp_path):
    """Three MLP neurons are active in one layer and five in the other: five remain in both, two of them zero."""
    model = causal.built("llama grouped")
    sparse = sparsify(model, SparseSettings())
    for layer, (name, active) in enumerate({"model.layers.0.mlp": (7, 2, 11), "model.layers.1.mlp": range(5)}.items()):
        mask = sparse.layers[f"{name}.down_proj"].mask.clone()
        mask[:, [i for i in range(20) if i not in active]] = False
        sparse.layers[f"{name}.down_proj"].set_mask(mask)
        values = sparse.layers[f"model.layers.{layer}.self_attn.o_proj"]
        mask = values.mask.clone()
        mask[:, 16 * layer : 16 * layer + 16] = False  # another group of two heads in each
        values.set_mask(mask)
    masks = {name: layer.mask for name, layer in sparse.layers.items()}
    folder = tmp_path / "sparse"
    save_model_folder(
        folder, model, model.state_dict(), tokenizer(causal.WORDS), Topology(masks, "set", 0), torch.float64
    )
    small = converted(folder, tmp_path / "small", compact=True)
    config = AutoConfig.from_pretrained(small)
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (5, 2, 1)
    assert config.head_dim == 8
    new, old = weights(small), model.state_dict()
    mlp, attention = "model.layers.0.mlp", "model.layers.1.self_attn"
    kept = [0, 1, 2, 7, 11]
    active = torch.tensor([0.0, 0, 1, 1, 1])
    assert torch.equal(new[f"{mlp}.up_proj.weight"], old[f"{mlp}.up_proj.weight"][kept] * active[:, None])
    assert torch.equal(new[f"{mlp}.up_proj.bias"], old[f"{mlp}.up_proj.bias"][kept] * active)
    assert torch.equal(new[f"{mlp}.down_proj.weight"], old[f"{mlp}.down_proj.weight"][:, kept] * active)
    assert torch.equal(new[f"{attention}.q_proj.weight"], old[f"{attention}.q_proj.weight"][:16])
    assert torch.equal(new[f"{attention}.k_proj.bias"], old[f"{attention}.k_proj.bias"][:8])
    assert torch.equal(new[f"{attention}.o_proj.weight"], old[f"{attention}.o_proj.weight"][:, :16])
    assert read_topology(small).masks[f"{mlp}.gate_proj"].sum(dim=1).tolist() == [0, 0, 32, 32, 32]


def test_nothing_to_remove_is_said(tmp_path):
    model = causal.built("llama")
    sparse = sparsify(model, SparseSettings())
    save = (model, model.state_dict(), tokenizer(causal.WORDS))
    masks = {name: layer.mask for name, layer in sparse.layers.items()}
    save_model_folder(tmp_path / "full", *save, Topology(masks, "set", 0), torch.float64)
    half = {name: mask & (torch.arange(mask.shape[1]) < 5) for name, mask in masks.items() if "layers.0" in name}
    for name, mask in half.items():
        sparse.layers[name].set_mask(mask)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model_folder(tmp_path / "half", model, state, save[2], Topology(half, "set", 0), torch.float64)
    for name in ("full", "half"):  # in the other, the layers that are no longer sparse need all
        with pytest.raises(UserError, match=re.escape("--compact: nothing to remove")):
            converted(tmp_path / name, tmp_path / "small", compact=True)
    assert not (tmp_path / "small").exists()


def test_both_models_are_timed_on_request(tmp_path):
    folder = folder_of(causal.built("llama"), tmp_path / "sparse")
    told = convert(Request(str(folder), tmp_path / "small", compact=True, time=True), lambda text: None)
    assert re.search(r"forward pass of 32 tokens: [\d.]+ ms before, [\d.]+ ms after", told), told


def test_a_family_without_a_row_is_refused(tmp_path, monkeypatch):
    folder = folder_of(causal.built("llama"), tmp_path / "sparse")
    monkeypatch.delitem(SIZES, "llama")
    with pytest.raises(UserError, match="it is not known what model type `llama` can lose"):
        convert(replace(Request(str(folder), tmp_path / "small"), compact=True), lambda text: None)
