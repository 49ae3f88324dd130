"""The conventions of the project as tests: sizes, docstrings, import order, third parties, versions, shipped files.

They read the source with ``ast`` and import nothing of it, so that they hold for code behind a missing dependency and
for imports inside functions too. Rejected: a linter plugin per rule (import-linter, pylint), each a dependency and a
file of settings for what is a few lines here.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "llm_cht").rglob("*.py"))
PROGRAMS = sorted(path for folder in ("launch", "eval") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Rooms from the bottom up; a module may import what comes earlier, or what is in its own room.
ROOMS = """
    llm_cht errors
    files config dist
    topology topology.keys topology.bits topology.score topology.node_rules topology.path_rules topology.link
    topology.subrank topology.select topology.scale_free topology.correlated topology.initial topology.weights
    topology.budget topology.percolate topology.schedule topology.settings topology.presets topology.checks
    topology.method topology.update topology.measure
    sparse sparse.linear sparse.packed
    sparse.families sparse.surgery sparse.folder vocabulary models data
    evolve convert train report sweep cli
""".split()  # noqa: SIM905 (one line a group reads better)

# Third parties that only some modules may import, and the programs around the package, which none may.
KEPT_TO = {
    "accelerate": ("train",),
    "deepspeed": ("evolve.shards", "train.engine"),
    "matplotlib": ("report",),
    "eval": (),
    "launch": (),
    "tests": (),
}

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 400, 60, 6

TOP_LEVEL = {
    *("llm_cht", "launch", "configs", "eval", "tests"),
    *("pyproject.toml", "constraints.txt", "Makefile", "Dockerfile", ".ci", ".gitignore"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
}

# Parameters in total and without the embeddings and the output layer, worked out by hand from the dimensions.
PARAMETERS = {
    "9m": (9.00e6, 0.804e6),
    "20m": (19.5e6, 3.16e6),
    "60m": (58.1e6, 25.3e6),
    "130m": (134e6, 85.0e6),
    "350m": (368e6, 302e6),
    "1b": (1.339e9, 1.208e9),
    "3b": (2.686e9, 2.522e9),
    "7b": (6.738e9, 6.476e9),
}
# The same of translation models, without the embeddings, whose number the vocabulary decides.
TRANSLATION_PARAMETERS = {"multi30k": 31_543_296, "iwslt14": 44_138_496, "wmt17": 44_138_496, "2m": 1_388_544}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """``llm_cht/topology/keys.py`` -> ``topology.keys``; a package is named as its folder, the root as ``llm_cht``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts[1:]) or "llm_cht"


MODULES = {module_name(path): path for path in PACKAGE}


def absolute_imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module inside ``package`` imports anywhere, functions included; relative ones made absolute.

    ``from a import b`` gives ``a.b``: whether b is a module or a name in a is for the caller to know.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_of(name: str) -> tuple[set[str], set[str]]:
    """Modules of ours (named as in ``MODULES``) and top-level names of others that module ``name`` imports."""
    path = MODULES[name]
    ours, others = set(), set()
    for imported in absolute_imports(ast.parse(path.read_text()), ".".join(path.parent.relative_to(ROOT).parts)):
        top, _, rest = imported.partition(".")
        if top != "llm_cht":
            others.add(top)
        elif rest in MODULES:
            ours.add(rest)
        else:  # a name in a module, or in the package itself
            ours.add(rest.rpartition(".")[0] or "llm_cht")
    return ours, others


