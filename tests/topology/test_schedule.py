"""Schedules: hand values, exact ends, windows that fall between updates, and what is refused."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.errors import UserError
from llm_cht.topology.schedule import (
    SHAPES,
    Anneal,
    Density,
    Stages,
    StepTable,
    Temperature,
    Updates,
    density_window,
)


def test_updates_fall_on_multiples_up_to_the_end():
    updates = Updates(interval=10, end_step=35)
    due = [step for step in range(60) if updates.due(step)]
    assert due == [10, 20, 30]
    assert [updates.index(step) for step in due] == [1, 2, 3]
    assert updates.count == 3


def test_an_end_on_a_multiple_counts_and_an_end_of_zero_means_none():
    assert Updates(10, 30).due(30)
    assert Updates(10, 30).count == 3
    assert Updates(1, 3).count == 3
    assert not any(Updates(1, 0).due(step) for step in range(5))


def test_zeta_by_hand():
    assert [Anneal(0.3, 100, "constant")(step) for step in (10, 100, 200)] == [0.3, 0.3, 0.3]
    falling = Anneal(0.3, 120, "cosine")
    expected = [0.3, 0.225, 0.15, 0.075, 0, 0]
    assert [falling(step) for step in (0, 40, 60, 80, 120, 130)] == pytest.approx(expected)
    assert falling(120) == 0
    assert Anneal(0.3, 0, "cosine")(10) == 0


def test_temperature_by_hand():
    linear = Temperature(1, 9, 100, "temperature")
    assert [linear(step) for step in (0, 25, 50, 100, 150)] == [1, 3, 5, 9, 9]
    # delta runs from 0.5 to 0.9: 0.6 in the quarter, 0.7 in the middle
    delta = Temperature(1, 9, 100, "delta")
    expected = [1, 0.6 / 0.4, 0.7 / 0.3, 0.8 / 0.2, 9]
    assert [delta(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "sparsity"),
    [(0, 0.5), (125, 0.5034), (250, 0.5181), (500, 0.7), (750, 0.8819), (875, 0.8966), (1000, 0.9), (1200, 0.9)],
)
def test_sigmoid_from_half_to_ninety_percent(step: int, sparsity: float):
    density = Density("sigmoid", 0.5, 1 - 0.9, 0, 1000)
    assert 1 - density(step) == pytest.approx(sparsity, abs=5e-5)


def test_sigmoid_shape_against_its_definition():
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for done in (0, 0.1, 0.3, 0.5, 0.77, 1):
        expected = (logistic(6 * (2 * done - 1)) - logistic(-6)) / (logistic(6) - logistic(-6))
        assert SHAPES["sigmoid"](done) == pytest.approx(expected, abs=1e-12)


def test_a_later_window_starts_late():
    density = Density("sigmoid", 0.5, 0.1, 200, 400)
    assert [density(step) for step in (0, 200, 300, 400)] == pytest.approx([0.5, 0.5, 0.3, 0.1])


@settings(deadline=None, max_examples=60)
@given(
    sparsities=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    interval=st.integers(1, 300),
    end_step=st.integers(1, 5000),
    half=st.booleans(),
)
def test_the_last_update_reaches_the_target_exactly(sparsities: list, interval: int, end_step: int, half: bool):
    start, end = density_window(0, end_step, interval, half)
    if end == 0:
        return
    first, last = (1 - sparsity for sparsity in sparsities)
    density = Density("sigmoid", first, last, start, end)
    values = [density(step) for step in range(0, end_step + 1, interval)]
    assert values[0] == first
    assert values[end // interval :] == [last] * len(values[end // interval :])
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(values))


def test_constant_density_is_the_final_one():
    assert [Density("constant", 0.1, 0.1, 0, 0)(step) for step in (0, 10)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0, 7500, 100, False), (0, 7500)),
        ((0, 7500, 100, True), (0, 3700)),  # 3750, down to an update
        ((0, 7599, 100, False), (0, 7500)),
        ((0, 99, 100, False), (0, 0)),
        ((200, 1000, 100, True), (200, 600)),  # the window is halved, not its end
        ((0, 30, 1, True), (0, 15)),
    ],
)
def test_windows_end_on_an_update(window: tuple[int, int, int, bool], expected: tuple[int, int]):
    assert density_window(*window) == expected


def test_the_half_window_of_the_sigmoid_costs_what_the_cubic_costs():
    """Both spend 1/4 of the window above the final density; the grid of updates makes the difference."""
    total, start, final = 10_000, 0.5, 0.1
    sigmoid = Density("sigmoid", start, final, *density_window(0, total, 1, half=True))
    spent = sum(sigmoid(step) - final for step in range(total)) / (start - final) / total
    cubic = sum((1 - step / total) ** 3 for step in range(total)) / total
    assert spent == pytest.approx(cubic, abs=1e-3)


def test_linear_and_cubic_by_hand():
    shares = {"linear": [0, 0.25, 0.5, 0.75, 1], "cubic": [0, 0.578125, 0.875, 0.984375, 1]}
    for kind, expected in shares.items():
        density = Density(kind, 0.5, 0.1, 0, 100)
        assert [(0.5 - density(step)) / 0.4 for step in (0, 25, 50, 75, 100)] == pytest.approx(expected)
        assert density(100) == density(130) == 0.1


def test_the_stages_of_mest_by_hand():
    stages = Stages(0.1, 0, 1000, 100)
    steps = (0, 500, 599, 600, 899, 900, 1000)
    assert [stages(step) for step in steps] == pytest.approx([0.15, 0.15, 0.15, 0.125, 0.125, 0.1, 0.1])
    assert {stages.kept_by_removal(step) for step in steps} == {0.1}
    assert stages.last_step == 1000


def test_a_table_holds_from_each_step_on():
    table = StepTable(((0, 0.5), (100, 0.3), (300, 0.1)), 100)
    assert [table(step) for step in (0, 99, 100, 299, 300, 1000)] == [0.5, 0.5, 0.3, 0.3, 0.1, 0.1]
    assert (table.final, table.last_step) == (0.1, 300)


def test_density_goes_on_past_the_last_regrowth():
    updates, density = Updates(10, 50), Density("sigmoid", 0.5, 0.1, 0, 100)
    assert not updates.due(90)
    assert density(50) > density(90) > density(100) == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Updates(0, 10), "`method.update_interval` = 0"),
        (lambda: Updates(-5, 10), "`method.update_interval` = -5"),
        (lambda: Updates(10, -1), "`method.end_step` = -1"),
        (lambda: Anneal(1.0, 10, "constant"), "`method.zeta` = 1.0"),
        (lambda: Anneal(-0.1, 10, "constant"), "`method.zeta` = -0.1"),
        (lambda: Anneal(0.1, 10, "step"), "`method.zeta_schedule` = step: unknown; known: constant, cosine"),
        (lambda: Temperature(-1, 9, 10, "delta"), "`method.temperature_start` = -1"),
        (lambda: Temperature(1, math.inf, 10, "delta"), "`method.temperature_end` = inf"),
        (lambda: Temperature(1, 9, 10, "log"), "`method.interpolate` = log"),
        (
            lambda: Density("step", 0.5, 0.1, 0, 10),
            "`method.density` = step: unknown; known: constant, ",
        ),
        (lambda: Density("constant", 0.1, 0.0, 0, 10), "`method.sparsity` = 1"),
        (lambda: Density("sigmoid", 1.5, 0.1, 0, 10), "`method.start_sparsity` = -0.5"),
        (lambda: Density("sigmoid", 0.1, 0.5, 0, 10), "`method.start_sparsity` = 0.9 is above .* = 0.5"),
        (lambda: Density("sigmoid", 0.5, 0.1, 0, 0), "no topology update .* `method.update_interval`"),
    ],
)
def test_bad_arguments_name_their_setting(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
