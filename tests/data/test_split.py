"""Held-out documents: by text, so that no text is on both sides."""

from collections import Counter
from dataclasses import dataclass

import pytest

from llm_cht.data.split import Split


@dataclass(frozen=True)
class Texts:
    """A source of lists of texts."""

    shards: tuple[tuple[str, ...], ...]
    place: str = "texts"

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def content(self, sampled: bool) -> str:
        return ""

    def documents(self, shard: int, start: int = 0):
        return iter(self.shards[shard][start:])


def test_equal_documents_are_held_out_together():
    texts = tuple(f"text {number % 500}" for number in range(2000))
    sides: dict[str, set[str]] = {"train": set(), "validation": set()}
    for side, text in Split(Texts((texts[:700], texts[700:])), None, 0.2, None).documents():
        sides[side].add(text)
    assert not sides["train"] & sides["validation"]
    assert len(sides["train"] | sides["validation"]) == 500
    assert 70 < len(sides["validation"]) < 130


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_fraction_and_stability(fraction):
    split = Split(Texts(((),)), None, fraction, None)
    held = [split.side(f"text {number}") == "validation" for number in range(5000)]
    assert abs(sum(held) / 5000 - fraction) < 4 * (fraction * (1 - fraction) / 5000) ** 0.5
    more = Split(Texts(((),)), None, 2 * fraction, None)
    assert all(more.side(f"text {number}") == "validation" for number in range(5000) if held[number])


def test_documents_of_an_own_validation_leave_training():
    own = Texts((("b", "d", " "),))
    split = Split(Texts((("a", "b", "\n"), ("c", "b", "d"))), own, 0.5, None)
    assert Counter(split.documents()) == {
        ("validation", "b"): 1,
        ("validation", "d"): 1,
        ("train", "a"): 1,
        ("train", "c"): 1,
        ("shared", "b"): 2,
        ("shared", "d"): 1,
        ("blank", "\n"): 1,
    }


def test_head_limits_what_preparation_reads():
    split = Split(Texts((("a", "b"), ("c", "d"))), Texts((("x", "y", "z"),)), 0.5, 3)
    assert [text for _, text in split.documents()] == ["x", "y", "z", "a", "b", "c"]
