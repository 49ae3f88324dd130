"""Zero-shot GLUE, SuperGLUE and HellaSwag, or any other task of lm-eval, of any causal language model, sparse or not.

    python eval/zero_shot.py MODEL [MODEL ...] [--data DIR] [--tasks cola,mnli,...] [--num_fewshot N --seeds 0 1 2] ...

Prompts, choices and likelihoods are lm-eval's; figures are computed from its samples:

- accuracy, as lm-eval's own ``acc``: the choice of the greatest likelihood is the prediction;
- MCC, the Matthews correlation of predictions with labels (``eval/scores.py``), for every task with fixed classes. A
  model that says one label to everything can look accurate, and has MCC 0; the balance of what it says stands below;
- their standard errors by bootstrap over the documents, seeded;
- averages over the tasks: of MCC over the classifications, without COPA and HellaSwag, whose choices are no classes.

``--data DIR`` reads ``DIR/NAME.jsonl`` (also in ``glue``, ``superglue``, ``other`` below it), records with the fields
and label numbers of the hub's data sets, without any network; a task of the default list that has no file there is
taken from the hub, or skipped with a sentence where the hub does not answer. ``--write_tasks FOLDER`` keeps the tasks
as YAML files that the stock command runs too: ``lm_eval --include_path FOLDER --tasks cola ...``.

Local files have no training documents: with ``--num_fewshot`` shots come from the other documents of the same file.

Under ``accelerate launch`` or ``torchrun`` the pairs of model and task are shared out over the processes of one node;
figures do not depend on their number. Rejected: sharding the documents of a task, as lm-eval does on GPUs: its padding
and hence its last bits depend on the number of processes, and a table has enough tasks for all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its neighbours however llm_cht is installed

from eval import command_line, models
from eval.scores import balance
from eval.zero_shot_table import averages, chart, figures_of, markdown
from llm_cht import dist
from llm_cht.errors import UserError

_TIMEOUT_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code: 0, or 2 for a mistake of the user."""
    return command_line.run("zero_shot.py", lambda: _tabulate(arguments))


def _tabulate(arguments: Sequence[str] | None) -> None:
    _join()
    try:
        with tempfile.TemporaryDirectory(prefix="zero_shot_") as scratch:
            _work(arguments, Path(scratch))
    except UserError as error:
        if error.everywhere and not dist.is_main():
            raise SystemExit(2) from error  # the main process says it
        raise
    finally:
        dist.close()


def _join() -> None:
    """Meet the other processes, where a launcher started some; they exchange nothing but small JSON values."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", processes))) != processes:
        raise UserError(f"{processes} processes, {local} of them here: start them on one node only")
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    dist.open_control(_TIMEOUT_S)


def _work(arguments: Sequence[str] | None, scratch: Path) -> None:
    with dist.together():
        options = _options(arguments)
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    from eval import zero_shot_run as runs  # here, for lm-eval is an extra
    from eval import zero_shot_tasks as tasks

    runs.quiet()
    plan = tasks.Plan({}, {}, {})
    told: dict[str, Any] = {}
    with dist.together(patient=True):
        if dist.is_main():
            for name in options.models:
                models.find(name, "causal")
            told["sparsity"] = {name: models.sparsity(Path(name)) for name in options.models}
            plan = tasks.plan(options, options.write_tasks or scratch)
            told["sources"] = [[name, str(source.yaml)] for name, source in plan.sources.items()]
            told["costs"] = {name: plan.cost(name, options.limit) for name in plan.sources}
    told = dist.from_main(told, patient=True)
    sources = plan.sources or {name: tasks.Source(name, Path(yaml)) for name, yaml in told["sources"]}
    seeds = options.seeds if options.num_fewshot else options.seeds[:1]
    jobs = [runs.Job(name, task, seed) for name in options.models for task in sources for seed in seeds]
    owners = runs.share([told["costs"][job.task] for job in jobs], dist.world_size())
    with dist.together(patient=True):
        own = [job for job, owner in zip(jobs, owners, strict=True) if owner == dist.rank()]
        found = runs.run_jobs(own, sources, plan.tasks, options)
    of_job = {tuple(job): record for records in dist.gather(found, patient=True) for job, record in records}
    if dist.is_main():
        about = [_about(name, plan, of_job[jobs[0].model, name, seeds[0]]) for name in sources]
        report: dict[str, Any] = {
            "settings": _settings(options, seeds),
            "models": [{"model": name, "sparsity": sparsity} for name, sparsity in told["sparsity"].items()],
            "tasks": about,
            "figures": [
                figures_of(name, task, [of_job[name, task["task"], seed] for seed in seeds], options.bootstrap)
                for name in options.models
                for task in about
            ],
            "skipped": [{"task": name, "reason": reason} for name, reason in plan.skipped.items()],
        }
        report["averages"] = [
            {"model": name, **averages([row for row in report["figures"] if row["model"] == name])}
            for name in options.models
        ]
        _tell(report, options)


def _about(name: str, plan: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a task, from the plan and the samples of any model."""
    from eval.zero_shot_tasks import classes

    source, labels, names = plan.sources[name], found.get("labels"), classes(plan.tasks[name])
    return {
        "task": name,
        "data": str(source.data) if source.data else "hub",
        "prompt_differs": source.prompt_differs,
        "documents": found["documents"],
        "classes": names if labels else None,
        "balance": balance(np.array(labels), len(names or ())) if labels else None,
        "labels": labels,
    }


