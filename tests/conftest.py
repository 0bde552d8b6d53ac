"""What every test gets: no network, few threads, the same random numbers each time."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; scripts they start inherit this

import gc
import random
import sys
from collections.abc import Iterator
from functools import wraps

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same global random state at the start of each test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state that transformers draws from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """Tests marked gpu need a device."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What has been imported and collected stays, so no later collection of garbage looks at it: each run has some."""
    gc.collect()
    gc.freeze()


DECODING = {"cascade", "contracts", "decoding", "drafters", "gpu", "heads", "schedules", "trees", "verifiers"}
"""Folders whose tests decode for decoding's sake; elsewhere a text is there to be trained on, printed or saved."""

_drafted: list[int] = []
"""Of each call of the test that is running, the tokens drafted for the target and the drafter's failures."""


def _count_drafts() -> None:
    """From now on every call that ends says how much was drafted; nothing before csdraft has been imported."""
    module = sys.modules.get("csdraft.reports.recorder")
    make = None if module is None else module.Recorder.report
    if make is None or getattr(make, "counts", False):
        return

    @wraps(make)
    def counting(*args, **kwargs):
        report = make(*args, **kwargs)
        _drafted.append(report.target.drafted.total() + report.failures.total())
        return report

    counting.counts = True
    module.Recorder.report = counting


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test that decodes with a drafter fails if nothing was drafted in any of its calls: it would show nothing.

    Unless the drafter failed and was left out, or the test is marked `drafts_nothing`.
    """
    _count_drafts()
    _drafted.clear()
    result = yield
    excused = pyfuncitem.path.parent.name not in DECODING or pyfuncitem.get_closest_marker("drafts_nothing")
    if _drafted and not any(_drafted) and not excused:
        pytest.fail(
            f"nothing was drafted in any of the {len(_drafted)} calls, so this test shows nothing; mark it "
            "drafts_nothing if that is its point"
        )
    return result


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models, prompts and texts, named by CSDRAFT_DATA or beside the checkout; optional."""
    folder = Path(os.environ.get("CSDRAFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real material at {folder}; set CSDRAFT_DATA to a folder of it")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
