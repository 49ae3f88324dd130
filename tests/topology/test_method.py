"""Presets and overrides resolved against a run: what is filled in, and what is refused."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from llm_cht.errors import UserError
from llm_cht.topology import settings
from llm_cht.topology.checks import without_effect
from llm_cht.topology.initial import STARTS
from llm_cht.topology.link import PREDICTORS
from llm_cht.topology.method import resolve
from llm_cht.topology.presets import PRESETS, SOURCES
from llm_cht.topology.schedule import SHAPES
from llm_cht.topology.score import SCORES
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.weights import WEIGHTS


def test_due_steps():
    method = resolve(MethodSettings(preset="chts", update_interval=100), total_steps=1000)
    assert [step for step in range(1001) if method.due(step)] == [100, 200, 300, 400, 500, 600, 700]
    assert not any(resolve(MethodSettings(preset="static", update_interval=1), 50).due(step) for step in range(51))


def test_the_last_density_is_exactly_the_target():
    for total in (366, 1000, 999):
        method = resolve(MethodSettings(preset="chtss", sparsity=0.9, update_interval=20), total)
        assert method.density(0) == 0.5
        assert method.density(total) == 0.1


def test_every_preset_sets_every_open_field():
    open_fields = {f.name for f in fields(MethodSettings) if f.default is None}
    open_fields -= {"end_step", "density_end_step", "initial_path"}
    assert PRESETS.keys() == SOURCES.keys()
    for row in PRESETS.values():
        assert set(row) == open_fields


def test_dense_refuses_settings_of_a_topology():
    message = (
        r"`method.sparsity` = 0.5, `method.zeta` = 0.2, `method.regrowth` = 'ch2_l3n': the preset dense has no top"
    )
    with pytest.raises(UserError, match=message):
        resolve(MethodSettings("dense", sparsity=0.5, zeta=0.2, regrowth="ch2_l3n"), 100)


def test_dense_takes_what_it_resolves_to_and_what_only_says_when():
    dense = resolve(MethodSettings("dense", update_interval=20, end_step=50, workspace_mb=64), 100)
    assert (dense.settings.sparsity, dense.density(0)) == (0.0, 1.0)
    assert not any(dense.due(step) for step in range(101))
    assert resolve(dense.settings, 100) == dense


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sparsity": 1.0}, r"`method.sparsity` = 1.0: .*\[0, 1\)"),
        ({"sparsity": -0.1}, r"`method.sparsity` = -0.1"),
        ({"sparsity": math.nan}, r"`method.sparsity` = nan"),
        ({"zeta": 1.5}, r"`method.zeta` = 1.5"),
        ({"update_interval": 0}, r"`method.update_interval` = 0: .*at least 1"),
        ({"end_step": 101}, r"`method.end_step` = 101: .*run of 100 steps"),
        ({"density_end_step": 200}, r"`method.density_end_step` = 200"),
        ({"brf_r": 1.1}, r"`method.brf_r` = 1.1"),
        ({"sparsity": 0.4}, r"`method.start_sparsity` = 0.5: .*`method.sparsity` = 0.4"),
        ({"workspace_mb": 0}, r"`method.workspace_mb` = 0"),
        ({"temperature_end": -1.0}, r"temperature_end"),
        ({"preset": "rgl"}, "`method.preset` = rgl: unknown; did you mean `rigl`"),
        ({"regrowth": "ch3l3p"}, "`method.regrowth` = ch3l3p: unknown; did you mean `ch3_l3p`"),
        ({"regrowth_from": {20: "grad"}}, "`method.regrowth_from` = grad: unknown; did you mean `gradient`"),
        ({"removal": "xyz"}, "`method.removal` = xyz: unknown; known: magnitude, "),
        ({"initial": "brff"}, "`method.initial` = brff: unknown; did you mean `brf`"),
        ({"initial_weight": "swl"}, "`method.initial_weight` = swl: unknown; did you mean `swi`"),
        ({"density": "cubik"}, "`method.density` = cubik: unknown; did you mean `cubic`"),
        ({"pruning": "mest"}, "`method.pruning` = mest: unknown"),
        ({"preset": "set", "early_stop": 1.5}, r"`method.early_stop` = 1.5: must lie in \[0, 1\]"),
        ({"preset": "mest", "zeta": 0.1}, r"`method.zeta` = 0.1: .*em_s"),
        ({"preset": "mest", "zeta_schedule": "cosine"}, r"`method.zeta_schedule` = cosine: .*em_s"),
        ({"preset": "mest", "density_end_step": 50}, r"`method.density_end_step` = 50: .*em_s"),
        ({"preset": "mest", "early_stop": 0.9}, r"`method.early_stop` = 0.9: .*shrink"),
        ({"preset": "mest", "sparsity": 0.02}, r"`method.sparsity` = 0.02: .*0.05 more links"),
        ({"preset": "chts", "removal": "two_sided"}, r"`method.removal` = two_sided: ranks links"),
        ({"preset": "chts", "ties": "subrank"}, r"`method.ties` = subrank: needs `method.regrowth_choice: hard`"),
        ({"preset": "set", "ties": "subrank"}, r"`method.ties` = subrank: .*ch2_l3n"),
        ({"preset": "set", "pruning_scope": "global"}, r"`method.pruning_scope` = global: nothing is pruned"),
        ({"preset": "gmp", "new_weight": "zero"}, r"`method.new_weight` = zero: .*remembered"),
        ({"preset": "gmp", "density_table": {0: 0.5}}, r"`method.density_table` = \{0: 0.5\}: goes together"),
        ({"preset": "gmp", "density": "table"}, r"`method.density_table` = \{\}: goes together"),
        ({"preset": "gmp", "density": "table", "density_table": {5: 0.5}}, "has no sparsity for step 0"),
        ({"preset": "gmp", "density": "table", "density_table": {0: 0.5, 15: 0.9}}, "step 15 is no multiple of"),
        ({"preset": "gmp", "density": "table", "density_table": {0: 0.5, 20: 0.4}}, "that of step 20 falls to 0.4"),
        ({"preset": "gmp", "density": "table", "density_table": {0: 0.5, 20: 1.0}}, "sparsity 1 at step 20"),
        (
            {"preset": "gmp", "density": "table", "density_table": {0: 0.5, 200: 0.9}},
            "step 200 .*beyond the run of 100",
        ),
        ({"preset": "set", "regrowth_from": {0: "gradient"}}, r"`method.regrowth_from` = .*at least 1"),
        ({"preset": "set", "regrowth_from": {300: "gradient"}}, "the last regrowth is at step 70; lower 300"),
        ({"preset": "set", "initial": "file"}, "`method.initial_path` = None: goes together"),
        ({"preset": "static", "regrowth_from": {30: "gradient"}}, "nothing is regrown at `method.zeta` = 0"),
        ({"preset": "mest", "half_window": True}, "`method.half_window` = True: em_s needs the window"),
        ({"preset": "set", "end_step": 5}, "`method.update_interval` = 10: no topology update falls into the steps up"),
        ({"preset": "set", "budget": "kept"}, "`method.budget` = kept: keeps the counts of `method.initial: file`"),
        (
            {"preset": "set", "sparsity": 0.7, "density": "table", "density_table": {0: 0.5, 20: 0.9}},
            "`method.sparsity` = 0.7: `method.density_table` ends at 0.9",
        ),
        ({"preset": "set", "dead_heads": True}, "`method.dead_heads` = True: is a part of percolation"),
        ({"preset": "set", "update_interval": 80}, r"`method.update_interval` = 80: no topology update falls"),
    ],
)
def test_settings_that_cannot_work(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve(MethodSettings(**({"preset": "chtss", "update_interval": 10} | overrides)), total_steps=100)


def test_mixed_regrowth_changes_its_rule_at_a_step():
    method = resolve(MethodSettings("set", update_interval=10, regrowth_from={30: "gradient", 50: "ch2_l3n"}), 100)
    assert [method.regrowth(step) for step in (10, 20, 30, 40, 50, 70)] == [
        *("random", "random", "gradient", "gradient", "ch2_l3n", "ch2_l3n")
    ]
    assert [step for step in range(1, 101) if method.needs_gradient(step)] == [30, 40]
    assert not method.needs_momentum(30)


def test_gradients_are_asked_for_where_they_are_used():
    rigl = resolve(MethodSettings("rigl", update_interval=10), 100)
    assert [step for step in range(1, 101) if rigl.needs_gradient(step)] == [10, 20, 30, 40, 50, 60, 70]
    mest = resolve(MethodSettings("mest", update_interval=10), 100)
    assert [step for step in range(1, 101) if mest.needs_gradient(step)] == [10, 20, 30, 40, 50, 60, 70]
    late = MethodSettings("snfs", update_interval=10, regrowth_from={30: "random"}, density="cubic", end_step=50)
    assert not resolve(late, 100).needs_momentum(21)
    assert resolve(late, 100).needs_momentum(20)
    snfs = resolve(MethodSettings("snfs", update_interval=10), 100)
    assert not any(snfs.needs_gradient(step) for step in range(1, 101))
    assert [step for step in range(1, 101) if snfs.needs_momentum(step)] == list(range(1, 71))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_method_resolves_to_itself(preset):
    method = resolve(MethodSettings(preset, update_interval=10), 100)
    assert resolve(method.settings, 100) == method


def test_targets_of_the_stages_of_mest():
    method = resolve(MethodSettings("mest", sparsity=0.9, update_interval=10, end_step=100), 200)
    shapes = {"a": (100, 100), "b": (10, 20)}
    assert method.targets(shapes, 0)["a"].links == 1500
    for step, links in {10: 1500, 50: 1500, 60: 1250, 80: 1250, 90: 1000, 100: 1000}.items():
        targets = method.targets(shapes, step)
        assert (targets["a"].links, targets["a"].kept) == (links, 1000)
        assert (targets["b"].links, targets["b"].kept) == (links // 50, 20)


def test_the_help_of_a_setting_names_all_its_rules():
    text = Path(settings.__file__).read_text()
    for names in (PRESETS, STARTS, WEIGHTS, SCORES, PREDICTORS, SHAPES):
        for name in names:
            assert re.search(rf"\b{name}\b", text), name


def test_presets_of_translation_differ_where_the_papers_do():
    for name, zeta in (("set", 0.3), ("chts", 0.3), ("gmp", 0.0), ("mest", 0.0), ("dense", 0.0)):
        assert resolve(MethodSettings(name), 1000, "translation").settings.zeta == zeta
    chts = resolve(MethodSettings("chts"), 1000, "translation")
    assert (chts.settings.brf_r, chts.settings.temperature_start, chts.settings.temperature_end) == (0.25, 1.0, 3.0)
    assert resolve(MethodSettings("chts", zeta=0.2), 1000, "translation").settings.zeta == 0.2
    assert resolve(chts.settings, 1000, "translation") == chts
    assert without_effect(resolve(MethodSettings("static"), 1000, "translation").settings) == []
