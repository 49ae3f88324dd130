"""What cannot be converted ends in one sentence, and leaves nothing behind."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_cht.cli import main
from llm_cht.convert import run as run_module
from llm_cht.convert.run import Request, convert
from llm_cht.convert.source import INDEX
from llm_cht.errors import UserError
from llm_cht.sparse.folder import verify_folder
from tests.convert.checkpoints import converted, llama, weights
from tests.helpers import command, digest, finished, told


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "one")
    llama(folder / "many", shard="4KB")
    llama(folder / "tied", tie_word_embeddings=True)
    converted(folder / "one", folder / "sparse", sparsity=0.5)
    return folder


@pytest.fixture
def work(models, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(models, tmp_path / "in")
    return tmp_path / "in"


def refused(source, folder, part, **options):
    """The conversion is refused with ``part`` in its sentence; neither place has changed."""
    before = digest(folder.parent)
    options = options or {"sparsity": 0.5}
    with pytest.raises(UserError, match=re.escape(part)):
        convert(Request(str(source), folder, **options), lambda text: None)
    assert digest(folder.parent) == before


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"seed": 0}, "give one of --sparsity FRACTION, --dense and --compact"),
        ({"sparsity": 0.5, "dense": True}, "give one of"),
        ({"sparsity": 1.0}, "--sparsity 1: must be a fraction"),
        ({"sparsity": float("nan")}, "--sparsity nan: must be a fraction"),
        ({"sparsity": 0.999}, "`--sparsity` = 0.999 leaves no link in"),
        ({"sparsity": 0.9999, "budget": "global"}, "leaves no link in"),
        ({"sparsity": 0.5, "by": "magnitud"}, "did you mean `magnitude`?"),
        ({"sparsity": 0.5, "budget": "globl"}, "did you mean `global`?"),
        ({"sparsity": 0.5, "dtype": "int8"}, "--dtype int8: unknown"),
        ({"sparsity": 0.5, "budget": "global", "by": "er"}, "--by er has none"),
        ({"sparsity": 0.5, "include": ["nothing"]}, "`--include`: 'nothing' matches no linear layer"),
        ({"sparsity": 0.5, "include": ["("]}, "is no regular expression"),
        ({"sparsity": 0.5, "time": True}, "add --compact"),
        ({"dense": True, "by": "ri"}, "--by belongs to --sparsity"),
        ({"compact": True, "percolate": True}, "--percolate belongs to --sparsity"),
        ({"sparsity": 0.97, "by": "er", "percolate": True}, "--percolate leaves no link in"),
        ({"dense": True}, "has no topology.json"),
        ({"compact": True}, "has no topology.json"),
    ],
)
def test_options(models, tmp_path, options, part):
    refused(models / "one", tmp_path / "out", part, **options)


@pytest.mark.parametrize("place", ["one", "one/inside", ".", "one/../one"])
def test_nothing_is_converted_in_place(models, place):
    refused(models / "one", models / place, "nothing is converted in place")


def test_a_target_with_something_in_it(models, tmp_path):
    (tmp_path / "out").mkdir()
    converted(models / "one", tmp_path / "out", sparsity=0.5)
    refused(models / "one", tmp_path / "out", "is there already")
    (tmp_path / "file").write_text("")
    refused(models / "one", tmp_path / "file", "is there already")


def test_no_such_source(models, tmp_path):
    refused(tmp_path / "none", tmp_path / "out", "no folder here; give the folder")
    refused("owner/name", tmp_path / "out", "the hub does not give it")
    refused(models / "one" / "config.json", tmp_path / "out", "no folder here")


def test_files_that_are_not_there(work, tmp_path):
    (work / "one" / "config.json").unlink()
    refused(work / "one", tmp_path / "out", "has no config.json")
    (work / "tied" / "model.safetensors").rename(work / "tied" / "pytorch_model.bin")
    refused(work / "tied", tmp_path / "out", "pytorch_model.bin is not read: save the model again")
    (work / "many" / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    shard = sorted((work / "many").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(work / "many", tmp_path / "out", f"{shard.name} is missing")
    (work / "many" / INDEX).unlink()
    refused(work / "many", tmp_path / "out", f"no {INDEX}, which lists them")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_files(work, tmp_path, size):
    path = sorted((work / "many").glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:size])
    refused(work / "many", tmp_path / "out", f"{path.name} is truncated or damaged")


def test_an_index_that_does_not_fit(work, tmp_path):
    path = work / "many" / INDEX
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": index["weight_map"][name]}}))
    refused(work / "many", tmp_path / "out", "lacks `more`")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: "../one/model.safetensors"}}))
    refused(work / "many", tmp_path / "out", "has no `weight_map` of file names")
    path.write_text("{")
    refused(work / "many", tmp_path / "out", "cannot be read")


def test_weights_that_do_not_fit_the_config(work, tmp_path):
    change_config(work / "one", intermediate_size=20)
    refused(work / "one", tmp_path / "out", "the two are of different models")
    change_config(work / "one", intermediate_size=24, num_hidden_layers=3)
    refused(work / "one", tmp_path / "out", "is in none of its files")
    change_config(work / "one", hidden_size=17)
    refused(work / "one", tmp_path / "out", "config.json")
    change_config(work / "one", model_type=None)
    refused(work / "one", tmp_path / "out", "has no `model_type`")


def test_tied_quantised_and_broken_weights(work, tmp_path):
    refused(work / "tied", tmp_path / "out", "is shared (", sparsity=0.5, include=["lm_head", "q_proj"])
    path = work / "one" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path, {"format": "pt"})
    refused(work / "one", tmp_path / "out", "is quantised (I8)")
    save_file(tensors | {name: tensors[name].index_fill(0, torch.tensor(3), float("nan"))}, path, {"format": "pt"})
    for budget in ("uniform", "global"):
        refused(work / "one", tmp_path / "out", "is not finite everywhere", sparsity=0.5, budget=budget)
    save_file(tensors | {name: tensors[name] * 1e9}, path, {"format": "pt"})
    refused(work / "one", tmp_path / "out", "too large for --dtype", sparsity=0.5, dtype="float16")
    change_config(work / "many", quantization_config={"quant_method": "gptq"})
    refused(work / "many", tmp_path / "out", "its weights are quantised")


@pytest.mark.parametrize("mode", ["dense", "compact"])
def test_a_topology_that_does_not_match_the_weights(work, tmp_path, mode):
    path = work / "sparse" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.ones_like(tensors[name])}, path, {"format": "pt"})
    refused(work / "sparse", tmp_path / "out", "are not 0 where topology.safetensors has no link", **{mode: True})


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OtherConfig(LlamaConfig):
    model_type = "other"
class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


def test_code_of_a_checkpoint_is_run_when_asked_for(work, tmp_path):
    names = {"AutoConfig": "modeling_other.OtherConfig", "AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    change_config(work / "one", model_type="other", architectures=["OtherForCausalLM"])
    refused(work / "one", tmp_path / "out", "transformers knows no model type `other`")
    change_config(work / "one", auto_map=names)
    (work / "one" / "modeling_other.py").write_text(CODE)
    refused(work / "one", tmp_path / "out", "add --trust_remote_code")
    with pytest.warns(UserWarning, match="nothing percolates"):
        converted(work / "one", tmp_path / "out", sparsity=0.5, trust_remote_code=True)
    assert len(verify_folder(tmp_path / "out")) == 14
    assert (tmp_path / "out" / "modeling_other.py").read_text() == CODE


def test_space_is_looked_for_before(work, tmp_path):
    """A tensor of 6.4 TB that is a hole in its file: more than this machine has of disk, or of memory to map it."""
    path = work / "one" / "model.safetensors"
    raw = path.read_bytes()
    start = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + start])
    end = max(about["data_offsets"][1] for name, about in header.items() if name != "__metadata__")
    rows = 10**11
    header["huge"] = {"dtype": "F32", "shape": [rows, 16], "data_offsets": [end, end + rows * 64]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + start :])
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + end + rows * 64)
    with pytest.raises(UserError, match=r"6,400,0\d\d.\d MB are needed, [\d,.]+ MB are free"):
        convert(Request(str(work / "one"), tmp_path / "out", sparsity=0.5), lambda text: None)
    assert not (tmp_path / "out").exists()


def test_what_is_not_on_disk_as_written_is_not_left(models, tmp_path, monkeypatch):
    write = run_module.write_shards

    def spoilt(folder, plan):
        digests = write(folder, plan)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        return digests

    monkeypatch.setattr(run_module, "write_shards", spoilt)
    refused(models / "one", tmp_path / "out", "is not on disk as it was written")


def test_the_command(models, tmp_path, capsys):
    sparse, dense = str(tmp_path / "sparse"), str(tmp_path / "dense")
    options = ["--sparsity", "0.75", "--by", "ri", "--budget", "erk", "--exclude", "q_proj", "k_proj"]
    assert main(["convert", str(models / "one"), sparse, *options]) == 0
    assert main(["convert", sparse, dense, "--dense"]) == 0
    out = capsys.readouterr().out
    assert "10 sparse layers" in out
    assert "read again and found as written" in out
    assert weights(tmp_path / "dense").keys() == weights(models / "one").keys()


def test_mistakes_on_the_command_line(models, tmp_path):
    for arguments, part in (([str(models / "one")], "FOLDER"), (["a", "b", "--sparsity", "x"], "--sparsity")):
        code, _, err = finished(command("convert", *arguments))
        told(code, err, part, "`llm-cht convert --help`")
