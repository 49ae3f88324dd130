"""The tasks of ``eval/zero_shot.py``: lm-eval's own, on the hub's data or on JSON lines of this machine.

A local task is a YAML file of lm-eval that includes lm-eval's own file of the task by its path and replaces only where
the documents come from: prompts, choices and metrics are lm-eval's by construction, and the stock ``lm_eval`` command
runs the same files (``--include_path``). Documents with labels are checked before a model is loaded: lm-eval itself
takes a label outside the choices for a wrong answer and goes on.

HellaSwag is the exception: files that have only ``ctx``, where lm-eval wants ``ctx_a`` and ``ctx_b``, get a template of
their own, which cleans the text as lm-eval does but cannot capitalize ``ctx_b``; the table marks it.

A task is found by its name in the text of lm-eval's YAML files, and loaded by the path: its ``TaskManager`` parses
thirteen thousand of them first. So groups and tags are no names here; their tasks are. Rejected: configs as Python
dictionaries (the stock command could not run them), and copies of lm-eval's files (they would age).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import lm_eval.tasks
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.tasks import TaskManager

from llm_cht.data.hub import reach
from llm_cht.errors import UserError, nearest

FOLDER = Path(lm_eval.tasks.__file__).parent
DEFAULT = {
    **{name: f"glue/{name}/default.yaml" for name in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli")},
    **{name: f"super_glue/{name}/default.yaml" for name in ("boolq", "cb", "copa")},
    "hellaswag": "hellaswag/hellaswag.yaml",
}
"""The papers' tasks and their files in lm-eval."""

FAILURES = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, SyntaxError),
    *(DatasetsError, httpx.HTTPError, TemplateError),
)
"""What a data set or a template raises that is not there or does not fit."""

_FILES = {"mnli": "mnli_matched.jsonl"}
_PLACES = (".", "glue", "superglue", "other")
_CLEAN = (("trim",), ("replace", " [title]", ". "), ("regex_replace", r"\[.*?\]", ""), ("replace", "  ", " "))
_SHORT_HELLASWAG = {
    "process_docs": None,
    "doc_to_text": "{{ (activity_label ~ ': ' ~ ctx)"
    + "".join(f" | {name}({json.dumps(words)[1:-1]})" for name, *words in _CLEAN)
    + " }}",
    "doc_to_choice": "{{ endings"
    + "".join(f" | map({json.dumps([name, *words])[1:-1]})" for name, *words in _CLEAN)
    + " | list }}",
}


@dataclass(frozen=True)
class Source:
    """Where a task comes from: the YAML file to load, and for local ones the data and the line of each document."""

    name: str
    yaml: Path
    data: Path | None = None
    lines: tuple[int, ...] = ()
    prompt_differs: bool = False

    def place(self, document: int) -> str:
        """Where a document stands, for messages."""
        return f"{self.data}:{self.lines[document]}" if self.data else f"task {self.name}, document {document}"


# ---- finding ----


