"""An SLM on servers, for pairs: what its servers run is asked once, and every run gets a decoder of `remote.slm`.

Loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s2t.decode.remote.blocking import BlockingClient
from s2t.decode.remote.client import RemoteSettings
from s2t.decode.remote.plugged import has_plugin
from s2t.decode.remote.selector import ServedSelector, check_apart, check_strategy, served_selector
from s2t.decode.remote.slm import RemoteDecoder
from s2t.methods.strategies import Strategy
from s2t.model.loaded import LoadedModel


@dataclass
class ServedSLM:
    """An SLM on servers: the client, and how its selector is read, if it has one."""

    client: BlockingClient
    loaded: LoadedModel
    selector: ServedSelector | None
    has_plugin: bool = False
    """Whether all servers run the logits processor of `s2t`."""
    max_length: int | None = None
    """Longest prompt and reply that they take, if they say so."""

    @classmethod
    def connect(
        cls, loaded: LoadedModel, settings: RemoteSettings, lora: str | None, needs_selector: bool
    ) -> ServedSLM:
        """Ask the servers what they serve; raises ConfigError, ModelError or RemoteError, one line, for what cannot work."""
        client = BlockingClient(settings)
        try:
            name, models, plugin = client.model_name(), client.models(), False
            selector = served_selector(loaded, models, lora) if needs_selector else None
            if selector is not None and selector.lora is not None:
                client.run(partial(check_apart, selector))
            if selector is not None:
                forbidden = sorted(loaded.reserved.all)
                plugin = client.run(lambda inner: has_plugin(inner, name, selector, forbidden))
        except BaseException:
            client.close()
            raise
        lengths = [int(model["max_model_len"]) for model in models if model.get("max_model_len")]
        return cls(client, loaded, selector, plugin, min(lengths, default=None))

    def decoder(
        self,
        strategy: Strategy,
        max_new_tokens: int,
        trace: bool = False,
        ends: Callable[[int, int], bool] | None = None,
        num_rows: int = 64,
    ) -> RemoteDecoder:
        """A decoder for one run."""
        uses = self.selector if strategy.name == "s2t-local" else None
        return RemoteDecoder(
            self.client,
            self.loaded,
            strategy,
            uses,
            max_new_tokens,
            trace,
            ends,
            num_rows,
            self.has_plugin,
            self.max_length,
        )

    def check(self, strategy: Strategy) -> None:
        """Raise ConfigError for a strategy or trigger that these servers cannot run."""
        check_strategy(strategy, self.selector if strategy.name == "s2t-local" else None)

    def take_report(self) -> dict[str, Any]:
        """Where the SLM runs and what asking it took since this was last called, as JSON values."""
        counts, settings = self.client.take_counts(), self.client.settings
        where = {"model": self.client.model_name(), "urls": list(settings.urls), "has_plugin": self.has_plugin}
        return where | counts.as_dict()
