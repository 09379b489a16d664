"""What `runtime_env` asks for is there in the workers where a cluster is joined."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import chatlearn
from chatlearn import BaseModule, Engine, Environment
from chatlearn.errors import ConfigError


class Surroundings(BaseModule):
    """Says what its process finds around it."""

    def forward_step(self, data):
        import brought_along  # pyright: ignore[reportMissingImports]

        count = len(data["prompt"])
        return {
            "variable": [os.environ.get("FROM_THE_CONFIG")] * count,
            "module": [brought_along.ANSWER] * count,
            "file": [Path("notes.txt").read_text()] * count,
        }


@pytest.fixture
def environment(tmp_path):
    """A `runtime_env` with a variable, a package and a working folder."""
    (tmp_path / "brought_along").mkdir()
    (tmp_path / "brought_along" / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("a note")
    return {
        "env_vars": {"FROM_THE_CONFIG": "yes"},
        "py_modules": [str(tmp_path / "brought_along")],
        "working_dir": str(tmp_path / "work"),
    }


def learn(tmp_path, environment):
    model = Surroundings("model")
    runtime = {"output_dir": str(tmp_path / "runs"), "startup_timeout_s": 90}
    chatlearn.init({"runtime_env": environment, "runtime": runtime})
    return Engine(Environment(lambda batch: model.forward_step(batch))).set_dataset(["a"]).learn()


def test_a_joined_cluster_gives_workers_the_runtime_env(ray_cluster, environment, tmp_path):
    [row] = learn(tmp_path, environment).rollouts
    assert (row["variable"], row["module"], row["file"]) == ("yes", 42, "a note")


def test_a_connection_without_the_runtime_env_is_refused(ray_cluster, environment, tmp_path):
    import ray

    ray.init(runtime_env={"env_vars": {"FROM_THE_CONFIG": "no"}})
    with pytest.raises(ConfigError, match="without env_vars.FROM_THE_CONFIG, .*working_dir"):
        learn(tmp_path, environment)


def test_a_folder_that_is_not_there_is_a_configuration_error(ray_cluster, tmp_path):
    with pytest.raises(ConfigError, match="runtime_env: .*nowhere"):
        learn(tmp_path, {"working_dir": str(tmp_path / "nowhere")})
