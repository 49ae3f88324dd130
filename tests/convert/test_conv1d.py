"""GPT-2, whose weights are stored as (in, out), into a sparse start and back, percolated, and onwards in a run."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from llm_cht.convert.run import Request, convert
from llm_cht.sparse.folder import read_topology, verify_folder
from tests.convert.checkpoints import converted, started, weights
from tests.convert.test_sparse import same_but_for
from tests.convert.test_train import first_links
from tests.sparse.family_checks import tokenizer

WORDS = 300
SIZES = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}


def gpt2(folder, dtype=torch.float32):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=1, eos_token_id=1)).to(dtype).save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by", ["magnitude", "ri", "brf", "bsf"])
@pytest.mark.parametrize("budget", ["uniform", "erk"])
def test_links_are_those_of_a_run_that_starts_from_the_checkpoint(tmp_path, by, budget):
    dense = gpt2(tmp_path / "dense")
    folder = converted(dense, tmp_path / "sparse", sparsity=0.8, by=by, budget=budget, seed=3)
    sparse = started(dense, by, budget)
    topology = read_topology(folder)
    assert topology.transposed == topology.masks.keys() == sparse.layers.keys()
    for name, layer in sparse.layers.items():
        assert torch.equal(topology.masks[name], layer.mask), name
    same_but_for(folder, dense, topology.masks)
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(model.get_parameter(f"{n}.weight"), layer.weight) for n, layer in sparse.layers.items())


def test_a_checkpoint_as_the_hub_has_it_becomes_sparse_and_dense_again(tmp_path):
    """Its names lack the prefix, and it holds the masks of attention, which nobody reads any more."""
    dense = gpt2(tmp_path / "dense")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(dense / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    folder = converted(dense, tmp_path / "sparse", sparsity=0.5, budget="global")
    masks = read_topology(folder).masks
    assert len(masks) == 2 * 4
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(mask.numel() for mask in masks.values()) // 2
    _, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    cut = weights(folder)
    strongest = min(cut[f"{name}.weight"][mask].abs().min() for name, mask in masks.items())
    assert all(
        tensors[f"{name.removeprefix('transformer.')}.weight"][~mask].abs().max() <= strongest
        for name, mask in masks.items()
    )
    again = converted(folder, tmp_path / "again", dense=True)
    assert not (again / "topology.json").exists()
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in cut.items())


def test_percolation_leaves_the_outputs(tmp_path):
    dense = gpt2(tmp_path / "dense", dtype=torch.float64)
    for name, options in {"cut": {}, "percolated": {"percolate": True}}.items():
        convert(Request(str(dense), tmp_path / name, sparsity=0.95, by="er", **options), lambda text: None)
    cut, passing = (sum(c.links for c in verify_folder(tmp_path / n).values()) for n in ("cut", "percolated"))
    assert passing < cut
    ids = torch.arange(64)[None]
    models = [GPT2LMHeadModel.from_pretrained(tmp_path / n, dtype=torch.float64).eval() for n in ("cut", "percolated")]
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    assert (first - second).abs().max() < 1e-10


def test_a_run_starts_with_the_links_of_the_folder(tmp_path):
    folder = converted(gpt2(tmp_path / "dense"), tmp_path / "sparse", sparsity=0.8)
    first, last = first_links(folder, tmp_path, initial="file", initial_path=str(folder))
    given = read_topology(folder).masks
    assert first.keys() == given.keys()
    assert all(torch.equal(first[name], given[name]) for name in given)
    assert not all(torch.equal(last[name], given[name]) for name in given)
