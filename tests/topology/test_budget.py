"""Link counts: exact, halves up; one density for all layers."""

import pytest

from llm_cht.topology.budget import BUDGETS, num_links, uniform


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


def test_uniform_gives_every_layer_the_same():
    assert uniform({"a": (2, 3), "b": (40, 50)}, 0.3) == {"a": 2, "b": 600}
    assert BUDGETS["uniform"] is uniform
