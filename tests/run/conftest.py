"""Fixtures: a clock that a test moves, and a training run that a test saves and resumes."""

from types import SimpleNamespace

import pytest

from rlhf.run import progress
from tests.run.small_run import small_run, step


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves clock.now."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


@pytest.fixture(params=["off"])
def run(request, tmp_path):
    """A run of kind "sft" after one optimizer step."""
    run = small_run(tmp_path, amp=request.param)
    step(run)
    return run
