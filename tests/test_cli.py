"""What the command line prints about itself; mistakes are in ``test_bad_input.py``, runs in ``train/test_loop.py``."""

import pytest

from llm_cht.cli import main


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "report --help", "prepare --help", "sweep --help", "train --help", "convert --help"],
)
def test_help_and_version(arguments, capsys):
    try:
        code = main(arguments.split())
    except SystemExit as end:  # jsonargparse
        code = end.code
    assert code == 0
    assert "llm-cht" in capsys.readouterr().out
