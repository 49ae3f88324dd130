"""What changes over a run: when updates happen, zeta, the temperature of soft removal, the density.

Frozen dataclasses, optimizer step in, value out: there is no state to checkpoint and none to differ between ranks.
Steps count from 1; an update at step t follows the t-th optimizer step, and step 0 is the start of the run. A new shape
of the density is a row of ``SHAPES``; one that is no curve is a class with the names of ``Density``: ``final``,
``last_step``, ``kept_by_removal`` and a call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llm_cht.errors import UserError, nearest

CURVATURE = 6.0
"""k of the sigmoid: its logistic function runs over [-k, k]"""


@dataclass(frozen=True)
class Updates:
    """Steps with removal and regrowth: interval, 2 * interval, ... up to ``end_step``."""

    interval: int
    end_step: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UserError(f"`method.update_interval` = {self.interval}: must be at least 1 optimizer step")
        _check_end("end_step", self.end_step)

    def due(self, step: int) -> bool:
        """Whether an update follows optimizer step ``step``."""
        return 0 < step <= self.end_step and step % self.interval == 0

    def index(self, step: int) -> int:
        """Number of the update at ``step``: 1, 2, ..."""
        return step // self.interval

    @property
    def count(self) -> int:
        """How many updates there are."""
        return self.index(self.end_step)

    @property
    def last_due(self) -> int:
        """Step of the last update; 0: there is none."""
        return self.interval * self.count


@dataclass(frozen=True)
class Anneal:
    """zeta, the fraction of links removed: constant, or falling as half a cosine to 0 at ``end_step``."""

    start: float
    end_step: int
    shape: str
    """'constant' or 'cosine'"""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(f"`method.zeta` = {self.start}: must be a fraction in [0, 1)")
        _check_end("end_step", self.end_step)
        check_name("zeta_schedule", self.shape, ("constant", "cosine"))

    def __call__(self, step: int) -> float:
        """Zeta of the update at ``step``."""
        if self.shape == "constant":
            return self.start
        return self.start * 0.5 * (1 + math.cos(math.pi * _done(step, 0, self.end_step)))


@dataclass(frozen=True)
class Temperature:
    """Exponent T of soft removal, from ``start`` at step 0 to ``end`` at ``end_step``.

    Linear in T, or in delta where T = delta / (1 - delta): the papers and the authors' code disagree.
    """

    start: float
    end: float
    end_step: int
    interpolate: str
    """'temperature' or 'delta'"""

    def __post_init__(self) -> None:
        for key, value in (("temperature_start", self.start), ("temperature_end", self.end)):
            if not 0 <= value < math.inf:
                raise UserError(f"`method.{key}` = {value}: must be finite and not negative; 0 removes at random")
        _check_end("end_step", self.end_step)
        check_name("interpolate", self.interpolate, ("temperature", "delta"))

    def __call__(self, step: int) -> float:
        """T of the update at ``step``."""
        done = _done(step, 0, self.end_step)
        if self.interpolate == "temperature":
            return _mix(self.start, self.end, done)
        delta = _mix(self.start / (1 + self.start), self.end / (1 + self.end), done)
        return delta / (1 - delta)


def _sigmoid(done: float) -> float:
    """Logistic function of k (2u - 1), mapped so that it runs from exactly 0 to exactly 1 (002 eq. 4, sign mended)."""
    return 0.5 + 0.5 * math.tanh(CURVATURE * (done - 0.5)) / math.tanh(CURVATURE / 2)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: done,
    "cubic": lambda done: 1 - (1 - done) ** 3,  # GMP, GraNet; 002 eq. 9
    "sigmoid": _sigmoid,
}
"""fraction of the window done -> fraction of the way from the start density to the final one"""


@dataclass(frozen=True)
class Density:
    """Density over all sparse layers, from ``start`` to exactly ``final`` over a window of steps.

    Independent of ``Updates``: a window past their end goes on pruning. Make the window with ``density_window``.
    """

    kind: str
    """a name in ``SHAPES``; 'constant' is ``final`` throughout"""
    start: float
    final: float
    start_step: int
    end_step: int
    """multiple of the update interval, or the last update would stop short of ``final``"""

    def __post_init__(self) -> None:
        check_name("density", self.kind, tuple(SHAPES))
        for key, density in (("start_sparsity", self.start), ("sparsity", self.final)):
            if not 0 < density <= 1:
                raise UserError(f"`method.{key}` = {1 - density:g}: must be a fraction in [0, 1)")
        if self.kind == "constant":
            return
        if self.start < self.final:
            raise UserError(
                f"`method.start_sparsity` = {1 - self.start:g} is above `method.sparsity` = {1 - self.final:g}, but "
                "density only decays; lower it, or set `method.density: constant`"
            )
        if self.end_step <= self.start_step:
            raise UserError(
                f"`method.density` = {self.kind}: no topology update falls into its window (step {self.start_step} to "
                f"{self.end_step}); lower `method.update_interval` or `method.density_start_step`, raise "
                "`method.density_end_step`, or set `method.half_window: false`"
            )

    @property
    def last_step(self) -> int:
        """Step of the last change; 0: there is none."""
        return 0 if self.kind == "constant" else self.end_step

    def __call__(self, step: int) -> float:
        """Density in force after the update at ``step``; 0 gives that of the start."""
        return _mix(self.start, self.final, SHAPES[self.kind](_done(step, self.start_step, self.end_step)))

    def kept_by_removal(self, step: int) -> float | None:
        """None: zeta says how much removal takes."""
        return None


@dataclass(frozen=True)
class Stages:
    """MEST's Elastic Mutation and Shrink: removal goes down to ``final``, regrowth up to a surplus above it.

    The surplus is 0.05 until 0.6 of the window, 0.025 until one interval before its end, then 0 (constants of the
    authors' code; 002 names the two stages only). Density then shrinks by removal alone, and zeta has no say.
    """

    final: float
    start_step: int
    end_step: int
    interval: int

    def __post_init__(self) -> None:
        if not 0 < self.final <= 1 - _SURPLUS:
            raise UserError(
                f"`method.sparsity` = {1 - self.final:g}: `method.density: em_s` starts at {_SURPLUS} more links, so "
                f"it must lie in [{_SURPLUS}, 1)"
            )
        if self.end_step <= self.start_step:
            raise UserError(
                f"`method.density` = em_s: no topology update falls into its window (step {self.start_step} to "
                f"{self.end_step}); lower `method.update_interval` or raise `method.density_end_step`"
            )

    @property
    def last_step(self) -> int:
        """As ``Density.last_step``."""
        return self.end_step

    def __call__(self, step: int) -> float:
        """As ``Density``."""
        if step > 0 and step >= self.end_step - self.interval:
            return self.final
        return self.final + (_SURPLUS if _done(step, self.start_step, self.end_step) < 0.6 else _SURPLUS / 2)

    def kept_by_removal(self, step: int) -> float | None:
        """Density that removal leaves at the update of ``step``."""
        return self.final


_SURPLUS = 0.05


@dataclass(frozen=True)
class StepTable:
    """Density by a table: each value holds from its step on."""

    steps: tuple[tuple[int, float], ...]
    """(step, density), steps ascending from 0, densities falling"""
    interval: int

    def __post_init__(self) -> None:
        key = "`method.density_table`"
        if not self.steps or self.steps[0][0] != 0:
            raise UserError(f"{key}: has no sparsity for step 0; add `0: SPARSITY`, that of the first topology")
        for step, density in self.steps:
            if not 0 < density <= 1:
                raise UserError(f"{key}: sparsity {1 - density:g} at step {step} must be a fraction in [0, 1)")
            if step % self.interval:
                raise UserError(
                    f"{key}: step {step} is no multiple of `method.update_interval` = {self.interval}; no topology "
                    "update falls on it"
                )
        for (_, before), (step, after) in itertools.pairwise(self.steps):
            if after > before:
                raise UserError(
                    f"{key}: holds sparsities, which only rise: that of step {step} falls to {1 - after:g}; correct it"
                )

    @property
    def final(self) -> float:
        """Density at the end."""
        return self.steps[-1][1]

    @property
    def last_step(self) -> int:
        """As ``Density.last_step``."""
        return self.steps[-1][0]

    def __call__(self, step: int) -> float:
        """As ``Density``."""
        return next(density for start, density in reversed(self.steps) if start <= step)

    def kept_by_removal(self, step: int) -> float | None:
        """As ``Density.kept_by_removal``."""
        return None


AnyDensity = Density | Stages | StepTable


def density_window(start_step: int, end_step: int, interval: int, half: bool) -> tuple[int, int]:
    """First and last step of a decaying density.

    The end is rounded down to an update, so that the last one in the window reaches the final density. ``half`` halves
    the window first: then the sigmoid costs as many FLOPs as the cubic over all of it (002 App. I).
    """
    if half:
        end_step = start_step + (end_step - start_step) // 2
    return start_step, end_step // interval * interval


def _done(step: int, start: int, end: int) -> float:
    """Fraction of the window from ``start`` to ``end`` that is over at ``step``, in [0, 1]."""
    if step >= end:
        return 1.0
    return max(0, step - start) / (end - start)


def _mix(first: float, last: float, share: float) -> float:
    """From ``first`` (share 0) to ``last`` (share 1), both exactly."""
    return (1 - share) * first + share * last


def _check_end(key: str, step: int) -> None:
    if step < 0:
        raise UserError(f"`method.{key}` = {step}: must not be negative; 0 means no updates")


def check_name(key: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among ``known``."""
    if name not in known:
        raise UserError(f"`method.{key}` = {name}: unknown; {nearest(name, known)}")
