"""The one update that all presets run: exact counts, what may change, and that a preset is only data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.errors import UserError
from llm_cht.topology.budget import num_links
from llm_cht.topology.initial import Given, InitialOptions, er
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import PREDICTORS
from llm_cht.topology.method import resolve
from llm_cht.topology.percolate import Group, Mlp
from llm_cht.topology.score import SCORES
from llm_cht.topology.settings import MethodSettings
from llm_cht.topology.update import Inputs, Moment, active_neurons, update_group

OPTIONS = InitialOptions(0.2, "fixed")
GROUP = Group("mlp", ("gate", "up", "down"), (Mlp(("gate", "up"), "down"),))


def evolve(method, weights, masks, moment: Moment, **more):
    """One update of the gated MLP."""
    targets = method.targets({name: tuple(mask.shape) for name, mask in masks.items()}, moment.step)
    return update_group(method, GROUP, Inputs(weights, masks, targets, **more), moment)


def start(method, hidden=40, width=24, seed=0):
    """First masks and weights of a gated MLP."""
    shapes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    targets = method.targets(shapes, 0)
    masks = {
        name: er(shape, targets[name].links, Keys(seed, 0, name), OPTIONS, Given()) for name, shape in shapes.items()
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * masks[name] for name, shape in shapes.items()}
    return weights, masks


def run(preset: str, updates: int = 6, **overrides):
    """Masks and changes of some updates on weights that are drawn anew after each."""
    chosen = MethodSettings(preset=preset, update_interval=10, **overrides)
    method = resolve(chosen, total_steps=100)
    weights, masks = start(method)
    for update in range(1, updates + 1):
        changes = evolve(method, weights, masks, Moment(10 * update, update, 7))
        yield method, weights, masks, changes, 10 * update
        masks = {name: change.mask for name, change in changes.items()}
        weights = {name: torch.randn(mask.shape) * mask for name, mask in masks.items()}


@pytest.mark.parametrize("preset", ["set", "chts", "chtss"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_counts_are_exact_at_every_update(preset, sparsity):
    for method, _, masks, changes, step in run(preset, sparsity=sparsity):
        for name, change in changes.items():
            links = int(masks[name].sum())
            target = num_links(change.mask.shape, method.density(step))
            assert int(change.mask.sum()) == target
            assert change.pruned == links - target
            assert change.removed == math.floor(method.zeta(step) * target)
            assert change.regrown == change.removed + change.percolated
            assert 0 <= change.returned <= change.regrown


def test_inputs_are_not_touched():
    for _, weights, masks, _, _ in run("chtss", updates=1):
        copies = {name: (weights[name].clone(), masks[name].clone()) for name in masks}
        method = resolve(MethodSettings(preset="chtss", update_interval=10), 100)
        evolve(method, weights, masks, Moment(10, 1, 7))
        for name, (weight, mask) in copies.items():
            assert torch.equal(weight, weights[name])
            assert torch.equal(mask, masks[name])


def test_same_inputs_same_masks_and_another_seed_or_update_others():
    method = resolve(MethodSettings(preset="chts", update_interval=10), 100)
    weights, masks = start(method)

    def after(update: int, seed: int):
        changes = evolve(method, weights, masks, Moment(10, update, seed))
        return torch.cat([change.mask.flatten() for change in changes.values()])

    assert torch.equal(after(1, 0), after(1, 0))
    assert not torch.equal(after(1, 0), after(2, 0))
    assert not torch.equal(after(1, 0), after(1, 1))


def test_hard_magnitude_removal_takes_the_smallest():
    method = resolve(MethodSettings(preset="set", update_interval=10, zeta=0.25), 100)
    weights, masks = start(method)
    changes = evolve(method, weights, masks, Moment(10, 1, 0))
    for name, change in changes.items():
        links = weights[name][masks[name]].abs().sort().values
        limit = links[change.removed - 1]
        gone = masks[name] & ~change.mask
        assert (weights[name][gone].abs() <= limit).all()


def test_soft_and_hard_choices_differ():
    variants = {}
    for removal in ("hard", "soft"):
        for regrowth in ("hard", "soft"):
            rows = run("chts", updates=1, removal_choice=removal, regrowth_choice=regrowth)
            variants[removal, regrowth] = next(rows)[3]["gate"].mask
    masks = list(variants.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_past_end_step_a_density_window_only_prunes():
    chosen = MethodSettings(preset="chtss", update_interval=10, end_step=20, density_end_step=80, half_window=False)
    method = resolve(chosen, total_steps=100)
    weights, masks = start(method)
    changes = evolve(method, weights, masks, Moment(50, 5, 7))
    for name, change in changes.items():
        assert change.removed == change.percolated == change.regrown == 0
        assert change.pruned > 0
        assert not (change.mask & ~masks[name]).any()
    assert [step for step in range(101) if method.due(step)] == list(range(10, 81, 10))


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.integers(4, 30),
    width=st.integers(4, 30),
    sparsity=st.floats(0.1, 0.93),
    zeta=st.floats(0.01, 0.9),
    preset=st.sampled_from(["set", "chts", "chtss"]),
)
def test_invariants_over_shapes_and_densities(hidden, width, sparsity, zeta, preset):
    chosen = MethodSettings(preset=preset, sparsity=sparsity, start_sparsity=0.05, zeta=zeta, update_interval=10)
    method = resolve(chosen, total_steps=100)
    weights, masks = start(method, hidden, width)
    changes = evolve(method, weights, masks, Moment(10, 1, 3))
    for name, change in changes.items():
        assert int(change.mask.sum()) == num_links(change.mask.shape, method.density(10))
        assert int((masks[name] & ~change.mask).sum()) <= change.pruned + change.removed + change.percolated
    active, total = active_neurons(method, GROUP, {n: c.mask for n, c in changes.items()}, frozenset())
    assert 0 <= active <= total == hidden


def _broken_at(score, position):
    def rule(*inputs):
        mask = inputs[0] if inputs[0].dtype == torch.bool else inputs[1]
        result = torch.where(mask, 0.0, 1.0) if mask is inputs[0] else torch.ones(mask.shape)
        result[tuple(torch.nonzero(mask == position)[0])] = score
        return result

    return rule


RULES = {
    "score on a link": ("regrowth", _broken_at(1.0, True), "is not 0 on 1 existing links"),
    "negative": ("regrowth", _broken_at(-1.0, False), "runs from -1 to 1, not from 0"),
    "infinite": ("regrowth", _broken_at(math.inf, False), "runs from 0 to inf"),
    "NaN": ("regrowth", _broken_at(math.nan, False), "runs from nan to nan"),
    "shape": ("regrowth", lambda mask, *_: torch.zeros(mask.numel()), r"has shape \(960,\) .*, not \(40, 24\)"),
    "type": ("regrowth", lambda mask, *_: ~mask, r"has shape \(40, 24\) and torch.bool, not .* a float type"),
    "negative removal score": ("removal", _broken_at(-2.0, True), "runs from -2 to 1"),
    "removal score NaN": ("removal", _broken_at(math.nan, True), "runs from nan to nan"),
    "pruning score infinite": ("pruning", _broken_at(math.inf, True), "runs from 1 to inf"),
    "removal shape": ("removal", lambda weight, *_: weight.abs().T, r"has shape \(24, 40\) .*, not \(40, 24\)"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_that_breaks_its_contract_is_named(case, monkeypatch):
    kind, rule, fault = RULES[case]
    monkeypatch.setitem(PREDICTORS if kind == "regrowth" else SCORES, "mine", rule)
    with pytest.raises(UserError, match=rf"`method.{kind}` = mine: its score of `gate` {fault}.*; correct"):
        next(run("chtss", updates=1, **{kind: "mine"}))


def test_a_removal_score_may_be_anything_where_there_is_no_link(monkeypatch):
    monkeypatch.setitem(SCORES, "mine", _broken_at(math.nan, False))
    next(run("chtss", updates=1, removal="mine", pruning="mine"))
