"""Real vLLM servers on 127.0.0.1, and selectors trained for them; `make test-vllm` sets the environment up.

The server runs from an environment of its own (S2T_VLLM_PYTHON, else .venv-vllm) on one core, and its process group ends with
the test session. The embedded models have heads of size 32, which vLLM's CPU attention takes as they are.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S = 600
OPTIONS = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "512", "--max-num-seqs", "128", "--block-size", "32", "--no-enable-log-requests"),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class VLLMServer:
    """A running server; `url` ends in /v1."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End the server and everything it started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)


def vllm_python() -> str:
    """The interpreter that has vLLM; skips the test where there is none."""
    found = os.environ.get("S2T_VLLM_PYTHON") or str(Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
    if not Path(found).exists():
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: str | Path, log: Path, *options: str) -> VLLMServer:
    """Start a server of a model folder, without waiting for it."""
    port = free_port()
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *OPTIONS, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(source_alone(log.parent))},
        )
    return VLLMServer(f"http://127.0.0.1:{port}/v1", process, log)


def source_alone(folder: Path) -> Path:
    """A path with the package and nothing beside it: what pip leaves there would load the logits processor unasked."""
    path = folder / "path"
    path.mkdir(exist_ok=True)
    if not (path / "s2t").exists():
        (path / "s2t").symlink_to(Path(__file__).parents[2] / "src" / "s2t", target_is_directory=True)
    return path


def wait_for(server: VLLMServer) -> None:
    """Return once a server answers; fails, with the end of its log, where it ends or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health", timeout=5):
                return
        except OSError:
            time.sleep(1.0)
    server.kill()
    pytest.fail(f"vLLM did not start:\n{server.log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="session")
def serve_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., VLLMServer]]:
    """Start a server of a model folder with further options; all end with the session."""
    servers: list[VLLMServer] = []

    def run(folder: str | Path, *options: str) -> VLLMServer:
        servers.append(start(folder, tmp_path_factory.mktemp("vllm") / "log", *options))
        wait_for(servers[-1])
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Selection groups of the embedded pair."""
    from s2t.collect import collect
    from s2t.config import CollectConfig

    folder = str(tmp_path_factory.mktemp("groups") / "collect")
    collect(CollectConfig(out=folder, threshold=0.7, limit=200, max_new_tokens=160))
    return folder


@pytest.fixture(scope="session")
def merged(groups: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The merged folder of a selector, trained for a minute, criticality in reserved ids: `rank`, or bins under one scope."""
    from s2t.config import MergeConfig, TrainConfig
    from s2t.merge import merge
    from s2t.train.trainer import train

    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            settings = {"learning_rate": 5e-3, "batch_groups": 16, "lm_weight": 1.0}
            train(
                TrainConfig(
                    groups=groups,
                    out=str(out / "train"),
                    readout="rank" if kind == "rank" else "bins",
                    adapter_scope="stream" if kind == "rank" else kind,
                    criticality="reserved",
                    **settings,
                )
            )
            made[kind] = merge(MergeConfig(adapter=str(out / "train" / "adapter"), out=str(out / "merged")))["folder"]
        return made[kind]

    return make
