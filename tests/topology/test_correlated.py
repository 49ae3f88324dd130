"""Correlations of features from batches, and the starts that follow them, by hand and against numpy's formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.errors import UserError
from llm_cht.topology.correlated import Correlation, correlation, csti
from llm_cht.topology.keys import Keys


def keys(seed: int = 0) -> Keys:
    return Keys(seed, 0, "layer")


# a = (1, 2, 3, 4), b = 2a, c = (1, -1, -1, 1), d = (0, 0, 0, 1) over four samples.
FOUR = torch.tensor([[1.0, 2, 1, 0], [2, 4, -1, 0], [3, 6, -1, 0], [4, 8, 1, 1]])
# Deviations: a (-1.5, -.5, .5, 1.5), c as it is, d (-.25, -.25, -.25, .75); squares sum to 5, 4, 0.75.
# ab = 1; ac = 0; ad = 1.5 / sqrt(5 * .75) = .775; cd = 1 / sqrt(4 * .75) = .577.
AD, CD = 1.5 / 3.75**0.5, 1 / 3**0.5
BY_HAND = torch.tensor([[0, 1, 0, AD], [1, 0, 0, AD], [0, 0, 0, CD], [AD, AD, CD, 0]])


def test_four_features_by_hand():
    torch.testing.assert_close(correlation(FOUR), BY_HAND)
    links = csti((4, 4), 8, keys(), correlation(FOUR))
    assert links.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert csti((4, 4), 2, keys(), correlation(FOUR)).nonzero().tolist() == [[0, 1], [1, 0]]
    # a negative correlation is as good
    assert csti((4, 4), 2, keys(), -correlation(FOUR)).nonzero().tolist() == [[0, 1], [1, 0]]


def test_tiles_repeat_and_the_first_ones_take_the_odd_links():
    mask_OI = csti((12, 4), 8, keys(), correlation(FOUR))
    assert [int(tile.sum()) for tile in mask_OI.split(4)] == [3, 3, 2]
    for tile in mask_OI.split(4):
        assert tile[0, 1]
        assert tile[1, 0]
    third = {tuple(csti((4, 4), 3, keys(seed), BY_HAND)[[0, 1, 3, 3], [3, 3, 0, 1]].tolist()) for seed in range(60)}
    assert len(third) == 4  # the four equal to AD take turns


def test_more_links_than_correlations_are_drawn_at_random():
    """Feature 3 is constant: its row and column come last; of the others 0-2, 1-2 and the diagonal are left."""
    weak = torch.zeros(4, 4)
    weak[0, 1] = weak[1, 0] = 0.5
    weak[1, 2] = weak[2, 1] = 0.25
    counts = torch.zeros(4, 4)
    for seed in range(300):
        mask_OI = csti((4, 4), 6, keys(seed), weak)
        assert int(mask_OI.sum()) == 6
        assert mask_OI[weak > 0].all()
        counts += mask_OI & (weak == 0)
    assert not counts[3].any()
    assert not counts[:, 3].any()
    drawn = counts[[0, 0, 1, 2, 2], [0, 2, 1, 0, 2]]
    assert drawn.tolist() == pytest.approx([120] * 5, abs=40)
    assert int(csti((4, 4), 9, keys(), weak)[:3, :3].sum()) == 9
    assert csti((4, 4), 16, keys(), weak).all()
    assert not csti((4, 4), 0, keys(), weak).any()


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(2, 60),
    num_features=st.integers(2, 9),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    seed=st.integers(0, 1000),
)
def test_batches_of_any_size_give_the_correlations_of_all(
    num_samples: int, num_features: int, cuts: list[int], seed: int
):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    samples_NI = torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64) @ mix + 1000
    kept = samples_NI.clone()
    streamed = Correlation()
    for part in torch.tensor_split(samples_NI, sorted(min(cut, num_samples) for cut in cuts)):
        streamed.add(part)
    assert torch.equal(samples_NI, kept), "the samples were changed"
    expected = torch.corrcoef(samples_NI.T).fill_diagonal_(0).float()
    torch.testing.assert_close(streamed.result(), expected, rtol=1e-5, atol=1e-6)


def test_constant_features_are_left_out_whatever_their_value():
    """0.1 has no exact mean: its deviations are not 0, but rounding, and would correlate."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(3, 5, 4, generator=generator)  # any leading dimensions
    samples[..., 1] = samples[..., 3] = 0.1
    streamed = Correlation()
    for batch in samples:
        streamed.add(batch)
    result = streamed.result()
    assert not result[[1, 3]].any()
    assert not result[:, [1, 3]].any()
    assert result[0, 2] == result[2, 0] != 0


def test_what_has_no_correlations_is_refused():
    with pytest.raises(UserError, match="csti: `layer` has 6 outputs, which is no multiple of its 4 inputs"):
        csti((6, 4), 3, keys(), BY_HAND)
    with pytest.raises(UserError, match="inputs of `layer` are not finite, or no two of its features vary; give more"):
        csti((4, 4), 3, keys(), correlation(torch.ones(5, 4)))
    bad = FOUR.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        csti((4, 4), 3, keys(), correlation(bad))