def in_room(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> int:
    fitting = [room for room in ROOMS if in_room(name, room)]
    assert fitting, f"{name} stands in no room: give it a place in ROOMS"
    return ROOMS.index(max(fitting, key=len))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len(named) - (named[:1] in (["self"], ["cls"])) + len(starred)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def test_imports_are_found_in_functions_and_made_absolute():
    source = "import a.b\nfrom . import c\nfrom ..d import e, f\ndef g():\n    from .h import i"
    assert list(absolute_imports(ast.parse(source), "llm_cht.room")) == [
        "a.b",
        "llm_cht.room.c",
        "llm_cht.d.e",
        "llm_cht.d.f",
        "llm_cht.room.h.i",
    ]


@pytest.mark.parametrize("path", [*PACKAGE, *PROGRAMS, *TESTS], ids=relative)
def test_files_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_FILE


@pytest.mark.parametrize("path", [*PACKAGE, *PROGRAMS], ids=relative)
def test_modules_say_what_they_are(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [*PACKAGE, *PROGRAMS, *TESTS], ids=relative)
def test_functions_are_short_and_take_few_arguments(path: Path):
    offenders = []
    for function in functions(path):
        num_lines = function.end_lineno - function.lineno + 1
        if num_lines > MAX_FUNCTION:
            offenders.append(f"{function.name}: {num_lines} lines, at most {MAX_FUNCTION}")
        if num_arguments(function) > MAX_ARGUMENTS:
            offenders.append(f"{function.name}: {num_arguments(function)} arguments, at most {MAX_ARGUMENTS}")
    assert not offenders


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_rooms_below(name: str):
    ours, _ = imports_of(name)
    room = room_of(name)
    assert not [imported for imported in ours if room_of(imported) > room]


def test_imports_have_no_cycle():
    graph = {name: imports_of(name)[0] - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("name", MODULES)
def test_third_parties_are_imported_where_they_belong_and_declared(name: str):
    _, others = imports_of(name)
    for third, rooms in KEPT_TO.items():
        assert third not in others or any(in_room(name, room) for room in rooms), third
    names = {"yaml": "pyyaml"}
    known = {canonicalize_name(requirement.name) for requirement in declared()}
    foreign = {canonicalize_name(names.get(top, top)) for top in others - sys.stdlib_module_names}
    assert foreign <= known


@pytest.mark.parametrize("name", [name for name in MODULES if in_room(name, "topology")])
def test_topology_knows_tensors_and_itself_only(name: str):
    ours, others = imports_of(name)
    assert others - sys.stdlib_module_names <= {"torch"}
    assert not [imported for imported in ours if imported != "errors" and not in_room(imported, "topology")]


def test_declared_dependencies_are_pinned_at_one_tested_version():
    versions = pins()
    assert not [pin for pin in versions.values() if "+" in pin], "local versions exist on one index only"
    for requirement in declared():
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_image_has_the_tested_versions():
    dockerfile = (ROOT / "Dockerfile").read_text()
    named = dict(re.findall(r"^ARG (\w+)_VERSION=(\S+)$", dockerfile, re.MULTILINE))
    assert "TORCH" in named
    assert {name: pins()[canonicalize_name(name)] for name in named} == named
    installs = re.findall(r"pip install .*", dockerfile)
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


def test_version_is_the_same_everywhere():
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "llm_cht/__init__.py").read_text(), re.MULTILINE)[1]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_top_level_holds_nothing_else():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: what belongs to the project is not known")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.split("/")[0] for line in tracked.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize("size", PARAMETERS)
def test_model_config_has_the_size_it_says(size: str):
    import torch  # here, for no other test of this file needs it
    from transformers import AutoConfig, AutoModelForCausalLM

    text = (ROOT / f"configs/models/llama_{size}.yaml").read_text()
    keys = yaml.safe_load(text)
    defaults = AutoConfig.for_model("llama").to_dict()
    assert not [key for key, value in keys.items() if key != "model_type" and defaults[key] == value]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    total = model.num_parameters()
    inner = total - model.get_input_embeddings().weight.numel() - model.get_output_embeddings().weight.numel()
    assert (total, inner) == pytest.approx(PARAMETERS[size], rel=0.01)
    assert text.startswith(f"# {total:,} parameters, {inner:,} without")


def test_every_model_config_is_in_the_table():
    tables = [("llama", PARAMETERS), ("marian", TRANSLATION_PARAMETERS)]
    names = {f"{kind}_{size}" for kind, sizes in tables for size in sizes}
    assert {path.stem for path in (ROOT / "configs/models").iterdir()} == names


@pytest.mark.parametrize("size", TRANSLATION_PARAMETERS)
def test_translation_model_config_has_the_size_it_says(size: str):
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    text = (ROOT / f"configs/models/marian_{size}.yaml").read_text()
    keys = yaml.safe_load(text)
    defaults = AutoConfig.for_model("marian").to_dict()
    assert not [key for key, value in keys.items() if key != "model_type" and defaults[key] == value]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**keys))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    inner = trained - model.get_input_embeddings().weight.numel()
    assert inner == TRANSLATION_PARAMETERS[size]
    assert text.startswith(f"# {inner:,} parameters without the embeddings")


@pytest.mark.slow
def test_wheel_holds_configs_and_licence(tmp_path: Path):
    """Needs a package index: the build backend comes from there."""
    import zipfile

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("llm_cht-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {f"llm_cht/{relative(path)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]
