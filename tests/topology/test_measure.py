"""Measures by hand."""

import pytest
import torch

from llm_cht.topology.measure import degrees, elm_overlap, itop


def test_itop_per_layer_mean_and_overall():
    small, large = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    small[0] = large[0, 0] = True
    rates = itop({"small": small, "large": large})
    assert rates.layers == {"small": 0.5, "large": pytest.approx(1 / 12)}
    assert rates.mean == pytest.approx((1 / 2 + 1 / 12) / 2)
    assert rates.overall == 3 / 16


def test_overlap_is_the_share_of_links_that_came_back():
    rates = elm_overlap({"a": 1, "b": 3, "c": 0}, {"a": 4, "b": 3, "c": 0})
    assert rates.layers == {"a": 0.25, "b": 1.0, "c": 0.0}
    assert rates.mean == pytest.approx(1.25 / 3)
    assert rates.overall == 4 / 7
    assert elm_overlap({"a": 0}, {"a": 0}).overall == 0.0


def test_degrees():
    outputs, inputs = degrees(torch.tensor([[True, True, False], [False, True, False]]))
    assert outputs.tolist() == [2, 1]
    assert inputs.tolist() == [1, 2, 0]
