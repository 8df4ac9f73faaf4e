"""One thread, and the shared data sets where they are at hand."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# the same examples each time, and no deadline: a test must not depend on how busy a machine is. To look for new ones:
# make test ARGS="--hypothesis-profile=default --hypothesis-seed=random"
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A test of a rank that hangs leaves threads in compiled code, under which an interpreter that ends would abort."""
    if any(thread.daemon for thread in threading.enumerate()) and (session := config.stash.get(SESSION, None)) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(session.exitstatus))


SESSION = pytest.StashKey[pytest.Session]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads what another run of them kept, or leaves anything behind."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ANYFIT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of MNIST, Adult and the others; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("ANYFIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data sets at hand (ANYFIT_DATA names their folder)")
    return folder
