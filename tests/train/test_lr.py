"""Learning rate: hand values of every schedule, both re-warm-ups, and what is refused."""

import math

import pytest

from llm_cht.errors import UserError
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings
from llm_cht.train.lr import LrSettings, base_factor, check, rewarm_factor


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # warm-up over steps 1 to 4, 8 steps left; factors at steps 1, 4, 6, 8, 10, 12
        ({"schedule": "constant"}, [0.25, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "final_fraction": 0.2}, [0.25, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "final_fraction": 0}, [0.25, 1, 0.75, 0.5, 0.25, 0]),
        (
            {"schedule": "cosine", "final_fraction": 0.1},
            [0.25, 1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1],
        ),
        (
            {"schedule": "noam"},
            [0.25, 1, math.sqrt(4 / 6), math.sqrt(1 / 2), math.sqrt(0.4), math.sqrt(1 / 3)],
        ),
        ({"schedule": "wsd", "decay_steps": 4, "final_fraction": 0.1}, [0.25, 1, 1, 1, 0.55, 0.1]),
        ({"schedule": "wsd", "decay_steps": 8, "final_fraction": 0}, [0.25, 1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_base_by_hand(settings: dict, expected: list[float]):
    lr = LrSettings(warmup_steps=4, **settings)
    check(lr, 12)
    assert [base_factor(lr, step, 12) for step in (1, 4, 6, 8, 10, 12)] == pytest.approx(expected)


def test_noam_is_the_smaller_of_its_two_branches():
    lr = LrSettings("noam", warmup_steps=10)
    for step in range(1, 101):
        assert base_factor(lr, step, 100) == pytest.approx(min(step / 10, math.sqrt(10 / step)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_ends_are_exact_and_the_peak_comes_once_without_warmup(schedule: str):
    lr = LrSettings(schedule, warmup_steps=0, final_fraction=0.1)
    factors = [base_factor(lr, step, 50) for step in range(1, 51)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == 0.1
    assert base_factor(LrSettings(schedule, warmup_steps=50), 50, 50) == 1


def test_null_is_a_tenth_of_the_run():
    lr = LrSettings("wsd", final_fraction=0)
    check(lr, 100)
    assert [base_factor(lr, step, 100) for step in (1, 10, 90, 91, 99, 100)] == pytest.approx([0.1, 1, 1, 0.9, 0.1, 0])
    short = LrSettings("wsd")
    check(short, 5)
    assert [base_factor(short, step, 5) for step in (1, 4, 5)] == pytest.approx([1, 1, 0.1])


def test_rewarm_counts_from_the_last_update():
    lr = LrSettings(rewarm_steps=4)
    assert [rewarm_factor(lr, step, None, 10) for step in (1, 10)] == [1, 1]
    # after the optimizer step 10 came an update; step 11 is the first with the new links
    assert [rewarm_factor(lr, step, 10, 10) for step in (11, 12, 13, 14, 15, 20)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_rewarm_as_in_the_authors_code_is_zero_at_the_update_and_slows_the_start():
    lr = LrSettings(rewarm="mod", rewarm_steps=4)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0, 0.25]
    assert [rewarm_factor(lr, step, None, 10) for step in range(1, 12)] == expected
    assert rewarm_factor(lr, 3, None, None) == 1


def test_rewarm_can_be_off():
    assert rewarm_factor(LrSettings(rewarm="off"), 11, 10, 10) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 101}, r"`lr.warmup_steps` = 101: .* 100 steps"),
        ({"warmup_steps": -1}, r"`lr.warmup_steps` = -1"),
        ({"schedule": "noam", "warmup_steps": 0}, r"`lr.warmup_steps` = 0: `lr.schedule: noam`"),
        ({"final_fraction": 1.5}, r"`lr.final_fraction` = 1.5"),
        ({"final_fraction": math.nan}, r"`lr.final_fraction` = nan"),
        ({"rewarm_steps": 0}, r"`lr.rewarm_steps` = 0"),
        ({"decay_steps": 10}, r"`lr.decay_steps` = 10 belongs to `lr.schedule: wsd`, not to cosine"),
        ({"schedule": "wsd", "decay_steps": 0}, r"`lr.decay_steps` = 0"),
        ({"schedule": "wsd", "warmup_steps": 60, "decay_steps": 41}, r"`lr.decay_steps` = 41: .* 40 steps"),
        ({"schedule": "wsd", "warmup_steps": 100}, r"`lr.decay_steps` = 10: .* 0 steps"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        check(LrSettings(**settings), 100)


def test_whole_run_as_warmup_and_whole_rest_as_decay_are_allowed():
    check(LrSettings(warmup_steps=100), 100)
    check(LrSettings("wsd", warmup_steps=60, decay_steps=40), 100)


INOAM = {  # d_model 512, warm-up 1000, updates after steps 100, 200, ..., 3700 (end_step 3750), 20 steps of re-warm-up
    1: 1 * 1000**-1.5,
    20: 20 * 1000**-1.5,
    99: 99 * 1000**-1.5,
    100: 100 * 1000**-1.5,  # the update follows this step
    101: 101 * 1000**-1.5 * 1 / 20,
    110: 110 * 1000**-1.5 * 10 / 20,
    119: 119 * 1000**-1.5 * 19 / 20,
    120: 120 * 1000**-1.5,
    1000: 1000**-0.5,
    1001: 1001**-0.5 * 1 / 20,
    1050: 1050**-0.5,
    3701: 3701**-0.5 * 1 / 20,
    3720: 3720**-0.5,
    3801: 3801**-0.5,  # after end_step there is no update
    5000: 5000**-0.5,
}


@pytest.mark.parametrize("step", INOAM)
def test_inoam_by_hand(step):
    settings = LrSettings(schedule="inoam", warmup_steps=1000)
    updates = resolve(MethodSettings("chts"), 5000, "translation").updates
    last_update = max((earlier for earlier in range(1, step) if updates.due(earlier)), default=None)
    factor = base_factor(settings, step, 5000, width=512) * rewarm_factor(settings, step, last_update, 100)
    assert factor == pytest.approx(512**-0.5 * INOAM[step], rel=1e-12)


def test_inoam_peaks_at_the_inverse_root_of_width_and_warm_up():
    settings = LrSettings(schedule="inoam", warmup_steps=400)
    values = [base_factor(settings, step, 2000, width=256) for step in range(1, 2001)]
    assert max(values) == values[399] == pytest.approx((256 * 400) ** -0.5)
