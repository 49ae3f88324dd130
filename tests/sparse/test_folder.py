import copy
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_cht.errors import UserError
from llm_cht.sparse.folder import (
    LinkCount,
    Topology,
    read_topology,
    save_model_folder,
    verify_folder,
    write_topology,
)
from llm_cht.sparse.linear import SparseLinear

IDS = torch.arange(20)[None]


def sparse_llama(tie=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.max_new_tokens = 17
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            sparse = SparseLinear.from_linear(linear)
            sparse.set_mask(torch.rand(linear.weight.shape) < 0.3)
            model.set_submodule(name, sparse)
    return model


def topology_of(model):
    masks = {name: layer.mask for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    return Topology(masks, "chtss", 1000)


def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={chr(i): i - 33 for i in range(33, 97)}, merges=[])), eos_token="!"
    )


@pytest.fixture(scope="module")
def model():
    return sparse_llama()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model_folder(folder, model, model.state_dict(), tokenizer(), topology_of(model))
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported model to damage."""
    return shutil.copytree(exported, tmp_path / "model")


# ---- folders that appear whole ----


# ---- topology files ----


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3), st.integers(0, 2**32 - 1))
def test_topology_round_trip(tmp_path_factory, shapes, seed):
    folder, generator = tmp_path_factory.mktemp("topology"), torch.Generator().manual_seed(seed)
    masks = {f"layer.{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    write_topology(folder, masks, "set", 7, stem="topology_start")
    found = read_topology(folder, stem="topology_start")
    assert (found.preset, found.step, found.masks.keys()) == ("set", 7, masks.keys())
    assert all(torch.equal(found.masks[name], masks[name]) for name in masks)


def test_topology_json_tells_shapes_and_counts(tmp_path):
    write_topology(tmp_path, {"a": torch.tensor([[True, False, False, False], [False] * 4])}, "er", 3)
    about = json.loads((tmp_path / "topology.json").read_text())
    digest = about.pop("digest")
    assert about == {
        "format": 1,
        "preset": "er",
        "step": 3,
        "layers": {"a": {"shape": [2, 4], "links": 1, "sparsity": 0.875}},
    }
    assert len(digest) == 64
    assert load_file(tmp_path / "topology.safetensors")["a"].tolist() == [1]


def test_layers_that_store_their_weight_transposed_are_marked(tmp_path):
    masks = {"a": torch.tensor([[True, False, False], [False] * 3]), "b": torch.ones(2, 3, dtype=torch.bool)}
    write_topology(tmp_path, masks, "er", 3, transposed={"a", "dense"})
    layers = json.loads((tmp_path / "topology.json").read_text())["layers"]
    assert (layers["a"]["shape"], layers["a"]["transposed"]) == ([2, 3], True)
    assert "transposed" not in layers["b"]
    found = read_topology(tmp_path)
    assert found.transposed == {"a"}
    assert torch.equal(found.masks["a"], masks["a"])
    assert torch.equal(found.masks_OI["a"], masks["a"].T)
    assert torch.equal(found.masks_OI["b"], masks["b"])


def change_json(folder, change):
    about = json.loads((folder / "topology.json").read_text())
    change(about)
    (folder / "topology.json").write_text(json.dumps(about))


def change_packed(folder, change):
    packed = load_file(folder / "topology.safetensors")
    change(packed)
    save_file(packed, folder / "topology.safetensors")


def move_a_link(packed):
    packed["a"][0] = packed["a"][0] * 2  # 0b001 -> 0b010: same count


FAULTS = {
    "no layer": (change_json, lambda about: about["layers"].pop("a"), "different layers, first 'a'"),
    "other shape": (change_json, lambda about: about["layers"]["a"].update(shape=[9, 9]), r"are no \[9, 9\] mask"),
    "transposed": (change_json, lambda about: about["layers"]["a"].update(shape=[3, 2]), "digest"),
    "other count": (change_json, lambda about: about["layers"]["a"].update(links=2), "has 1 links, .* says 2"),
    "no digest": (change_json, lambda about: about.pop("digest"), "lacks a field"),
    "layer without shape": (change_json, lambda about: about["layers"].update(a={}), "lacks a field"),
    "odd mark": (change_json, lambda about: about["layers"]["a"].update(transposed=1), "holds another type"),
    "newer": (change_json, lambda about: about.update(format=2), "has format 2, this version reads 1"),
    "moved link": (change_packed, move_a_link, "digest"),
    "extra layer": (change_packed, lambda packed: packed.update(b=packed["a"].clone()), "different layers, first 'b'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_topology_files_that_do_not_fit(tmp_path, fault):
    write_topology(tmp_path, {"a": torch.tensor([[True, False, False], [False] * 3])}, "er", 3)
    where, change, message = FAULTS[fault]
    where(tmp_path, change)
    with pytest.raises(UserError, match=message):
        read_topology(tmp_path)


@pytest.mark.parametrize("name", ["topology.json", "topology.safetensors"])
def test_topology_file_missing_or_cut(tmp_path, name):
    write_topology(tmp_path, {"a": torch.ones(3, 3, dtype=torch.bool)}, "er", 3)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        read_topology(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="not a model folder of llm-cht"):
        read_topology(tmp_path)


# ---- model folder ----


def test_folder_has_everything_and_exact_zeros(model, exported):
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in exported.iterdir()) == [*names, "topology.json", "topology.safetensors"]
    assert [path.name for path in exported.parent.iterdir()] == ["model"]
    weights, topology = load_file(exported / "model.safetensors"), read_topology(exported)
    assert (topology.preset, topology.step, len(topology.masks)) == ("chtss", 1000, 14)
    for name, mask in topology_of(model).masks.items():
        assert torch.equal(topology.masks[name], mask)
        assert torch.equal(weights[f"{name}.weight"] != 0, mask)
    assert AutoTokenizer.from_pretrained(exported).eos_token == "!"
    assert AutoModelForCausalLM.from_pretrained(exported).generation_config.max_new_tokens == 17


def test_stock_transformers_loads_it_without_llm_cht(model, exported, tmp_path):
    script = """
