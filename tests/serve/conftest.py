"""A real server on a free port of this machine, in a thread, with the embedded SLM and an adapter that acts strongly."""

from __future__ import annotations

import faulthandler
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed: pip install s2t[serve]")

import torch
import uvicorn
from openai import OpenAI

from s2t.api import Reasoner
from s2t.config import ServeConfig
from s2t.decode.pair import Pair
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model
from s2t.serve.run import DrainingServer, build
from s2t.serve.service import Service

NAME = "tiny:slm"


class Running:
    """A server that answers, its service, and the reasoner whose answers it must give."""

    def __init__(self, url: str, service: Service, reasoner: Reasoner, server: uvicorn.Server) -> None:
        self.url, self.service, self.reasoner, self.server = url, service, reasoner, server
        self._client = self._new_client()

    def client(self, **settings: Any) -> OpenAI:
        """The official client; making one takes a while, so that without settings it is always the same."""
        return self._new_client(**settings) if settings else self._client

    def _new_client(self, **settings: Any) -> OpenAI:
        return OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | settings))

    def idle(self, seconds: float = 5.0) -> bool:
        """Wait until no sequence is open and no row is taken."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.service.worker.num_open and not self.service.backend.is_busy:
                return True
            time.sleep(0.01)
        return False


def new_adapter(
    loaded: Any, scope: str = "candidates", criticality: str = "head", readout: str = "bins"
) -> SelectorAdapter:
    """An adapter that has learned nothing and selects often."""
    config = AdapterConfig(
        loaded.name,
        loaded.fingerprint,
        readout=readout,
        scope=scope,
        criticality=criticality,
        num_candidates=5,
        prior_weight=0.1,
        lora_rank=4,
        lora_dropout=0.0,
        thresholds={"criticality": 0.5},
    )
    torch.manual_seed(0)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name or name.startswith("selector."):
                parameter.normal_(0, 0.3)
    adapter.selector.eval().requires_grad_(False)
    return adapter


@pytest.fixture(scope="session")
def models() -> tuple[Any, SelectorAdapter]:
    """An SLM of its own with an adapter attached: the shared one must stay as it is."""
    torch.set_num_threads(1)
    loaded = load_model(NAME)
    return loaded, new_adapter(loaded)


@pytest.fixture(scope="session")
def fakes() -> Any:
    """The module of the fake completions servers, which the tests of remote decoding have."""
    path = Path(__file__).parents[1] / "decode" / "remote" / "conftest.py"
    spec = importlib.util.spec_from_file_location("fakes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", name="running")
def running_fixture() -> Callable[..., Any]:
    return running


@pytest.fixture(scope="session", name="new_adapter")
def new_adapter_fixture() -> Callable[..., SelectorAdapter]:
    return new_adapter


@contextmanager
def running(pair: Pair, **settings: Any) -> Iterator[Running]:
    """A server over a pair, stopped at the end."""
    config = ServeConfig(
        **({"port": 0, "drain_s": 0.0, "batch_size": 8, "max_length": 512, "max_new_tokens": 40} | settings)
    )
    service, app = build(config, pair)
    server = DrainingServer(app, service, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service, Reasoner(pair), server)
    finally:
        server.should_exit = True
        thread.join(60)  # on a busy machine
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve(models: Any, tiny_llm: Any) -> Callable[..., Any]:
    """Start a server with settings of its own: `with serve(max_queue=2) as server`."""
    loaded, adapter = models

    def start(with_llm: bool = False, endless: bool = False, **settings: Any) -> Any:
        slm = replace(loaded, stop_ids=frozenset()) if endless else loaded  # writes until its length limit
        return running(Pair(slm, tiny_llm if with_llm else None, adapter), **settings)

    return start


@pytest.fixture(scope="session")
def server(serve: Callable[..., Any]) -> Iterator[Running]:
    """One server for the tests that change nothing: all strategies, thresholds for those that need one."""
    with serve(with_llm=True, threshold=0.5) as found:
        yield found
