"""Whole runs of GPT-2, whose weights are stored as (in, out): resume, folder, report, export, and many ranks."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from llm_cht.cli import main
from llm_cht.sparse.folder import read_topology, verify_folder
from tests.helpers import learned, records, tiny_config
from tests.train.test_run_ranks import alone, cut_back, launch, losses, stock_perplexity, summary

SIZES = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 300,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def config_of(folder, no_dropout=None, **sections):
    keys = folder / "gpt2.yaml"
    keys.write_text(yaml.safe_dump({"model_type": "gpt2", **SIZES, **(no_dropout or {})}))
    model = {"config": str(keys), "overrides": {}}
    return tiny_config(folder, **({"model": model} | sections))


def test_a_resumed_run_equals_an_unbroken_one_and_stock_transformers_loads_it(tmp_path):
    config, run = config_of(tmp_path), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    unbroken = learned(run)
    assert main(["train", str(config), "--resume", str(run / "checkpoints" / "step-00000015")]) == 0
    assert learned(run) == unbroken

    ours = load_file(run / "model" / "model.safetensors")
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
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    exported = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(exported[name], ours[name]) for name in ours)
    again = read_topology(tmp_path / "again")
    assert again.transposed == topology.transposed
    assert all(torch.equal(again.masks[name], mask) for name, mask in topology.masks.items())


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles an operator the first time a machine uses it
@pytest.mark.parametrize(
    ("engine", "preset"), [("ddp", "rigl"), ("zero1", "chts"), ("zero2", "rigl"), ("zero3", "chts"), ("zero3", "rigl")]
)
def test_two_ranks_train_what_one_trains(tmp_path, engine, preset):
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (tmp_path / "many").mkdir()
    sections = {"method": {"preset": preset}, "train": {"steps": 12}}
    config = config_of(tmp_path, **sections, no_dropout=no_dropout)
    many = config_of(tmp_path / "many", **sections, no_dropout=no_dropout)
    alone(config)
    launch(engine, 2, many)
    run, other = tmp_path / "run", tmp_path / "many" / "run"
    # the first update comes after step 3: from there on a sum in another order can flip a link
    assert losses(other)[:3] == pytest.approx(losses(run)[:3], rel=1e-5)
    assert losses(other) == pytest.approx(losses(run), rel=0.02)
    assert verify_folder(other / "model").keys() == verify_folder(run / "model").keys()
    for name, mask in read_topology(run / "model").masks.items():
        assert int(mask.sum()) == int(read_topology(other / "model").masks[name].sum())
    assert stock_perplexity(other / "model", many) == pytest.approx(summary(other)["perplexity"], rel=1e-4)
    before = learned(other)
    cut_back(other, 5)
    launch(engine, 2, other / "config.yaml", "--resume", "auto")
    assert learned(other) == before
