"""The statistics of a sweep against values worked out by hand and against a count of all signs."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.sweep.run import Records
from llm_cht.sweep.settings import Run, Setting, Sweep
from llm_cht.sweep.table import Result, blocks, mean_and_error, signed_rank, summarise, win_rates
from llm_cht.train.config import RunSettings

SWEEP = Sweep(
    file="s.yaml",
    base=[],
    settings={},
    folder=Path("x"),
    cases={},
    grid={},
    seeds=[0, 1],
    skip=[],
    compare="case",
    reference="dense",
    metric="perplexity",
    higher=False,
)


def runs_of(folder: Path) -> list[Run]:
    """Dense, and set at two sparsities, with two seeds; their folders hold a config."""
    made = [
        Setting("dense", {"case": "dense"}, {"method.preset": "dense", "method.sparsity": 0.0}),
        Setting("set_0.7", {"case": "set", "method.sparsity": "0.7"}, {"method.sparsity": 0.7}),
        Setting("set_0.9", {"case": "set", "method.sparsity": "0.9"}, {"method.sparsity": 0.9}),
    ]
    runs = []
    for seed, setting in itertools.product(SWEEP.seeds, made):
        name = f"{setting.name}_seed{seed}"
        runs.append(Run(name, setting, RunSettings(run=str(folder / name), seed=seed)))
        runs[-1].folder.mkdir(parents=True)
        (runs[-1].folder / "config.yaml").touch()
    return runs


PERPLEXITY = {
    "dense_seed0": 10.0,
    "set_0.7_seed0": 12.0,
    "set_0.9_seed0": 9.0,
    "dense_seed1": 11.0,
    "set_0.7_seed1": 11.0,
    "set_0.9_seed1": 13.0,
}


def records_of(names: dict[str, float | None], **summary: float) -> Records:
    return {name: {"name": name, "summary": {"perplexity": value, **summary}} for name, value in names.items()}


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([4.0]) == (4.0, None)


def test_a_case_outside_the_grid_is_compared_with_each_of_its_values(tmp_path):
    results = {name: Result(name, value) for name, value in PERPLEXITY.items()}
    found = blocks(SWEEP, runs_of(tmp_path), results)
    assert [{value: result.run for value, result in block.items()} for block in found] == [
        {"dense": f"dense_seed{seed}", "set": f"set_{sparsity}_seed{seed}"}
        for seed in (0, 1)
        for sparsity in (0.7, 0.9)
    ]
    del results["set_0.9_seed1"]
    assert list(blocks(SWEEP, runs_of(tmp_path / "again"), results)[-1]) == ["dense"]


def test_the_same_runs_are_compared_once(tmp_path):
    """Both cases of a rate set the sparsity themselves, so that its values in the grid are all the same to them."""
    third = Setting("set_0.9", {"case": "set", "optimizer.lr": "1", "method.sparsity": "0.9"}, {})
    fixed = [Setting(f"dense_{lr}", {"case": "dense", "optimizer.lr": lr}, {"method.sparsity": 0.0}) for lr in "12"]
    runs = [Run(setting.name, setting, RunSettings(seed=0)) for setting in (*fixed, third)]
    runs.append(Run("more", replace(third, factors=third.factors | {"method.sparsity": "0.7"}), RunSettings(seed=0)))
    results = {run.name: Result(run.name, 1.0) for run in runs}
    found = blocks(replace(SWEEP, compare="optimizer.lr", reference="1"), runs, results)
    assert [{value: result.run for value, result in block.items()} for block in found] == [
        {"1": "dense_1", "2": "dense_2"},
        {"1": "set_0.9"},
        {"1": "more"},
    ]


def test_ties_split_a_win_and_incomplete_blocks_count_for_nobody():
    found = [
        {"a": Result("a0", 1.0), "b": Result("b0", 2.0)},
        {"a": Result("a1", 3.0), "b": Result("b1", 3.0)},
        {"a": Result("a2", 5.0), "b": Result("b2", 4.0)},
        {"a": Result("a3", 1.0), "b": Result("b3", 9.0)},
        {"b": Result("b4", 1.0)},
    ]
    assert win_rates(found, ["a", "b"], higher=False) == ({"a": 2.5 / 4, "b": 1.5 / 4}, 4)
    assert win_rates(found, ["a", "b"], higher=True) == ({"a": 1.5 / 4, "b": 2.5 / 4}, 4)
    assert win_rates([], ["a", "b"], higher=True)[1] == 0


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], (2 / 2**6, 6)),  # the most extreme of 64 sign patterns, on both sides
        ([1, -2, 3, 4, 5, 6, 7, 8], (2 * 3 / 2**8, 8)),  # rank sums up to 2: {}, {1}, {2}
        ([1, 2, 3, 4, 5], (None, 5)),
        ([0, 0, 1, 2, 3, 4, 5], (None, 5)),
        ([], (None, 0)),
    ],
)
def test_signed_rank_by_hand(differences, expected):
    assert signed_rank(differences) == expected


def slow_signed_rank(differences: list[int]) -> float:
    """Two-sided p by a count of all signs; equal sizes have their mean rank."""
    sizes = [abs(difference) for difference in differences]
    ranks = [sum(other < size for other in sizes) + (sizes.count(size) + 1) / 2 for size in sizes]
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    here = sum(rank for rank, difference in zip(ranks, differences, strict=True) if difference > 0)
    below, above = sum(one <= here for one in sums), sum(one >= here for one in sums)
    return min(1.0, 2 * min(below, above) / len(sums))


@given(st.lists(st.integers(-9, 9).filter(bool), min_size=6, max_size=10))
@settings(max_examples=30, deadline=None)
def test_signed_rank_is_exact_for_few_pairs_with_ties_too(differences):
    assert signed_rank(differences)[0] == pytest.approx(slow_signed_rank(differences))


def test_the_tables(tmp_path):
    text = summarise(SWEEP, runs_of(tmp_path), records_of(PERPLEXITY, average_density=0.25, flops=1.5e9))
    assert "# x: 6 of 6 runs" in text
    assert "| case | sparsity | runs | perplexity | average density | training FLOPs |\n" in text
    assert "| dense | (0.0) | 2 of 2 | 10.50 ± 0.50 | 0.25 | 1.5e+09 |\n" in text
    assert "| set | 0.9 | 2 of 2 | 11.0 ± 2.0 | 0.25 | 1.5e+09 |\n" in text
    # set against dense: 12 : 10, 9 : 10, 11 : 11, 13 : 11
    assert "| dense | 62% | reference |  |  |\n" in text
    assert "| set | 38% | +0.75 | 4 * | - (3 differ; fewer than 6 cannot reach 0.05) |\n" in text
    assert "stands in several pairs" in text


def test_what_is_missing_is_said(tmp_path):
    known = {name: value for name, value in PERPLEXITY.items() if name != "set_0.7_seed1"} | {"set_0.9_seed1": None}
    text = summarise(SWEEP, runs_of(tmp_path), records_of(known))
    assert "# x: 5 of 6 runs" in text
    assert "| set | 0.7 | 1 of 2 | 12.00 |\n" in text
    assert "Left out, because their perplexity is not finite: set_0.9_seed1." in text
    assert "share of the 2 comparisons (1 more lack a run)" in text
