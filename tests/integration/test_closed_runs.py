"""A run's own cluster asks for its token, and what a run writes holds no secret."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_ray_cluster.sh"
SECRETS = {"HF_TOKEN": "hf_NeverWriteThisDown", "DB_PASSWORD": "NorThisPassword"}

PROGRAM = """
import json, os, stat, subprocess, sys
import chatlearn

CLIENT = '''
import sys
from ray._raylet import GcsClient
try:
    print("in", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except Exception as error:
    print(type(error).__name__)
'''

class Look(chatlearn.BaseModule):
    def forward_step(self, data):
        import ray

        address = ray.get_runtime_context().gcs_address
        path = os.environ["RAY_AUTH_TOKEN_PATH"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        clients = [
            {},
            {"RAY_AUTH_MODE": "disabled"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path},
        ]
        asked = [
            subprocess.Popen(
                [sys.executable, "-c", CLIENT, address], env=kept | extra, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            for extra in clients
        ]
        report = {
            "answers": [client.communicate(timeout=60)[0].strip() for client in asked],
            "modes": [oct(stat.S_IMODE(os.stat(p).st_mode)) for p in (path, os.path.dirname(path))],
            "path": path,
            "token": open(path).read(),
            "has_secrets": [os.environ[name] for name in ("HF_TOKEN", "DB_PASSWORD")],
        }
        return {"report": [report] * len(data["prompt"])}

variables = {"HF_TOKEN": "${SOURCE_TOKEN}", "DB_PASSWORD": "NorThisPassword", "PLAIN": "yes"}
chatlearn.init({
    "runtime_env": {"env_vars": variables},
    "runtime": {"output_dir": "runs", "enable_tensorboard": False, "startup_timeout_s": 90},
})
look = Look("look")
engine = chatlearn.Engine(chatlearn.Environment(lambda batch: look.forward_step(batch)))
result = engine.set_dataset(["a"]).learn()
with open("report.json", "w") as file:
    json.dump(result.rollouts[0]["report"], file)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("way", ["by itself", pytest.param("launched", marks=pytest.mark.long)])
def test_a_cluster_of_the_runs_own_is_closed_and_nothing_secret_is_written(
    tmp_path: Path, way: str
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ray_folder = Path(tempfile.mkdtemp(prefix="clr-"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CHATLEARN_"))}
    environment = kept | {"SOURCE_TOKEN": SECRETS["HF_TOKEN"], "RAY_TMPDIR": str(ray_folder)}
    environment |= {"PYTHON": sys.executable, "NODE_RANK": "0", "NUM_NODES": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment |= {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "program.py"] if way == "by itself" else [str(SCRIPT), "program.py"]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["answers"] == ["AuthenticationError"] * 3 + ["in 1"]
        assert report["modes"] == ["0o600", "0o700"]
        assert not Path(report["path"]).parent.exists()
        assert report["has_secrets"] == list(SECRETS.values())
        hidden = [*SECRETS.values(), report["token"]]
        assert [text for text in hidden if text in done.stdout + done.stderr] == []
        folders = [tmp_path / "runs", ray_folder]
        assert [found for folder in folders for found in _holding(folder, hidden)] == []
        [config] = (tmp_path / "runs").rglob("config.yaml")
        assert "HF_TOKEN: ${SOURCE_TOKEN}" in config.read_text()
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def _holding(folder: Path, texts: list[str]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 2
    return [str(path) for path in files for text in texts if text.encode() in path.read_bytes()]
