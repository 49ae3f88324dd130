"""The training loop: one step, then what is due after it (topology update, metrics, validation, checkpoint).

The loop knows no method and no model. A topology update runs after the optimizer step of its iteration. Everything
that decides the next step is in the checkpoint, so a resumed run equals an unbroken one bit for bit on the CPU.

On many ranks each has its rows of the global batch; the main one alone writes and prints. A rank never decides by
itself whether to go on: a signal on one, a loss that is not finite on one, a full disk on one are agreed on first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from llm_cht import config, dist
from llm_cht.errors import UserError
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.files import disk_errors, new_folder
from llm_cht.sparse.folder import write_topology
from llm_cht.train import lr
from llm_cht.train.build import Built
from llm_cht.train.checkpoint import CheckpointStore
from llm_cht.train.ending import summary, write_final_model
from llm_cht.train.export import TOKENIZER, described
from llm_cht.train.metrics import Meter, MetricsLog, peak_tflops
from llm_cht.train.signals import StopSignals
from llm_cht.train.state import collect
from llm_cht.train.task import Work
from llm_cht.train.validate import Validation, validate
from llm_cht.train.watchdog import Watchdog

_LINES = 20  # of progress in a log file
_NOTHING_YET = "There is no checkpoint yet."


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    stopped_by: str | None
    """name of the signal that ended the run early; None: it ran to its end"""
    summary: dict[str, Any]
    """empty when stopped early"""
    resume: str
    """what a user types to go on"""


def resume_command(run: Path) -> str:
    """What a user types to go on."""
    program = "accelerate launch YOUR-OPTIONS launch/train.py" if dist.world_size() > 1 else "llm-cht train"
    return f"{program} {run / 'config.yaml'} --resume auto"


class Loop:
    """The loop over the parts of one run."""

    def __init__(
        self,
        built: Built,
        run: Path,
        log: MetricsLog | None,
        signals: StopSignals,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ) -> None:
        self.built, self.run, self.log, self.signals, self.watchdog, self.say = built, run, log, signals, watchdog, say
        self.settings = built.settings
        self.progress = built.parts.progress
        self.store = CheckpointStore(run / "checkpoints", self.settings.checkpoint.keep_last)
        peak = peak_tflops(built.engine.device, self.settings.metrics)
        self.meter = Meter(built.engine.device, peak, dist.world_size())
        self.density = 1.0
        self._saved: Path | None = None
        self._saved_step = -1
        self._told_step = 0

    def begin(self) -> None:
        """Write down where a fresh run starts."""
        with dist.together():
            if self.built.updater and dist.is_main():
                masks, transposed = self.built.updater.masks, self.built.updater.sparse.transposed
                needed = sum(mask.numel() for mask in masks.values()) // 8
                with disk_errors(self.run / "topology_start.safetensors", needed, _NOTHING_YET):
                    write_topology(self.run, masks, self.settings.method.preset, 0, "topology_start", transposed)
        self._record("start", self.built.start_record)
        with dist.together():
            if dist.is_main():
                with disk_errors(self.run / TOKENIZER, 0, _NOTHING_YET), new_folder(self.run / TOKENIZER) as folder:
                    self.built.task.tokenizer.save_pretrained(folder)

    def _record(self, kind: str, values: Mapping[str, Any]) -> None:
        """A line of the metrics, from the main rank; if it cannot be written the others see the main rank leave."""
        if self.log is not None:
            self.log.log(kind, self.progress.step, self.progress.tokens, values)

    def _bar(self, **options: Any) -> tqdm:
        return tqdm(dynamic_ncols=True, disable=None if dist.is_main() else True, **options)

    def _stop_requested(self) -> bool:
        """Whether any rank has a signal to stop."""
        return bool(dist.total([self.signals.requested is not None])[0])

    def run_to_end(self) -> Outcome:
        """Steps until the run is complete or a signal asks to stop."""
        total, progress, updater = self.settings.train.steps, self.progress, self.built.updater
        self.density = updater.density() if updater else 1.0
        stop = False
        with self._bar(total=total, initial=progress.step, desc="train", unit="step") as bar:
            while progress.step < total and not (stop := self._stop_requested()):
                if updater:
                    updater.watch(progress.step + 1)
                figures = self._step()
                if updater:
                    self._evolve(updater, sound=math.isfinite(figures["loss"] + figures["grad_norm"]))
                if self._is_written(progress.step):
                    self._write_train(figures, bar)
                bar.update()
                with self.meter.paused():
                    self._after_step(total, sound=math.isfinite(figures["loss"] + figures["grad_norm"]))
        if stop or self._stop_requested():
            path = self._saved if self._saved_step == progress.step else self.save()
            reason = next(signal for signal in dist.gather(self.signals.requested) if signal)
            self.say(f"{reason}: saved {path}\nresume with: {resume_command(self.run)}")
            return Outcome(self.run, reason, {}, resume_command(self.run))
        return Outcome(self.run, None, self._finish(), resume_command(self.run))

    def _evolve(self, updater: TopologyUpdater, sound: bool) -> None:
        """The topology update, where one follows this step; a skipped step (not ``sound``) has no gradient for it."""
        step = self.progress.step
        updater.learned(step, sound)
        if not updater.due(step):
            return
        blind = not sound and updater.method.needs_gradient(step)
        if blind:
            self.say(f"step {step}: no links are removed or regrown, because the skipped step has no gradient for it")
        self.watchdog.enter(step, "topology update")
        self._record("topology", updater.update(step, prune_only=blind))
        self.density = updater.density()

    def _is_written(self, step: int) -> bool:
        """Whether a step has a record; the one after an update has, so that its re-warm-up shows."""
        rewarmed = self.built.updater is not None and self.built.updater.last_update == step - 1
        return step % self.settings.metrics.every == 0 or rewarmed or step in (1, self.settings.train.steps)

    def _step(self) -> dict[str, float]:
        """One optimizer step on one global batch."""
        built, progress, settings, engine = self.built, self.progress, self.settings, self.built.engine
        step = progress.step + 1
        self.watchdog.enter(step, "step")
        work, targets = self._work(step)
        factor, rewarm = self._lr_factors(step)
        for group in built.optimizer.param_groups:
            group["lr"] = settings.optimizer.lr * factor * rewarm
        # gradients are averaged over passes and ranks: this makes the mean one over all targets of the step
        passes = len(work.parts)
        share = targets / (passes * dist.world_size())
        loss = 0.0
        for number, part in enumerate(work.parts):
            self.watchdog.enter(step, "step")
            inputs = {key: value.to(engine.device) for key, value in part.items()}
            with engine.accumulate(built.forward, last=number == passes - 1):
                with engine.autocast():
                    term = built.task.loss(built.forward, inputs, share)
                engine.backward(built.forward, term)
            loss += term.item() / passes
        loss = dist.total([loss])[0] / dist.world_size()
        norm = engine.step(built.forward, built.optimizer) if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            self._skip(step, loss, norm)
            engine.discard(built.optimizer)
        progress.step = step
        progress.tokens += targets
        progress.density_sum += self.density
        flops, dense_flops = self._flops(step, work, targets)
        progress.flops += flops
        progress.dense_flops += dense_flops
        self.meter.add(targets, dense_flops)
        return {
            "loss": loss,
            "lr": settings.optimizer.lr * factor * rewarm,
            "rewarm": rewarm,
            "grad_norm": norm,
            "flops_per_token": flops / max(1, targets),
        }

    def _work(self, step: int) -> tuple[Work, int]:
        """This rank's share of the step's batch, and the number of targets that all ranks have of it."""
        work, error = Work([], 0), None
        try:
            work = self.built.task.batch(step)
        except UserError as raised:
            error = raised
        everybody, failed = dist.total([work.targets, error is not None])
        if failed:
            with dist.together():
                if error is not None:
                    raise error
        return work, int(everybody)

    def _flops(self, step: int, work: Work, targets: int) -> tuple[float, float]:
        """Of the step and of the topology update that follows it; what the dense model would have needed."""
        updater, task = self.built.updater, self.built.task
        dense = task.flops(work, targets, 1.0, dense_gradient=False)
        if updater is None:
            return dense, dense
        method = updater.method
        dense_gradient = method.regrows_by_gradient(step) or method.needs_momentum(step)
        update = updater.flops(step) if updater.due(step) else 0.0
        return task.flops(work, targets, self.density, dense_gradient) + update, dense

    def _lr_factors(self, step: int) -> tuple[float, float]:
        updater = self.built.updater
        base = lr.base_factor(self.settings.lr, step, self.settings.train.steps, self.built.width)
        if updater is None:
            return base, 1.0
        updates = updater.method.updates
        interval = updates.interval if updates.count else None
        return base, lr.rewarm_factor(self.settings.lr, step, updater.last_update, interval)

    def _skip(self, step: int, loss: float, norm: float) -> None:
        """A loss or gradient that is not finite: count it, or stop the run; the checkpoints stay as they are."""
        train, progress = self.settings.train, self.progress
        progress.skipped += 1
        if train.on_nonfinite == "skip" and progress.skipped <= train.max_skipped:
            self.say(f"step {step} skipped: loss {loss}, gradient norm {norm}")
            return
        what = f"loss {loss}, gradient norm {norm} at step {step}"
        if train.on_nonfinite == "skip":
            raise self._not_finite(f"{what}; {train.max_skipped} were skipped (`train.max_skipped`)")
        raise self._not_finite(what, f", or skip such steps: {resume_command(self.run)} --train.on_nonfinite skip")

    def _not_finite(self, what: str, other: str = "") -> UserError:
        return dist.agreed(
            f"{what}. No checkpoint was overwritten. Start another run (`--run`) with a lower `optimizer.lr` or "
            f"`train.clip_norm`{other}"
        )

    def _write_train(self, figures: dict[str, float], bar: tqdm) -> None:
        progress = self.progress
        speed = self.meter.read()
        average = progress.density_sum / progress.step
        record = figures | speed | {"density": self.density, "average_density": average, "flops": progress.flops}
        self._record("train", record)
        shown = {"loss": f"{figures['loss']:.3f}", "lr": f"{figures['lr']:.1e}"}
        shown["tok/s"] = f"{speed['tokens_per_second']:,.0f}"
        if self.built.updater:
            shown["density"] = f"{self.density:.3f}"
        reached = progress.last_validation
        if reached and not (bar.disable and reached["step"] < self._told_step):  # a line tells what is new
            shown["val ppl"] = f"{math.exp(min(reached['loss'], 700)):.1f}"
            if "bleu" in reached:
                shown["BLEU"] = f"{reached['bleu']:.1f}"
        bar.set_postfix(shown, refresh=False)
        total = self.settings.train.steps
        if bar.disable and progress.step - self._told_step >= total / _LINES:  # no terminal: a line instead of a bar
            self._told_step = progress.step
            self.say(f"step {progress.step} of {total}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def _after_step(self, total: int, sound: bool) -> None:
        """Validation and checkpoint where they are due; the last step is left to ``_finish``.

        After a skipped step (not ``sound``) the weights may be beyond repair: it must not push out a good checkpoint.
        """
        step, settings = self.progress.step, self.settings
        if step == total:
            return
        best = False
        if settings.validation.every and step % settings.validation.every == 0:
            best = self._validate()
        due = sound and settings.checkpoint.every is not None and step % settings.checkpoint.every == 0
        if due or (best and settings.checkpoint.save_best):
            self.save(best)

    def _validate(self, everything: bool = False) -> bool:
        """Validate and write it down; returns whether it is the best so far of those on the same data."""
        progress, task = self.progress, self.built.task
        compete, everything = not (everything and task.partial), everything or not task.partial
        result = self.validation(everything)
        figures = {"loss": result.loss, "perplexity": result.perplexity, "validation_tokens": result.num_tokens}
        if math.isfinite(result.loss):
            figures |= task.measure(self.built.model, self._translating)
        progress.last_validation = figures | {"step": progress.step}
        self._record("validation", figures | {"full": everything})
        if not math.isfinite(result.loss):
            raise self._not_finite(f"validation loss {result.loss} after step {progress.step}")
        reached = figures[task.figure]
        best = progress.best is None or (reached > progress.best if task.higher else reached < progress.best)
        if best and compete:
            progress.best = reached
        return best and compete

    def validation(self, everything: bool) -> Validation:
        """Cross-entropy on the validation data, on all of it or on what is looked at while training."""
        batches = self.built.task.validation(everything)
        shown = self._bar(iterable=batches, desc="validate", unit="batch", leave=False)
        return validate(self.built.forward, self._watched(shown), self.built.engine, self.built.task)

    def _translating(self, batches: Iterable[Any]) -> Iterator[Any]:
        return self._watched(self._bar(iterable=batches, desc="translate", unit="batch", leave=False))

    def _watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self.watchdog.enter(self.progress.step, "validation")
            yield batch

    def save(self, best: bool = False) -> Path:
        """Write a checkpoint; no signal interrupts it."""
        self.watchdog.enter(self.progress.step, "save")
        tensors, values = collect(self.built.parts)
        values["model"] = described(self.built.model)
        values["settings"] = yaml.safe_load(config.dump(self.settings))
        values["data_fingerprint"] = self.built.task.fingerprint
        with self.signals.hold():
            self._saved, self._saved_step = (
                self.store.save(self.progress.step, tensors, values, best),
                self.progress.step,
            )
            return self._saved

    def _finish(self) -> dict[str, Any]:
        """Full validation, last checkpoint, the model, summary."""
        best = self._validate()
        if self.built.task.partial:
            self._validate(everything=True)
        saved, folder = self.save(best), self.run / "model"
        with self.signals.hold():
            self.watchdog.enter(self.progress.step, "export", allowance=6)
            steps = write_final_model(self.built, self.store, saved, folder)
        figures = summary(self.built, self.density, steps, folder, self._translating)
        figures["seconds"] = self.log.seconds if self.log is not None else 0.0
        figures["mask_digest"] = self.built.updater.digest() if self.built.updater else None
        self._record("end", {"summary": figures})
        return figures
