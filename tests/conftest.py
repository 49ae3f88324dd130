"""What every test shares: no network, no traces outside a temporary folder, and the way to real data.

The environment is set in ``pytest_configure``, which runs before a test module imports transformers or datasets: both
read it once, at import. Programs that tests start inherit it.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_caches = tempfile.TemporaryDirectory(prefix="llm_cht_tests_")


def pytest_configure() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network fails at once instead of waiting for it
    os.environ["HF_HOME"] = str(Path(_caches.name, "huggingface"))
    os.environ["LLM_CHT_CACHE"] = str(Path(_caches.name, "llm_cht"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # silences the warning of tokenizers in a forked process
    # the tensors of the tests are small: on two busy cores, two threads cost four times the processor time of one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # a shell starts background jobs with CTRL-C ignored, and everything they start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    _caches.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, because most selections hold no such test and need not wait for the import

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of the first Trainer or run of a process for good."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that ``LLM_CHT_DATA`` names."""
    folder = os.environ.get("LLM_CHT_DATA")
    if not folder:
        pytest.skip("LLM_CHT_DATA is unset: this test reads real data sets from the folder it names")
    return Path(folder)
