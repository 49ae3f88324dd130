"""The README's plain loop, word by word, and what a loop that is not ours may get wrong."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_cht import SparseSettings, sparsify
from llm_cht.errors import UserError
from llm_cht.evolve.shards import Whole, shards_of
from llm_cht.sparse.folder import read_topology, verify_folder

README = Path(__file__).parents[2] / "README.md"


def test_the_loop_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (loop,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "updater.after" in code)
    names: dict = {}
    exec(loop, names)
    updater = names["updater"]
    assert updater.last_update == 70  # 0.75 of 100 steps
    counts = verify_folder(tmp_path / "sparse")
    assert len(counts) == 14
    masks = read_topology(tmp_path / "sparse").masks
    assert all(int(mask.sum()) == int(0.1 * mask.numel() + 0.5) for mask in masks.values())
    assert all(torch.equal(mask, updater.masks[name]) for name, mask in masks.items())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(stock(tokens).logits, names["model"].eval()(tokens).logits, rtol=0, atol=1e-6)


def test_a_plain_module_with_its_layers_named():
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6))
    topology = sparsify(model, {"preset": "set", "sparsity": 0.5, "update_interval": 2}, SparseSettings(include=["0"]))
    assert topology.density == 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater = topology.updater(optimizer, total_steps=8)
    figures = []
    for step in range(1, 9):
        updater.watch(step)
        model(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.append(updater.after(step))
    assert [step for step, found in enumerate(figures, 1) if found] == [2, 4, 6]
    assert isinstance(shards_of(optimizer), Whole)


def test_an_optimizer_of_another_make_is_refused():
    with pytest.raises(UserError, match="optimizer object: topology updates know"):
        shards_of(object())
