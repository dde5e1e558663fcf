"""Fixtures for all rooms."""

import functools
import operator
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.models import TinyModel

# Examples are drawn alike in every run, so that a change fails for what it changes. To look for new ones, run with
# HYPOTHESIS_PROFILE=explore.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Who starts the tests in the background may have it ignored, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Else what a test draws would depend on those that its worker ran before, another selection in each run."""
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:  # neither is imported for tests that need none
            operator.attrgetter(seed)(sys.modules[name])(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], TinyModel]":
    """Returns the tiny model of a family (a key of tests.support.models.FAMILIES), made once per session."""
    from tests.support import models  # here, since importing transformers takes seconds that few tests need

    @functools.cache
    def make(name: str) -> "TinyModel":
        return models.make_tiny_model(models.FAMILIES[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's folder with a tokenizer, which no test changes."""
    from tests.support import models  # as above

    folder = tmp_path_factory.mktemp("llama")
    models.FAMILIES["llama"](folder)
    models.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def true_library() -> Path:
    """The native library, built where that is possible; another worker, or the background, may be at it."""
    from inferflux.kernels.native import loading

    path, reason = loading.build_now()
    deadline = time.monotonic() + 200
    while reason is not None and "another process" in reason and time.monotonic() < deadline:
        time.sleep(0.5)
        path, reason = loading.build_now()
    if reason is not None:
        pytest.skip(reason)
    if loading.library().reason is not None:
        loading.library.cache_clear()  # it was asked for too early
    return path
