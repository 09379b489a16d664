"""Runs of engines over the session's Ray, each with a run folder of its own."""

from __future__ import annotations

import pytest

import chatlearn


@pytest.fixture
def learn(ray_cluster, tmp_path):
    """`learn(engine, models=..., **runtime)`: one run with that configuration."""

    def run(engine, models=None, **runtime):
        settings = {"output_dir": str(tmp_path), "startup_timeout_s": 90, "sync_timeout_s": 60}
        settings |= {"enable_tensorboard": False, "stage_timeout_s": 60, **runtime}
        chatlearn.init({"models": models or {}, "runtime": settings})
        return engine.learn()

    return run


@pytest.fixture
def learn_locally(tmp_path):
    """Like `learn`, in this process."""

    def run(engine, models=None, **runtime):
        settings = {"output_dir": str(tmp_path), "backend": "local", "enable_tensorboard": False}
        chatlearn.init({"models": models or {}, "runtime": {**settings, **runtime}})
        return engine.learn()

    return run
