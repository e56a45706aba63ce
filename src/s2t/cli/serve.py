"""`s2t serve`: load the models once, then answer over HTTP until it is stopped."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from s2t.cli.options import with_options
from s2t.config import RemoteConfig, ServeConfig


@with_options(ServeConfig, lambda document: None)
def command(config: ServeConfig) -> Any:
    """Serve the model over an OpenAI-compatible API, with a playground at /."""
    from s2t.api import load
    from s2t.serve.run import check, serve

    check(config)  # before models are loaded
    reasoner = load(
        config.slm,
        llm=config.llm,
        adapter=config.adapter,
        llm_revision=config.llm_revision,
        llm_quantization=config.llm_quantization,
        slm_url=config.slm_url,
        slm_lora=config.slm_lora,
        chat_template_kwargs=config.chat_template_kwargs,
        **config.load_options,
        **{item.name: getattr(config, item.name) for item in fields(RemoteConfig)},
    )
    serve(config, reasoner.session)
