"""Whole runs of GPT-2, whose weights are stored as (in, out): resume, folder, report, export, and many ranks."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from llm_cht.cli import main
from llm_cht.config import parse
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.train.checkpoint import resolve
from llm_cht.train.config import RunSettings
from llm_cht.train.run import train
from tests.helpers import records, tiny_config

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def config_of(folder, **sections):
    folder.mkdir(exist_ok=True)
    keys = folder / "gpt2.yaml"
    keys.write_text(yaml.safe_dump({"model_type": "gpt2", **SIZES}))
    model = {"config": str(keys), "overrides": {}}
    return tiny_config(folder, **({"model": model} | sections))


def test_a_resumed_run_equals_an_unbroken_one_and_stock_transformers_loads_it(tmp_path):
    assert main(["train", str(config_of(tmp_path / "one"))]) == 0
    broken = config_of(tmp_path / "two")
    assert main(["train", str(broken)]) == 0
    run, other = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for late in sorted((other / "checkpoints").glob("step-*"))[1:]:
        late.rename(late.with_name(f"old-{late.name}"))
    assert main(["train", str(other / "config.yaml"), "--resume", "auto"]) == 0
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)

    model, info = GPT2LMHeadModel.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info.values()), info
    topology, first = read_topology(run / "model"), read_topology(run, "topology_start")
    assert topology.transposed == first.transposed == topology.masks.keys()
    assert verify_folder(run / "model").keys() == topology.masks.keys()
    for name, mask in topology.masks.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, ours[f"{name}.weight"])
        assert not weight[~mask].any()
        assert int(mask.sum()) == int(first.masks[name].sum())
        assert not torch.equal(mask, first.masks[name])
    shapes = {n: layer["shape"] for n, layer in records(run, "start")[0]["layers"].items()}
    assert shapes == {name: list(mask.shape) for name, mask in topology.masks_OI.items()}
    page = (run / "report.html").read_text()
    assert "attn.c_proj" in page
    assert "mlp.c_proj" in page
    assert main(["export", str(run), "--folder", str(tmp_path / "again")]) == 0
    exported = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(exported[name], ours[name]) for name in ours)
    assert read_topology(tmp_path / "again") == topology
