"""A run goes on from a converted folder: with the links of its file, or with the strongest of its weights."""

import pytest
import torch
import yaml

from llm_cht.sparse.folder import read_topology
from llm_cht.train.run import train
from tests.convert.checkpoints import converted, llama
from tests.helpers import tiny_config


def first_links(folder, tmp_path, **method):
    from llm_cht.config import parse
    from llm_cht.train.config import RunSettings

    settings = {"method": {"sparsity": 0.8, **method}, "train": {"steps": 4}, "data": {"tokenizer": "bpe"}}
    config = tiny_config(tmp_path, model={"path": str(folder)}, **settings)
    values = yaml.safe_load(config.read_text())
    values["model"] = {"path": str(folder)}
    values["checkpoint"] = {"every": 4}
    config.write_text(yaml.safe_dump(values))
    outcome = train(parse(RunSettings, "llm-cht train", [str(config)]), say=print)
    return read_topology(outcome.run, "topology_start").masks, read_topology(outcome.run / "model").masks


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, {"initial": "checkpoint"}),
        ({}, {"initial": "file"}),
        ({"by": "brf"}, {"initial": "file"}),
        ({"budget": "global"}, {"initial": "file", "budget": "kept"}),
        ({"by": "er", "percolate": True}, {"initial": "file", "budget": "kept"}),
        ({"by": "er"}, {}),  # without a word about it
        ({"by": "er"}, {"preset": "cht", "update_interval": 2}),
    ],
)
def test_a_run_starts_with_the_links_of_the_folder(tmp_path, options, method):
    dense = llama(tmp_path / "dense", vocab_size=300)
    folder = converted(dense, tmp_path / "sparse", sparsity=0.8, **options)
    if method.get("initial") == "file":
        method = method | {"initial_path": str(folder)}
    first, last = first_links(folder, tmp_path, **method)
    given = read_topology(folder).masks
    assert first.keys() == given.keys()
    assert all(torch.equal(first[name], given[name]) for name in given)
    assert not all(torch.equal(last[name], given[name]) for name in given)  # and they evolve
