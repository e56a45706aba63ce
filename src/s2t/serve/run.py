"""From settings to a listening server: the key, the strategies that can be offered, the socket, and a graceful end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

from s2t.config import MANY_SAMPLES, NEEDS_ADAPTER, SERVED, ServeConfig
from s2t.decode.pair import Pair
from s2t.decode.workload import strategy_of
from s2t.errors import ConfigError, S2TError, missing_extra
from s2t.methods.strategies import Strategy

try:
    import uvicorn
    from fastapi import FastAPI

    from s2t.serve.app import create_app
    from s2t.serve.backend import Backend, EngineBackend
    from s2t.serve.connection import timed_protocol
    from s2t.serve.intake import Intake, longest
    from s2t.serve.origin import is_loopback
    from s2t.serve.served import ServedBackend
    from s2t.serve.service import Service
except ImportError as error:
    raise missing_extra(error.name or "fastapi", "serve") from error

KEY_VARIABLE = "S2T_API_KEY"
_LAST_S = 0.8  # after draining, until the process ends
_LAST_WORDS_S = 0.3  # for answers that were ended to reach their clients


def build(config: ServeConfig, pair: Pair) -> tuple[Service, FastAPI]:
    """The service and its application for loaded models; `pair` gets the batch size of the settings."""
    pair.batch_size = config.batch_size
    key = check(config)
    strategies = offered(config, pair)
    kind = EngineBackend if pair.served_slm is None else ServedBackend
    backend: Backend = kind(pair, strategies, longest(config, pair))
    service = Service(config, Intake(config, config.served_name or config.slm, pair, strategies), backend)
    return service, create_app(service, key)


def check(config: ServeConfig) -> str | None:
    """The key that clients must send, if any; raises ConfigError where one is missing or cannot be sent."""
    key = read_key(config)
    check_address(config, key)
    return key


def serve(config: ServeConfig, pair: Pair) -> None:
    """Listen until a signal comes, then let running requests finish. Raises ConfigError where that cannot begin."""
    service, app = build(config, pair)
    listener = _listen(config.host, config.port)
    address = listener.getsockname()
    server = DrainingServer(app, service, config)
    names = ", ".join(service.intake.strategies)
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"s2t serve: {service.intake.name} ({names}) at http://{host}:{address[1]}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what it caught once more when it is done
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run(sockets=[listener])
    if server.is_signalled:  # taking down threads and libraries would take longer than whoever sent it waits
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def offered(config: ServeConfig, pair: Pair) -> dict[str, Strategy]:
    """The strategies that the loaded models and the settings allow, the default one first."""
    trained = pair.selector_config
    default = config.strategy or pair.default_strategy
    found = {default: None} | dict.fromkeys(name for name in SERVED if name not in MANY_SAMPLES)
    strategies: dict[str, Strategy] = {}
    for name in found:
        own = trained if name in NEEDS_ADAPTER else None
        try:
            pair.check_has(name)
            strategy = strategy_of(name, config, own)
            if pair.served_slm is not None:
                pair.served_slm.check(strategy)
            strategies[name] = strategy
        except S2TError:
            if name == default:
                raise
    return strategies


def read_key(config: ServeConfig) -> str | None:
    """The key that clients must send, if any; raises ConfigError for one that cannot be sent."""
    if config.api_key_file is None:
        key = os.environ.get(KEY_VARIABLE)
        source = KEY_VARIABLE
    else:
        source = config.api_key_file
        try:
            key = Path(source).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_key_file {source} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the key in {source} must be printable ASCII without spaces, and not empty.")
    return key


def check_address(config: ServeConfig, key: str | None) -> None:
    """Raise ConfigError where others could reach the server and no key is asked for."""
    if key is None and not config.no_auth and not is_loopback(config.host):
        raise ConfigError(
            f"others may reach {config.host}, and no key is set; set {KEY_VARIABLE} or --api-key-file, or pass --no-auth."
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host."
        ) from error


class DrainingServer(uvicorn.Server):
    """Uvicorn, with running requests drained before it stops to listen: /health says so until then."""

    def __init__(self, app: FastAPI, service: Service, config: ServeConfig) -> None:
        settings = uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=timed_protocol(service.metrics.count_slow_head),
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
        )
        settings.timeout_graceful_shutdown = _LAST_WORDS_S  # type: ignore[assignment]  # a fraction will do
        super().__init__(settings)
        self.service, self.drain_s, self.is_signalled = service, config.drain_s, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; whatever holds this process up then, it ends in time."""
        if not self.is_signalled:
            self.is_signalled = True
            clock = threading.Timer(self.drain_s + _LAST_S, os._exit, (0,))
            clock.daemon = True
            clock.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.service.drain(self.drain_s, lambda: self.force_exit)
        await super().shutdown(sockets)
