"""`s2t serve`: load the models once, then answer over HTTP until it is stopped."""

from __future__ import annotations

from typing import Any

from s2t.cli.options import with_options
from s2t.config import ServeConfig


@with_options(ServeConfig, lambda document: None)
def command(config: ServeConfig) -> Any:
    """Serve the model over an OpenAI-compatible API, with a playground at /."""
    from s2t.api import open_reasoner
    from s2t.serve.run import check, serve

    check(config)  # before models are loaded
    serve(config, open_reasoner(config).pair)
