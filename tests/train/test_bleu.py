"""BLEU against values by hand."""

import math

import pytest

from llm_cht.errors import UserError
from llm_cht.train.bleu import bleu, copy_baseline


def test_hand_value():
    """One wrong word of six: 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples."""
    found = bleu(["a b c d x f"], ["a b c d e f"])
    assert found.score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    assert (found.length_ratio, found.brevity_penalty) == (1, 1)
    assert found.signature.startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_case_and_brevity():
    found = bleu(["The cat is on the mat"], ["the cat is on the mat today ."])
    assert found.brevity_penalty == pytest.approx(math.exp(1 - 8 / 6))
    assert found.lowercased == pytest.approx(100 * math.exp(1 - 8 / 6))
    assert found.score == pytest.approx(100 * math.exp(1 - 8 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4))
    assert found.lowercased_signature == found.signature.replace("case:mixed", "case:lc")


def test_copying_and_saying_nothing():
    lines = ["one two three four five", "six seven eight nine ten"]
    assert copy_baseline(lines, lines).score == pytest.approx(100)
    assert bleu(["", ""], lines).score == 0


def test_bad_input():
    with pytest.raises(UserError, match="1 hypotheses, 2 references"):
        bleu(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no lines"):
        bleu([], [])