def own_files(names: Iterable[str]) -> dict[str, Path]:
    """Name -> lm-eval's own YAML file.

    Raises:
        UserError: lm-eval has no task of that name.
    """
    found = {name: FOLDER / place for name, place in DEFAULT.items()}
    if not set(names) <= found.keys():
        for path in sorted(FOLDER.rglob("*.yaml")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if named := re.search(r"^task:[ \t]*([\"']?)([\w.:+-]+)\1[ \t]*$", text, re.MULTILINE):
                found.setdefault(named[2], path)
    for name in names:
        if name not in found:
            raise UserError(f"--tasks {name}: lm-eval has no such task (groups count as none); {nearest(name, found)}")
    return found


def local_file(name: str, data: Path) -> Path | None:
    """The JSON lines of a task below ``data``, itself or in ``glue``, ``superglue`` and ``other``."""
    files = (data / place / _FILES.get(name, f"{name}.jsonl") for place in _PLACES)
    return next((path for path in files if path.is_file()), None)


def write_local(name: str, own: Path, data: Path, folder: Path) -> Source:
    """Write ``folder/NAME.yaml``: lm-eval's task ``own`` on the file ``data``, which is read once and checked.

    Raises:
        UserError: the file is empty, or a line is damaged or has other fields than the first.
    """
    records = read_records(data)
    config: dict[str, Any] = {
        "include": str(own.resolve()),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data.resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
    }
    differs = name == "hellaswag" and "ctx_a" not in next(iter(records.values()))
    if differs:
        config |= _SHORT_HELLASWAG
    path = folder / f"{name}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False, width=1000), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write_tasks {folder}: cannot be written: {error.strerror}; give another folder") from error
    return Source(name, path, data, tuple(records), differs)


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """Line number, from 1 -> record of a JSON-lines file; blank lines hold none.

    Raises:
        UserError: there is no such file, it is empty, or a line is damaged or has other fields than the first.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; give a file of JSON lines in UTF-8") from error
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: is no JSON ({error}); copy the file again, or mend the line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: is no JSON object; a line is a record such as {{'label': 1, ...}}")
        odd = sorted(record.keys() ^ next(iter(records.values()), record).keys())
        odd += [field for field, value in record.items() if value is None]
        if odd:
            raise UserError(f"{path}:{number}: field {odd[0]!r} lacks, or the first line lacks it; give all the same")
        records[number] = record
    if not records:
        raise UserError(f"{path}: the file is empty; give one JSON record a line")
    return records


# ---- loading ----


def load(source: Source) -> Any:
    """The lm-eval task of a source, with its documents.

    Raises:
        UserError: the data do not fit the task, or cannot be had.
    """
    try:
        (task,) = TaskManager(include_defaults=False).load([str(source.yaml)])["tasks"].values()
    except FAILURES as error:
        reason = (str(error).splitlines() or [""])[0]
        if source.data:
            raise UserError(
                f"{source.data}: is no data of {source.name}: {type(error).__name__}: {reason}; its fields must be "
                "those of the hub's data set"
            ) from error
        raise UserError(f"{reason}; give its JSON lines with --data, or connect to the hub") from error
    return task


def reach_hub(own: Path) -> None:
    """Ask the hub for the data set of lm-eval's file, so that nobody waits for downloads that cannot be.

    Raises:
        UserError: it does not answer.
    """
    named = re.search(r"^dataset_path:[ \t]*([\w./-]+)[ \t]*$", own.read_text(encoding="utf-8"), re.MULTILINE)
    if named and "/" in named[1]:
        reach(named[1], "data set", "--tasks")


def classes(task: Any) -> list[str] | None:
    """The labels of a classification; None where documents have choices of their own, or none."""
    config = task.config
    choices = list(config.doc_to_choice.values()) if isinstance(config.doc_to_choice, dict) else config.doc_to_choice
    fixed = isinstance(choices, list) and task.OUTPUT_TYPE == "multiple_choice" and len(choices) > 1
    plain = not (task.multiple_input or task.multiple_target or callable(config.process_results))
    return [str(choice) for choice in choices] if fixed and plain else None


def label_of(task: Any, document: Mapping[str, Any], choices: Sequence[str]) -> int | None:
    """Number of the right choice; None if it is none of them."""
    target = task.doc_to_target(document)
    if isinstance(target, str):
        return choices.index(target) if target in choices else None
    return target if isinstance(target, int) and 0 <= target < len(choices) else None


def check(source: Source, task: Any, options: Any) -> None:
    """Refuse a document whose label is none of its choices, or that the templates of the task cannot read."""
    number_of = len(task.eval_docs)
    if source.data and number_of != len(source.lines):
        raise UserError(f"{source.data}: {len(source.lines)} lines gave {number_of} documents; mend the file")
    if source.data and options.num_fewshot >= number_of:
        raise UserError(f"--num_fewshot {options.num_fewshot}: {source.data} has {number_of} documents; give fewer")
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.multiple_target:
        return
    fixed = classes(task)
    for number in range(min(number_of, options.limit or number_of)):
        document = task.eval_docs[number]
        try:
            choices = fixed or task.doc_to_choice(document)
            label = label_of(task, document, choices)
        except FAILURES as error:
            raise UserError(f"{source.place(number)}: is no document of {source.name}: {error}; mend it") from error
        stated = document.get("label") if source.name in DEFAULT else None  # elsewhere it may be no number of a choice
        if label is None or (isinstance(stated, int) and not 0 <= stated < len(choices)):
            raise UserError(
                f"{source.place(number)}: label {task.doc_to_target(document) if stated is None else stated!r} is "
                f"outside the {len(choices)} choices of {source.name}, numbered from 0; mend it, or leave the line out"
            )


# ---- planning ----


@dataclass(frozen=True)
class Plan:
    """What will be evaluated: sources and loaded tasks by name, and the reason for each task that is left out."""

    sources: dict[str, Source]
    tasks: dict[str, Any]
    skipped: dict[str, str]

    def cost(self, name: str, limit: int | None) -> int:
        """Likelihoods to compute, or about so many."""
        documents = len(self.tasks[name].eval_docs)
        return min(documents, limit or documents) * len(classes(self.tasks[name]) or range(4))


def plan(options: Any, folder: Path) -> Plan:
    """Find, load and check the tasks of ``options.tasks``, or the default ones; YAML files go to ``folder``.

    Raises:
        UserError: an unknown task, damaged data, or a task that was asked for and has no data here or on the hub.
    """
    names = options.tasks or list(DEFAULT)
    own = own_files(names)
    made = Plan({}, {}, {})
    for name in names:
        file = options.data and local_file(name, options.data)
        if file:
            source = write_local(name, own[name], file, folder)
            task = load(source)
        else:
            source = Source(name, own[name])
            try:
                reach_hub(own[name])
                task = load(source)
            except UserError as error:
                lacking = f"no {_FILES.get(name, name + '.jsonl')} in {options.data}, and " if options.data else ""
                if options.data and not options.tasks:
                    made.skipped[name] = f"skipped: {lacking}the hub cannot be reached"
                    continue
                raise UserError(f"--tasks {name}: {lacking}the hub's data cannot be had: {error}") from error
        check(source, task, options)
        made.sources[name], made.tasks[name] = source, task
    if not made.tasks:
        raise UserError(f"--data {options.data}: has no file such as cola.jsonl, and the hub cannot be reached")
    return made
