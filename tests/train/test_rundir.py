"""The run folder: one process at a time, the same run from any working directory, what a resume may change."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_cht.cli import main
from llm_cht.config import load_yaml, parse
from llm_cht.errors import UserError
from llm_cht.train.config import RunSettings, resolved
from llm_cht.train.rundir import claimed, find_run
from tests.helpers import learned, tiny_config, told


@pytest.fixture
def settings(tmp_path) -> RunSettings:
    return parse(RunSettings, "x", ["--run", str(tmp_path / "run")])


HOLD = """
import sys, time
from llm_cht.config import parse
from llm_cht.train.config import RunSettings
from llm_cht.train.rundir import claimed
with claimed(parse(RunSettings, "x", ["--run", sys.argv[1]]), None):
    print("held", flush=True)
    time.sleep(120)
"""


def test_two_processes_in_one_folder(settings):
    run = Path(settings.run)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, settings.run], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another process is training in this run folder, {run}; wait.*`--run`"):
            claimed(settings, None).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)  # it cannot tidy up
        holder.communicate(timeout=60)
    assert os.listdir(run) == [".lock"]
    assert find_run(settings, print) == (run, None)
    with claimed(settings, None):
        assert os.listdir(run) == [".lock"]
    assert os.listdir(run) == []
    with claimed(settings, None):
        pass


def test_an_error_frees_the_folder(settings):
    with pytest.raises(ZeroDivisionError), claimed(settings, None):
        raise ZeroDivisionError
    assert os.listdir(settings.run) == []


def test_a_run_that_began_after_the_look_is_not_overwritten(settings):
    run = Path(settings.run)
    assert find_run(settings, print) == (run, None)
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match=r"another process has trained in .* meanwhile"), claimed(settings, None):
        pass
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    settings.resume = "auto"
    with pytest.raises(UserError, match=r"another process has trained in .* meanwhile"), claimed(settings, None):
        pass
    assert sorted(os.listdir(run)) == ["checkpoints", "config.yaml"]


def test_a_folder_that_cannot_be_made(settings, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*run.*`--run` gives another"), claimed(settings, None):
        pass


def test_a_run_goes_on_from_another_working_directory_and_with_moved_data(tmp_path, monkeypatch, capsys):
    config, other = tiny_config(tmp_path), tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    values = load_yaml(config) | {"run": "runs/x"}
    values["data"]["source"] = "text.txt"
    config.write_text(yaml.safe_dump(values))
    assert main(["train", str(config), "--resume", "auto"]) == 0
    run = tmp_path / "runs" / "x"
    assert f"{run} has no checkpoint to resume from: the run starts from step 0" in capsys.readouterr().err
    written, before = load_yaml(run / "config.yaml"), learned(run)
    assert written["run"] == str(run)
    assert written["data"]["source"] == str(tmp_path / "text.txt")
    monkeypatch.chdir(other)
    again = ["train", "../runs/x/config.yaml", "--resume", "auto"]
    assert main(again) == 0
    assert "resumed from" in capsys.readouterr().err
    assert os.listdir(other) == []
    shutil.move(tmp_path / "text.txt", other / "moved.txt")
    assert main([*again, "--data.source", "moved.txt"]) == 0
    assert learned(run) == before
    with (other / "moved.txt").open("a") as file:
        file.write(" more")
    code = main([*again, "--data.source", "moved.txt"])
    told(code, capsys.readouterr().err, "the data differ from those of", "restore them")


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("validation", "llama_9m", "bpe", "builtin"):  # folders that only look like what is meant
        (tmp_path / name).mkdir()
    (tmp_path / "own.yaml").write_text("model_type: llama")
    given = ["--data.source", "owner/name", "--data.validation", "validation", "--model.config", "llama_9m"]
    data = resolved(parse(RunSettings, "x", given)).data
    assert (data.source, data.validation, data.tokenizer) == ("owner/name", "validation", "bpe")
    assert resolved(parse(RunSettings, "x", given)).model.config == "llama_9m"
    local = ["--data.source", "[validation, '*.txt']", "--data.validation", "~/v.txt", "--model.config", "own.yaml"]
    settings = resolved(parse(RunSettings, "x", local))
    assert settings.data.source == [str(tmp_path / "validation"), str(tmp_path / "*.txt")]
    assert settings.data.validation == str(Path("~/v.txt").expanduser())
    assert settings.model.config == str(tmp_path / "own.yaml")
    assert resolved(parse(RunSettings, "x", [])).data.source == "builtin"


def test_a_shorter_resumed_run_is_told_of_its_length(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert main(["train", str(config)]) == 0
    own = str(tmp_path / "run" / "config.yaml")
    for file, parts in (
        (own, ("`train.steps` = 10", "up to step 15", "a resumed run keeps its length")),
        (str(config), ("`train.steps` is 10 now and was 20", "a resumed run keeps it")),
    ):
        capsys.readouterr()
        code = main(["train", file, "--resume", "auto", "--train.steps", "10"])
        told(code, capsys.readouterr().err, *parts)
