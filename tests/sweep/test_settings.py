"""Sweep files: the runs that follow from one, and what is refused, through the command line."""

import re

import pytest
import yaml

from llm_cht.cli import main
from llm_cht.sweep.settings import Run, load_sweep, plan
from tests.helpers import told

BASE = {
    "train": {"steps": 40, "batch_size": 4},
    "method": {"update_interval": 5},
    "lr": {"warmup_steps": 2, "rewarm_steps": 2},
}
SWEEP = {
    "grid": {"method.preset": ["static", "set"], "method.sparsity": [0.7, 0.9]},
    "seeds": [0, 1],
    "compare": "method.preset",
}
CASES = {"dense": {"method.preset": "dense", "method.sparsity": 0}, "set": {"method": {"preset": "set"}}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a sweep file that differs from ``SWEEP`` as given (None: without the key), into the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def _write(**changes):
        values = {"base": "base.yaml", "folder": "runs/x", **SWEEP, **changes}
        values = {key: value for key, value in values.items() if value is not None}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return "sweep.yaml"

    return _write


def planned(file: str, *overrides: str) -> list[Run]:
    return plan(load_sweep(file), overrides)[1]


def test_a_grid_is_every_combination_with_every_seed(write, tmp_path):
    runs = planned(write())
    assert [run.name for run in runs] == [
        f"{preset}_sparsity{sparsity}_seed{seed}"
        for seed in (0, 1)
        for preset in ("static", "set")
        for sparsity in (0.7, 0.9)
    ]
    last = runs[-1]
    assert last.folder == tmp_path / "runs/x/set_sparsity0.9_seed1"
    assert (last.settings.method.preset, last.settings.method.sparsity, last.settings.seed) == ("set", 0.9, 1)
    assert last.settings.method.end_step == 30, "not resolved"
    assert last.setting.overrides == {"method.preset": "set", "method.sparsity": 0.9}


def test_a_case_that_sets_a_key_of_the_grid_is_not_varied_over_it(write):
    runs = planned(write(cases=CASES, grid={"method.sparsity": [0.7, 0.9]}, seeds=[3], compare=None))
    assert [run.name for run in runs] == ["dense_seed3", "set_sparsity0.7_seed3", "set_sparsity0.9_seed3"]
    assert runs[0].setting.factors == {"case": "dense"}
    assert runs[2].setting.factors == {"case": "set", "method.sparsity": "0.9"}


def test_settings_hold_for_every_run_and_a_case_wins_over_them(write):
    file = write(
        settings={"optimizer.lr": "1e-2", "train": {"steps": 80}},
        cases={"slow": {"optimizer.lr": 1e-4}, "plain": None},
        grid=None,
        compare=None,
        seeds=[0],
    )
    slow, plain = planned(file, "--train.batch_size", "8")
    assert (slow.settings.optimizer.lr, plain.settings.optimizer.lr) == (1e-4, 1e-2)
    assert slow.settings.train.steps == plain.settings.train.steps == 80
    assert plain.settings.train.batch_size == 8


def test_values_of_every_kind_reach_the_run(write):
    grid = {
        "model.overrides": [{"hidden_size": 64}, {"hidden_size": 32}],
        "validation.every": [None, 7],
        "optimizer.lr": ["1e-3"],
        "data.source": ["texts/one.txt"],
    }
    runs = planned(write(grid=grid, compare=None, seeds=[0]))
    assert [run.settings.model.overrides for run in runs[::2]] == [{"hidden_size": 64}, {"hidden_size": 32}]
    assert [run.settings.validation.every for run in runs[:2]] == [None, 7]
    assert runs[0].setting.factors["optimizer.lr"] == "0.001"
    assert runs[0].name == "overrides-hidden_size-64_everynull_lr0.001_one.txt_seed0"


def test_skip_leaves_out_what_agrees_in_everything(write):
    runs = planned(write(skip=[{"method.preset": "set", "method.sparsity": 0.7}], seeds=[0]))
    assert [run.name for run in runs] == [
        "static_sparsity0.7_seed0",
        "static_sparsity0.9_seed0",
        "set_sparsity0.9_seed0",
    ]


def test_the_reference_is_the_first_value_or_as_given(write):
    assert plan(load_sweep(write()), [])[0].reference == "static"
    file = write(grid={"optimizer.lr": ["1e-3", "1e-2"]}, compare="optimizer.lr", reference="1e-2")
    assert plan(load_sweep(file), [])[0].reference == "0.01"


MISTAKES = {
    "no base": ({"base": None}, "`base` = None in sweep.yaml: give"),
    "no file": ({"base": "bse.yaml"}, "config file bse.yaml: No such file"),
    "no folder": ({"folder": None}, "`folder` = None in sweep.yaml: give"),
    "unknown key": ({"seed": [0]}, "unknown key `seed` in sweep.yaml; did you mean `seeds`?"),
    "unknown setting": (
        {"grid": {"method.sparsty": [0.5]}, "compare": None},
        "unknown key `method.sparsty` in sweep.yaml, `grid`; did you mean `method.sparsity`?",
    ),
    "unknown in a case": (
        {"cases": {"a": {"optimiser.lr": 1}}},
        "sweep.yaml, case `a`; did you mean `optimizer.lr`?",
    ),
    "wrong name": (
        {"grid": {"method.preset": ["sett"]}},
        "sweep.yaml, method.preset sett: `method.preset` = sett: unknown; did you mean `set`?",
    ),
    "wrong value": ({"grid": {"method.preset": ["set"], "method.sparsity": [1.5]}}, "method.sparsity 1.5: `method.sp"),
    "a case that cannot be": (
        {"cases": {"a": {"method.preset": "dense"}}, "grid": {"method.sparsity": [0.7]}, "compare": None},
        "case `a`: method.preset dense, method.sparsity 0.7: `method.sparsity` = 0.7: the preset dense has no topology",
    ),
    "ours": ({"grid": {"seed": [0]}, "compare": None}, "the sweep sets it itself; use `seeds`"),
    "no list": ({"grid": {"method.preset": "set"}}, "`method.preset` = 'set' in sweep.yaml, `grid`: give a list"),
    "no value": ({"grid": {"method.preset": []}}, "`method.preset` = [] in sweep.yaml, `grid`: give a list"),
    "empty grid": ({"grid": {}}, "`grid` in sweep.yaml is empty; fill it in"),
    "nothing varies": ({"grid": None, "compare": None}, "sweep.yaml varies nothing: give `grid:`"),
    "no seeds": ({"seeds": None}, "`seeds` = None in sweep.yaml: give a list"),
    "empty seeds": ({"seeds": []}, "`seeds` in sweep.yaml is empty"),
    "a seed twice": ({"seeds": [1, 1]}, "`seeds` = [1, 1] in sweep.yaml: one stands twice"),
    "a value twice": (
        {"grid": {"optimizer.lr": ["1e-3", 0.001]}, "compare": None},
        "two settings of sweep.yaml have the name `lr0.001`: remove",
    ),
    "case name": ({"cases": {"a/b": {}}}, "the case `a/b` in sweep.yaml: it names folders"),
    "compare": ({"compare": "method.sparsit"}, "is not varied; did you mean `method.sparsity`?"),
    "compared in a case": ({"cases": CASES}, "the case `dense` in sweep.yaml sets `method.preset`, which is compared"),
    "reference": (
        {"reference": "stat"},
        "`reference` = stat in sweep.yaml is no value of `method.preset`; did",
    ),
    "skip of nothing": ({"skip": [{"method.sparsity": 0.8}]}, "leaves nothing out; correct or remove it"),
    "skip of an unknown": ({"skip": [{"seed": 1}]}, "`seed` in sweep.yaml, `skip`, is not varied"),
    "skip of all": ({"skip": [{"method.sparsity": 0.7}, {"method.sparsity": 0.9}]}, "leaves out every combination"),
    "given twice": (
        {"settings": {"method.sparsity": 0.5}},
        "`method.sparsity` in sweep.yaml stands in `settings` and in `grid`",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_runs(mistake, write, tmp_path, capsys):
    changes, message = MISTAKES[mistake]
    told(main(["sweep", write(**changes)]), capsys.readouterr().err, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give one sweep file"),
        ("nowhere.yaml", "config file nowhere.yaml: No such file"),
        ("sweep.yaml base.yaml", "give one sweep file"),
        ("sweep.yaml --method.sparsity 0.5", "`--method.sparsity` on the command line: sweep.yaml varies it"),
        ("sweep.yaml --seed 3", "the sweep sets it itself; use `seeds`"),
        ("sweep.yaml --train.step 3", "unknown key `train.step` in the command line; did you mean `train.steps`?"),
        ("sweep.yaml --table", "no run of sweep.yaml has finished"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, write, capsys):
    write()
    told(main(["sweep", *arguments.split()]), capsys.readouterr().err, message)


def test_the_example_is_sound(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    names = [run.name for run in planned("configs/sweeps/example.yaml")]
    assert len(names) == 10
    assert all(re.fullmatch(r"(dense|(set|chts)_sparsity0\.[79])_seed[01]", name) for name in names)
