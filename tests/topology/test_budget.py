"""Link counts: exact, halves up; one density shared out between layers."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_cht.errors import UserError
from llm_cht.topology.budget import BUDGETS, budget_links, num_links


@pytest.mark.parametrize(
    ("shape", "density", "expected"),
    [
        ((4, 5), 0.1, 2),
        ((5, 5), 0.1, 3),  # 2.5 rounds up
        ((3, 5), 0.1, 2),  # 1.5 too: not to the even number
        ((3, 3), 0.05, 0),
        ((7, 11), 0.0, 0),
        ((7, 11), 1.0, 77),
        ((512, 1376), 1 - 0.95, 35226),  # 35225.6
        ((4096, 11008), 1 - 0.9, 4508877),  # 4508876.8
    ],
)
def test_num_links_by_hand(shape: tuple[int, int], density: float, expected: int):
    assert num_links(shape, density) == expected


def test_uniform_gives_every_layer_its_own_count():
    assert budget_links({"a": (5, 5), "b": (40, 50)}, 0.1, "uniform") == {"a": 3, "b": 200}


def test_er_by_hand():
    # 10 % of 100 + 400 + 200 = 70 links, in proportion to 20 + 40 + 30: 15.56, 31.11, 23.33
    shapes = {"a": (10, 10), "b": (20, 20), "c": (20, 10)}
    assert budget_links(shapes, 0.1, "er") == {"a": 16, "b": 31, "c": 23}
    # to 22, 42, 32 of 96: 16.04, 30.63, 23.33
    assert budget_links(shapes, 0.1, "erk") == {"a": 16, "b": 31, "c": 23}
    assert budget_links({"a": (2, 2), "b": (30, 30)}, 0.05, "erk") == {"a": 4, "b": 41}
    # half of 4 + 900: 452; a would get 452 * 4 / 64 = 28 of its 4
    assert budget_links({"a": (2, 2), "b": (30, 30)}, 0.5, "er") == {"a": 4, "b": 448}


def test_filling_one_layer_may_fill_the_next():
    # 0.6 of 4 + 100 + 900 = 602; first only a (4) is above its size: 602 * 4 / 84 = 28.7, b gets 143 of 100 too
    shapes = {"a": (2, 2), "b": (10, 10), "c": (30, 30)}
    assert budget_links(shapes, 0.6, "er") == {"a": 4, "b": 100, "c": 498}
    # 0.3: 301; a 14.3 > 4, b 71.7; then 297: b 297 * 20 / 80 = 74.25, c 222.75
    assert budget_links(shapes, 0.3, "er") == {"a": 4, "b": 74, "c": 223}
    # 0.395: 397; b 94.5 at first, 98.25 once a is full: 98, 295
    assert budget_links(shapes, 0.395, "er") == {"a": 4, "b": 98, "c": 295}
    # 0.42: 422; b 100.5 only just fits no more
    assert budget_links(shapes, 0.42, "er") == {"a": 4, "b": 100, "c": 318}


def test_equal_layers_go_by_order():
    assert budget_links({"a": (3, 3), "b": (3, 3), "c": (3, 3)}, 5 / 27, "er") == {"a": 2, "b": 2, "c": 1}


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8),
    density=st.floats(0.01, 1),
    budget=st.sampled_from(BUDGETS),
)
def test_totals_are_exact_and_no_layer_overflows(sizes: list[tuple[int, int]], density: float, budget: str):
    shapes = {f"layer{i}": shape for i, shape in enumerate(sizes)}
    try:
        links = budget_links(shapes, density, budget)
    except UserError:
        assume(False)
    positions = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    assert list(links) == list(shapes)
    assert all(1 <= links[name] <= positions[name] for name in shapes)
    if budget == "uniform":
        assert links == {name: num_links(shape, density) for name, shape in shapes.items()}
        return
    assert sum(links.values()) == num_links((1, sum(positions.values())), density)
    # one factor explains all layers that are not full, to less than a link; full ones would get more by it
    extra = 2 if budget == "erk" else 0
    weight = {name: sum(shape) + extra for name, shape in shapes.items()}
    lowest = max(Fraction(links[n] - 1, weight[n]) for n in shapes)
    highest = min((Fraction(links[n] + 1, weight[n]) for n in shapes if links[n] < positions[n]), default=None)
    assert highest is None or lowest < highest


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
    densities=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)).map(sorted),
    budget=st.sampled_from(BUDGETS),
)
def test_no_layer_gains_links_when_the_density_falls(sizes: list, densities: list, budget: str):
    shapes = {f"layer{i}": shape for i, shape in enumerate(sizes)}
    try:
        fewer, more = (budget_links(shapes, density, budget) for density in densities)
    except UserError:
        assume(False)
    assert all(fewer[name] <= more[name] for name in shapes)


def test_a_layer_without_a_link_is_refused():
    with pytest.raises(
        UserError, match=r"`method.sparsity` = 0.99 leaves no link in `b` \(2, 3\) under `method.budget` = uniform"
    ):
        budget_links({"a": (20, 30), "b": (2, 3)}, 0.01, "uniform")
    assert budget_links({"a": (20, 30), "b": (2, 3)}, 0.01, "er") == {"a": 5, "b": 1}
    with pytest.raises(UserError, match=r"leaves no link in `b`.*lower it"):
        budget_links({"a": (200, 300), "b": (2, 3)}, 0.0002, "er")
