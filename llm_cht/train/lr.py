"""The learning rate over time: a factor of the peak ``optimizer.lr``, times the re-warm-up after topology updates.

Pure functions of the step, so nothing is checkpointed. Steps count from 1. Rejected: torch's schedulers, whose state
goes out of step with skipped optimizer steps and which know no topology updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from llm_cht.errors import UserError


@dataclass
class LrSettings:
    """The learning rate over time."""

    schedule: Literal["cosine", "linear", "noam", "inoam", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine, a line, sqrt(warmup / step), a plateau with a line at the end, or nothing.
    inoam is noam as the Transformer's authors scale it: `optimizer.lr` times the inverse root of the model's width and
    of the step, so that its peak is lr / sqrt(width * warmup)."""
    warmup_steps: int | None = None
    """Steps in which it rises linearly to its peak; null: a tenth of the run."""
    final_fraction: float = 0.1
    """cosine, linear and wsd end at this fraction of the peak."""
    decay_steps: int | None = None
    """Steps of the falling line of wsd; null: a tenth of the run."""
    rewarm: Literal["since_update", "mod", "off"] = "since_update"
    """Rise from 0 again after each topology update; mod: after each multiple of update_interval, as in 002's code."""
    rewarm_steps: int = 20
    """Steps of such a rise."""


def resolved(settings: LrSettings, total_steps: int) -> LrSettings:
    """The settings with the lengths filled in that a run of ``total_steps`` optimizer steps decides."""
    decay = _decay_steps(settings, total_steps) if settings.schedule == "wsd" else None
    return replace(settings, warmup_steps=_warmup_steps(settings, total_steps), decay_steps=decay)


def base_factor(settings: LrSettings, step: int, total_steps: int, width: int | None = None) -> float:
    """Factor of ``optimizer.lr`` at optimizer step ``step`` (1, 2, ..., ``total_steps``), without the re-warm-up.

    ``width`` is the size of the residual stream (d_model), which ``inoam`` needs: width^-0.5 *
    min(step^-0.5, step * warmup^-1.5) (Vaswani et al. 2017, eq. 3).
    """
    warmup = _warmup_steps(settings, total_steps)
    if settings.schedule == "inoam":
        assert width is not None
        return width**-0.5 * min(step**-0.5, step * warmup**-1.5)
    if step <= warmup:
        return step / warmup
    last = settings.final_fraction
    done = (step - warmup) / (total_steps - warmup)
    match settings.schedule:
        case "cosine":
            return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return last + (1 - last) * (1 - done)
        case "noam":
            return math.sqrt(warmup / step)
        case "wsd":
            left = (total_steps - step) / _decay_steps(settings, total_steps)
            return last + (1 - last) * min(1.0, left)
        case "constant":
            return 1.0


def rewarm_factor(settings: LrSettings, step: int, last_update: int | None, update_interval: int | None) -> float:
    """Further factor, which rises linearly from 0 to 1 after a topology update (002: iterative warm-up).

    Args:
        settings: rule and length of the rise.
        step: optimizer step (1, 2, ...).
        last_update: step that the latest topology update followed; None before the first one.
        update_interval: steps between updates, for ``mod``; None where there are none.
    """
    if settings.rewarm == "mod" and update_interval is not None:
        return min(1.0, step % update_interval / settings.rewarm_steps)
    if settings.rewarm == "since_update" and last_update is not None:
        return min(1.0, (step - last_update) / settings.rewarm_steps)
    return 1.0


def check(settings: LrSettings, total_steps: int) -> None:
    """Refuse what cannot work in a run of ``total_steps`` optimizer steps.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    warmup = _warmup_steps(settings, total_steps)
    if not 0 <= warmup <= total_steps:
        raise UserError(f"`lr.warmup_steps` = {warmup}: must lie in the run of {total_steps} steps (`train.steps`)")
    if settings.schedule in ("noam", "inoam") and warmup == 0:
        raise UserError(f"`lr.warmup_steps` = 0: `lr.schedule: {settings.schedule}` needs at least 1")
    if not 0 <= settings.final_fraction <= 1:
        raise UserError(f"`lr.final_fraction` = {settings.final_fraction}: must be a fraction in [0, 1]")
    if settings.rewarm_steps < 1:
        raise UserError(f"`lr.rewarm_steps` = {settings.rewarm_steps}: must be at least 1; `lr.rewarm: off` has none")
    if settings.schedule != "wsd":
        if settings.decay_steps is not None:
            raise UserError(
                f"`lr.decay_steps` = {settings.decay_steps} belongs to `lr.schedule: wsd`, not to "
                f"{settings.schedule}; set it to null"
            )
        return
    decay = _decay_steps(settings, total_steps)
    if not 1 <= decay <= total_steps - warmup:
        raise UserError(
            f"`lr.decay_steps` = {decay}: must lie between 1 and the {total_steps - warmup} steps that "
            f"`train.steps` = {total_steps} leaves after `lr.warmup_steps` = {warmup}"
        )


def _warmup_steps(settings: LrSettings, total_steps: int) -> int:
    return total_steps // 10 if settings.warmup_steps is None else settings.warmup_steps


def _decay_steps(settings: LrSettings, total_steps: int) -> int:
    return max(1, total_steps // 10) if settings.decay_steps is None else settings.decay_steps
