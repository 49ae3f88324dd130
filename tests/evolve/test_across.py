"""Links kept per layer under a limit for all of them, against sorting everything."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.evolve.across import links_of_layers


def test_by_hand():
    scores = {"a": torch.tensor([5.0, 1.0, 3.0]), "b": torch.tensor([4.0, 2.0, 0.0])}
    assert links_of_layers(scores, ["a", "b"], 3) == {"a": 2, "b": 1}
    assert links_of_layers(scores, ["a", "b"], 6) == {"a": 3, "b": 3}


def test_equal_scores_go_to_the_first_layers_and_no_layer_is_left_empty():
    ones = {name: torch.ones(4) for name in "abc"}
    assert links_of_layers(ones, list("abc"), 7) == {"a": 3, "b": 3, "c": 1}
    strong = {"a": torch.full((6,), 9.0), "b": torch.full((2,), 1e-30)}
    assert links_of_layers(strong, ["a", "b"], 4) == {"a": 3, "b": 1}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**31), st.data())
def test_against_sorting(sizes, ties, seed, data):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(size, generator=generator) ** 8 for i, size in enumerate(sizes)}
    if ties:
        scores = {name: (score * 4).round() for name, score in scores.items()}
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    kept = links_of_layers(scores, list(scores), total)
    assert sum(kept.values()) == total
    assert all(1 <= kept[name] <= len(score) for name, score in scores.items())
    limit = torch.cat(list(scores.values())).sort(descending=True).values[total - 1]
    sure = {name: int((score > limit).sum()) for name, score in scores.items()}
    possible = {name: int((score >= limit).sum()) for name, score in scores.items()}
    if all(kept[name] > 1 or sure[name] == 1 for name in kept):  # else a layer may have got its one link from another
        assert all(sure[name] <= kept[name] <= possible[name] for name in kept)