import sys
sys.modules["llm_cht"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers.")
AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(model.eval()(torch.arange(20)[None]).logits, sys.argv[2])
"""
    logits = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(exported), str(logits)], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(logits, weights_only=True), model(IDS).logits)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_tied_embeddings_leave_the_live_model_alone(tmp_path, tie, dtype):
    model = sparse_llama(tie)
    state, config, random_state = copy.deepcopy(model.state_dict()), model.config.to_dict(), torch.get_rng_state()
    save_model_folder(tmp_path / "model", model, model.state_dict(), tokenizer(), topology_of(model), dtype)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.config.to_dict() == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in weights) != tie
    assert all(torch.equal(tensor, state[name].to(dtype)) for name, tensor in weights.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.dtype == dtype
    assert torch.equal(loaded(IDS).logits, copy.deepcopy(model).to(dtype)(IDS).logits)
    verify_folder(tmp_path / "model")


def test_dense_model(tmp_path):
    model = LlamaForCausalLM(sparse_llama().config)
    save_model_folder(tmp_path / "model", model, model.state_dict(), tokenizer(), Topology({}, "dense", 5))
    assert read_topology(tmp_path / "model") == Topology({}, "dense", 5)
    assert verify_folder(tmp_path / "model") == {}


def test_a_weight_off_the_mask_is_our_defect(tmp_path):
    model = sparse_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(1)
    with pytest.raises(AssertionError, match=r"q_proj are not 0 off the mask"):
        save_model_folder(tmp_path / "model", model, model.state_dict(), tokenizer(), topology_of(model))
    assert list(tmp_path.iterdir()) == []


def test_replaces_its_own_but_no_other_folder(model, tmp_path):
    for _ in range(2):
        save_model_folder(tmp_path / "model", model, model.state_dict(), tokenizer(), topology_of(model))
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="did not write"):
            save_model_folder(place, model, model.state_dict(), tokenizer(), topology_of(model))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("limit", "words"), [(700, 0), (20_000, 0), (30_000, 1000)], ids=["config", "weights", "tokens"]
)
def test_a_failed_write_leaves_the_old_folder(model, folder, limit, words):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    big = tokenizer()
    big.add_tokens([f"word{i}" for i in range(words)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*model: .*File too large.* before is untouched"):
            save_model_folder(folder, model, model.state_dict(), big, topology_of(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# ---- verification ----


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj"


def test_verify_counts_links_and_weights_other_than_zero(model, folder):
    mask = topology_of(model).masks[NAME]
    links = int(mask.sum())
    assert verify_folder(folder)[NAME] == LinkCount(links, links)
    row, column = mask.nonzero()[0].tolist()

    def zero_one(weights):
        weights[f"{NAME}.weight"][row, column] = 0

    change_weights(folder, zero_one)
    assert verify_folder(folder)[NAME] == LinkCount(links, links - 1)


def test_verify_finds_a_weight_off_the_mask(model, folder):
    row, column = (~topology_of(model).masks[NAME]).nonzero()[0].tolist()

    def set_one(weights):
        weights[f"{NAME}.weight"][row, column] = 1e-30

    change_weights(folder, set_one)
    with pytest.raises(UserError, match=rf"1 weights of '{NAME}' are not 0"):
        verify_folder(folder)


def test_verify_finds_missing_and_misshapen_weights(folder):
    change_weights(folder, lambda weights: weights.update({f"{NAME}.weight": weights[f"{NAME}.weight"][:-1].clone()}))
    with pytest.raises(UserError, match=rf"weight of '{NAME}' is \[23, 16\], its mask \[24, 16\]"):
        verify_folder(folder)
    change_weights(folder, lambda weights: weights.pop(f"{NAME}.weight"))
    with pytest.raises(UserError, match=f"no weight for '{NAME}'"):
        verify_folder(folder)


def test_verify_reads_sharded_weights(folder):
    expected = verify_folder(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert verify_folder(folder) == expected