def _settings(options: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    named = {name: getattr(options, name) for name in ("num_fewshot", "limit", "bootstrap", "batch_size", "dtype")}
    return {**named, "seeds": seeds, "lm_eval": version("lm_eval")}


def _tell(report: dict[str, Any], options: argparse.Namespace) -> None:
    print(markdown(report), end="", flush=True)
    if options.write_tasks:
        local = [task["task"] for task in report["tasks"] if task["data"] != "hub"]
        print("\nThe same by lm-eval itself:\n")
        for name in options.models:
            arguments = shlex.quote(f"pretrained={name},dtype={options.dtype}")
            print(
                f"lm_eval run --model hf --model_args {arguments} --num_fewshot {options.num_fewshot} "
                f"--batch_size {options.batch_size} --device {options.device} "
                f"--include_path {shlex.quote(str(options.write_tasks))} --tasks {','.join(local)}"
            )
    if options.plot:
        chart(report, options.plot)
    if options.json:
        command_line.write(options.json, json.dumps(report) + "\n", "--json")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(prog="zero_shot.py", description="Zero-shot tasks of lm-eval, with class balance.")
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a model folder (RUN/model), or a name on the hub")
    add("--tasks", type=_names, help="a,b,c of lm-eval; default: GLUE, boolq, cb, copa, hellaswag")
    add("--data", type=Path, help="folder of NAME.jsonl, itself or in glue, superglue, other; default: the hub")
    add("--write_tasks", type=Path, metavar="FOLDER", help="keep the local tasks as YAML for the lm_eval command")
    add("--num_fewshot", type=_whole, default=0, help="solved examples before each question (%(default)s)")
    add("--seeds", type=_whole, nargs="+", default=[0], help="that draw them (0)")
    add("--limit", type=command_line.count, help="only the first documents of each task")
    add("--batch_size", type=command_line.count, default=16, help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(%(default)s)")
    command_line.add_device(parser)
    add("--bootstrap", type=command_line.count, default=1000, help="resamples of the errors (%(default)s)")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    add("--json", type=Path, help="also write figures, labels and predictions to this file")
    add("--plot", type=Path, metavar="FILE", help="also draw a bar chart: FILE.svg or FILE.png")
    options = parser.parse_args(arguments)
    for name in options.models:
        if options.models.count(name) > 1:
            raise UserError(f"MODEL {name}: is given more than once; give every model once")
    if options.data and not options.data.is_dir():
        raise UserError(f"--data {options.data}: no such folder (looked from {Path.cwd()}); correct the path")
    if options.write_tasks and not options.data:
        raise UserError("--write_tasks: needs --data, the folder of the documents")
    if options.bootstrap < 2:
        raise UserError("--bootstrap 1: has no spread; give at least 2 resamples")
    if options.plot and options.plot.suffix not in (".svg", ".png"):
        raise UserError(f"--plot {options.plot}: give a name that ends with .svg or .png")
    options.device = command_line.device(options)
    if options.device == "cuda":
        options.device = f"cuda:{dist.rank() % torch.cuda.device_count()}"
    return options


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task")
    return names


def _whole(text: str) -> int:
    return 0 if text == "0" else command_line.count(text)


if __name__ == "__main__":
    sys.exit(main())
