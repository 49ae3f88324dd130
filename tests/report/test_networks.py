import re

import numpy as np
import torch

from llm_cht.report import networks

FIRST = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
LAST = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.bool)


def test_kind_table_of_hand_made_masks():
    start = {"layers.0.attn.q_proj": FIRST, "layers.1.attn.q_proj": FIRST, "layers.0.fc1": FIRST.T}
    end = {"layers.0.attn.q_proj": LAST, "layers.1.attn.q_proj": FIRST, "layers.0.fc1": FIRST.T}
    q, fc1 = networks.kind_table(start, end)
    assert (q.kind, q.layers, q.shapes, q.links_start, q.links_end) == ("q", 2, ((2, 3),), 4, 4)
    assert q.sparsity == 1 - 4 / 12
    assert q.kept == 3 / 4
    assert q.unlinked == "1 / 2"  # one row of the second layer; one column of each layer
    assert (fc1.kind, fc1.kept, fc1.unlinked) == ("fc1", 1.0, "1 / 1")


def test_kind_table_without_an_end_shows_the_start():
    (row,) = networks.kind_table({"q_proj": FIRST}, None)
    assert (row.links_end, row.kept, row.unlinked) == (None, None, "1 / 1")
    assert row.sparsity == 1 - 2 / 6


def test_images_hold_the_density_of_their_cells():
    mask = torch.rand(1000, 77, generator=torch.Generator().manual_seed(0)) < 0.1
    picture = networks.image(mask)
    assert picture.shape == (networks.IMAGE_SIDE, 77)
    expected = mask[:6, 0].float().mean()  # the first cell covers rows 0 to ceil(1000 / 192)
    assert torch.isclose(picture[0, 0], expected)
    assert torch.equal(networks.image(FIRST), FIRST.float())


def test_pictured_layers_are_of_the_middle_block():
    names = [f"layers.{block}.{kind}_proj" for block in range(4) for kind in ("q", "k", "v", "gate", "down")]
    assert networks.pictured_layers(dict.fromkeys(names, FIRST)) == [
        "layers.2.q_proj",
        "layers.2.v_proj",
        "layers.2.gate_proj",
        "layers.2.down_proj",
    ]
    other = [f"layers.0.{kind}" for kind in ("fc1", "fc2", "fc3", "fc4", "fc5")]
    assert networks.pictured_layers(dict.fromkeys(other, FIRST)) == other[:4]


def test_every_neuron_is_in_a_bin_whatever_the_degrees():
    for degrees in (np.array([5, 5, 5]), np.array([0, 1000]), np.arange(46)):
        mask = torch.zeros(len(degrees), 1000, dtype=torch.bool)
        for row, degree in enumerate(degrees):
            mask[row, :degree] = True
        drawn = networks.degrees({"q_proj": mask}, {"q_proj": mask}, "outputs")
        assert "q, outputs" in drawn


def test_a_spike_at_the_start_is_cut_and_labelled():
    fixed = torch.zeros(100, 50, dtype=torch.bool)
    fixed[:, :5] = True
    spread = torch.arange(50)[None] < torch.arange(100)[:, None] // 2
    svg = networks.degrees({"q_proj": fixed}, {"q_proj": spread}, "outputs")
    assert re.search(r"to 100 %", svg)
    assert "to 100 %" not in networks.degrees({"q_proj": fixed}, {"q_proj": fixed}, "outputs")
