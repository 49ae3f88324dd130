"""A checkpoint of 1.3 B weights is converted in less memory than it has bytes, let alone a model in fp32."""

import os
import time
from multiprocessing import get_context

import pytest

from llm_cht.sparse.folder import verify_folder
from tests.convert.checkpoints import llama_1b
from tests.helpers import command

GB = 1e9


def peak_gb(*arguments):
    """Most memory that a conversion had at once (what it had of files included), printed with the time it took.

    Never less than this process had when it started the other, which is why nothing large is done here.
    """
    begin = time.monotonic()
    process = command("convert", *arguments)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status  # it has been waited for
    assert status == 0, error
    print(f"{' '.join(arguments[2:])}: {usage.ru_maxrss * 1024 / GB:.2f} GB, {time.monotonic() - begin:.0f} s")
    print(process.stdout.read())
    return usage.ru_maxrss * 1024 / GB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_of_1b_is_converted_within_3_gb(tmp_path):
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(llama_1b, [tmp_path / "dense"]) == 1_339_082_752
    sparse, dense, small = (str(tmp_path / name) for name in ("sparse", "back", "small"))
    assert peak_gb(str(tmp_path / "dense"), sparse, "--sparsity", "0.9") < 3
    links = sum(count.links for count in verify_folder(tmp_path / "sparse").values())
    assert abs(links / (24 * (4 * 2048**2 + 3 * 2048 * 5461)) - 0.1) < 1e-6
    assert peak_gb(sparse, dense, "--dense") < 3
    assert peak_gb(dense, str(tmp_path / "global"), "--sparsity", "0.999", "--budget", "global", "--percolate") < 3
    assert peak_gb(str(tmp_path / "global"), small, "--compact") < 3
