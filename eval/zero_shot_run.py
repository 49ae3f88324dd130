"""One model on one task with one seed, through lm-eval, and the jobs of many shared out over the processes of a node.

``lm_eval.evaluate`` is called with a loaded model. ``simple_evaluate`` around it adds what is not wanted here: it lists
the packages of the machine with every call, for seconds, and gives nothing where the launcher set a local rank. And a
model that lm-eval loads itself asks accelerate who it is, which shards documents on GPUs only and takes the local rank
for the rank. With a loaded one it is alone, whatever the launcher says.

Each job is evaluated by itself, so that its batches, and with them the last bits of its figures, do not depend on which
process got which jobs.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import datasets
import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import models
from eval.zero_shot_tasks import Source, classes, label_of, load
from llm_cht.errors import UserError

WHAT = "a causal language model"


class Job(NamedTuple):
    """What one process does at a time; names of model and task."""

    model: str
    task: str
    seed: int


class Model(HFLM):
    """lm-eval's model, which also refuses tokens it has no embedding for, and counts requests that it had to cut."""

    cut = 0

    def __init__(self, name: str, options: Any) -> None:
        trusted = {"trust_remote_code": options.trust_remote_code}
        try:
            tokenizer = models.load(AutoTokenizer, name, WHAT, **trusted)
            model = models.load_model(AutoModelForCausalLM, name, WHAT, options.dtype, **trusted)
        except UserError as error:
            if "trust_remote_code" not in str(error.__cause__):
                raise
            raise UserError(f"{name}: runs code of its own; read it, and trust it with --trust_remote_code") from error
        self.name, self.embeddings = name, model.get_input_embeddings().num_embeddings
        super().__init__(pretrained=model.to(options.device), tokenizer=tokenizer, batch_size=options.batch_size)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Called by lm-eval; its bars are for terminals only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """Called by lm-eval with (texts, tokens of the context, tokens of the continuation)."""
        largest = max(max([*context, *continuation]) for _, context, continuation in requests)
        models.check_vocabulary(self.name, largest, self.embeddings)
        self.cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, *args, **options)


def quiet() -> None:
    """Keep lm-eval's notes (defaults of metrics, requests that are cut) off the terminal; what matters is told here."""
    for name in ("lm_eval", "evaluate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def share(costs: Sequence[float], processes: int) -> list[int]:
    """The process of each job: the dearest first, each to the one that has least to do. The same on every process."""
    load_of, chosen = [0.0] * processes, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        chosen[job] = load_of.index(min(load_of))
        load_of[chosen[job]] += costs[job]
    return chosen


def run_jobs(
    jobs: Sequence[Job], sources: Mapping[str, Source], tasks: dict[str, Any], options: Any
) -> list[tuple[Job, dict[str, Any]]]:
    """Jobs with what lm-eval found, all JSON values. Each model is loaded once; so is each task, which joins ``tasks``.

    Raises:
        UserError: a model cannot be loaded or does not fit its tokenizer, its outputs are not finite, or a task fails.
    """
    found = []
    with tqdm(total=len(jobs), desc="evaluate", unit=" jobs", dynamic_ncols=True, disable=None) as bar:
        for name in dict.fromkeys(job.model for job in jobs):
            model = Model(name, options)
            for job in (job for job in jobs if job.model == name):
                bar.set_postfix_str(f"{job.task} {Path(name).name}")
                if job.task not in tasks:
                    tasks[job.task] = load(sources[job.task])
                found.append((job, evaluate(model, tasks[job.task], job, options)))
                bar.update()
            del model
    return found


def evaluate(model: Model, task: Any, job: Job, options: Any) -> dict[str, Any]:
    """Figures and samples of one job: ``labels`` and ``predictions``, or ``correct`` where choices have no classes."""
    if task.config.num_fewshot != 0:  # a task that insists on none keeps it, as in lm-eval's own commands
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    task.set_fewshot_seed(seed=job.seed)
    labels = classes(task)
    has_choices = task.OUTPUT_TYPE == "multiple_choice"
    model.cut = 0
    try:
        with patch("lm_eval.api.task.tqdm", partial(tqdm, disable=None), create=True):
            results = lm_eval.evaluate(
                model,
                {"tasks": {job.task: task}},
                limit=options.limit,
                bootstrap_iters=0 if has_choices else options.bootstrap,
                log_samples=True,
            )
    except torch.OutOfMemoryError as error:
        raise UserError(f"{job.model} on {job.task}: the GPU's memory is too small; lower --batch_size") from error
    own = {key: value for key, value in results["results"][job.task].items() if isinstance(value, int | float)}
    samples = sorted(results["samples"][job.task], key=lambda sample: sample["doc_id"])
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    record: dict[str, Any] = {"lm_eval": own, "documents": len(samples), "cut": model.cut}
    if not has_choices:
        return record
    scores = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    if not all(math.isfinite(value) for row in scores for value in row):
        raise UserError(f"{job.model} on {job.task}: its likelihoods are not finite; its weights are damaged")
    if labels:
        record["labels"] = [label_of(task, sample["doc"], labels) for sample in samples]
        record["predictions"] = [max(range(len(labels)), key=row.__getitem__) for row in scores]
    elif "acc" in samples[0]:
        record["correct"] = [int(sample["acc"]) for sample in samples]
    return record
