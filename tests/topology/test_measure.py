"""Measures by hand."""

import pytest

from llm_cht.topology.measure import elm_overlap, itop


def test_itop_per_layer_mean_and_overall():
    rates = itop({"small": 2, "large": 1}, {"small": 4, "large": 12})
    assert rates.layers == {"small": 0.5, "large": pytest.approx(1 / 12)}
    assert rates.mean == pytest.approx((1 / 2 + 1 / 12) / 2)
    assert rates.overall == 3 / 16


def test_overlap_is_the_share_of_links_that_came_back():
    rates = elm_overlap({"a": 1, "b": 3, "c": 0}, {"a": 4, "b": 3, "c": 0})
    assert rates.layers == {"a": 0.25, "b": 1.0, "c": 0.0}
    assert rates.mean == pytest.approx(1.25 / 3)
    assert rates.overall == 4 / 7
    assert elm_overlap({"a": 0}, {"a": 0}).overall == 0.0
