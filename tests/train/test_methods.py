"""Whole runs of every method through the command line: they end, resume exactly, and say what they cost."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llm_cht.cli import main
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.topology import checks, link, method, presets, update
from llm_cht.topology.presets import PRESETS
from tests.helpers import learned, records, tiny_config

EVOLVING = [name for name in PRESETS if name not in ("dense", "static")]


def run_of(folder: Path, *arguments: str, **method) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"sparsity": 0.8, "update_interval": 3} | method
    config = tiny_config(folder, method=settings, checkpoint={"every": 5, "keep_last": 9})
    assert main(["train", str(config), *arguments]) == 0
    return folder / "run"


def summary(run: Path) -> dict:
    return records(run, "end")[0]["summary"]


@pytest.mark.parametrize("preset", EVOLVING)
def test_a_resumed_run_of_every_method_equals_an_unbroken_one(preset, tmp_path):
    run = run_of(tmp_path, preset=preset)
    verify_folder(run / "model")
    whole = learned(run)
    end = summary(run)
    assert end["density"] == pytest.approx(0.2, abs=1e-3)
    assert end["density"] <= end["average_density"] + 1e-9
    assert 0 < end["flops_relative"] < 1
    assert main(["train", str(run / "config.yaml"), "--resume", str(run / "checkpoints" / "step-00000010")]) == 0
    assert learned(run) == whole
    assert summary(run)["flops"] == end["flops"]


def test_flops_count_what_each_method_pays(tmp_path):
    ends = {name: summary(run_of(tmp_path / name, preset=name)) for name in ("static", "set", "rigl", "snfs", "chts")}
    static = ends["static"]
    positions = 2 * (4 * 16 * 16 + 3 * 16 * 32)
    others = 300 * 16 + 5 * 16  # output layer and norms
    dense = 6 * (positions + others) + 12 * 2 * 16 * 32
    tokens = static["tokens"]
    links = round(0.2 * 256) * 4 * 2 + round(0.2 * 512) * 3 * 2
    of_steps = [record["flops_per_token"] for record in records(tmp_path / "rigl" / "run", "train")]
    assert of_steps[0] == dense - 6 * positions + 6 * links
    assert of_steps[2] == pytest.approx(of_steps[0] + 2 * (positions - links) + 100 * positions / 124)
    assert static["flops"] == tokens * (dense - 6 * positions + 6 * links)
    assert static["flops_relative"] == static["flops"] / (dense * tokens)
    # five updates, after steps 3, 6, 9, 12 and 15, choose among all positions
    assert ends["set"]["flops"] == static["flops"] + 5 * 100 * positions
    per_step = tokens / 20
    extra = 2 * (positions - links) * per_step
    assert ends["rigl"]["flops"] == pytest.approx(ends["set"]["flops"] + 5 * extra, rel=0.01)
    assert ends["snfs"]["flops"] == pytest.approx(ends["set"]["flops"] + 15 * extra, rel=0.01)
    assert ends["chts"]["flops"] > ends["set"]["flops"]
    assert static["mask_bytes"] == positions
    assert static["topology_bytes"] == positions
    assert ends["chts"]["topology_bytes"] == 5 * positions


def test_the_final_topology_of_a_run_is_trained_again_from_the_same_weights(tmp_path):
    """Static retraining (001 App. C): same seed, same first weights; another seed, new ones."""
    run = run_of(tmp_path / "first", preset="chts")
    again = run_of(tmp_path / "again", preset="static", initial="file", initial_path=str(run / "model"))
    masks, same = read_topology(run / "model").masks, read_topology(again / "model").masks
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    assert not records(again, "topology")
    other = run_of(tmp_path / "other", "--seed", "7", preset="static", initial="file", initial_path=str(run / "model"))
    starts = [
        safetensors.torch.load_file(one / "checkpoints" / "step-00000005" / "model.safetensors")
        for one in (again, other)
    ]
    assert not torch.equal(starts[0]["model.embed_tokens.weight"], starts[1]["model.embed_tokens.weight"])
    whole = learned(again)
    shutil.rmtree(run)  # a resumed run needs the file no more
    checkpoint = again / "checkpoints" / "step-00000010"
    assert main(["train", str(again / "config.yaml"), "--resume", str(checkpoint)]) == 0
    assert learned(again) == whole


def test_a_topology_of_unequal_layers_keeps_its_counts(tmp_path, capsys):
    run = run_of(tmp_path / "first", preset="granet", pruning_scope="global")
    given = {"preset": "set", "initial": "file", "initial_path": str(run / "model")}
    (tmp_path / "refused").mkdir()
    config = tiny_config(tmp_path / "refused", method=given)
    assert main(["train", str(config)]) == 2
    assert "set `method.budget: kept`" in capsys.readouterr().err
    again = run_of(tmp_path / "again", budget="kept", **given)
    masks, kept = read_topology(run / "model").masks, read_topology(again / "model").masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {n: int(m.sum()) for n, m in kept.items()}
    assert any(not torch.equal(masks[name], kept[name]) for name in masks)


def test_what_has_no_effect_is_said(tmp_path, capsys):
    run_of(tmp_path, preset="set", brf_r=0.1, temperature_end=4.0)
    err = capsys.readouterr().err
    assert "note: `method.brf_r` = 0.1 has no effect without `method.initial: brf`" in err
    assert "note: `method.temperature_end` = 4.0 has no effect without `method.removal_choice: soft`" in err
    assert err.count("note: ") == 2


def test_csti_reads_training_sequences_and_leaves_the_data_as_they_were(tmp_path):
    for streaming in (False, True):
        folder = tmp_path / str(streaming)
        folder.mkdir()
        data = {"streaming": streaming, "validation": str(tmp_path / "held.txt")} if streaming else {}
        (tmp_path / "held.txt").write_text("\n\n".join(["the mask grows and the model learns of it " * 9] * 4))
        runs = {}
        for initial in ("csti", "er"):
            own = folder / initial
            own.mkdir()
            method = {"preset": "static", "sparsity": 0.8, "initial": initial, "calibration_sequences": 8}
            config = tiny_config(own, data=data, method=method, train={"steps": 3})
            assert main(["train", str(config)]) == 0
            runs[initial] = own / "run"
        csti, er = (read_topology(runs[initial] / "model").masks for initial in ("csti", "er"))
        name = "model.layers.0.self_attn.q_proj"
        assert int(csti[name].sum()) == int(er[name].sum())
        assert not torch.equal(csti[name], er[name])
        assert torch.equal(csti["model.layers.1.self_attn.q_proj"], er["model.layers.1.self_attn.q_proj"])
        states = [(run / "checkpoints" / "step-00000003" / "state.json").read_text() for run in runs.values()]
        positions = [json.loads(state)["data"] for state in states]
        assert positions[0] == positions[1]


def test_link_age_and_a_mix_that_nobody_ran(tmp_path):
    age = ("--optimizer.link_age", "true", "--lr.rewarm", "off")
    run = run_of(tmp_path, *age, preset="granet", pruning_scope="global", regrowth_from={9: "ch2_l3n"})
    whole = learned(run)
    assert main(["train", str(run / "config.yaml"), "--resume", str(run / "checkpoints" / "step-00000010")]) == 0
    assert learned(run) == whole


def test_a_rule_of_ones_own_is_a_function_and_a_row(tmp_path, monkeypatch):
    """The README's section on adding a rule, its lines run where they are to stand."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = readme.partition("## Add a rule")[2].partition("```python")[2].partition("```")[0]
    rule, _, preset = lines.partition("PRESETS[")
    monkeypatch.setattr(link, "PREDICTORS", dict(link.PREDICTORS))
    for table in ("PRESETS", "SOURCES"):
        monkeypatch.setattr(presets, table, dict(getattr(presets, table)))
    for module in (update, checks, method):
        for name, value in (("PREDICTORS", link.PREDICTORS), ("PRESETS", presets.PRESETS)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    exec(rule, vars(link) | {"__name__": "llm_cht.topology.link"})
    exec(f"PRESETS[{preset}", vars(presets))
    presets.SOURCES["mine"] = "a test"
    run = run_of(tmp_path, preset="mine", zeta=0.5)
    for mask in read_topology(run / "model").masks.values():
        assert mask[:4, :4].float().mean() > 2 * mask[-4:, -4:].float().mean()
