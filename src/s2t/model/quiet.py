"""Silence for libraries that load models: their warnings and bars are left out, and a bar of ours moves instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from s2t.progress import Bar


class quiet:
    """Silence progress bars and warnings of transformers and the hub while loading; restores them after.

    A bar of our own advances with the tensors that transformers reads.
    """

    def __init__(self, bar: Bar | None = None) -> None:
        self.bar = bar

    def __enter__(self) -> None:
        self.hub_verbosity = hub_logging.get_verbosity()
        hub_logging.set_verbosity_error()
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.hook = transformers_logging.set_tqdm_hook(self._watch) if self.bar is not None else None

    def __exit__(self, *exc: object) -> None:
        hub_logging.set_verbosity(self.hub_verbosity)
        transformers_logging.set_verbosity(self.verbosity)
        if self.bar is not None:
            transformers_logging.set_tqdm_hook(self.hook)
        if self.bars:
            transformers_logging.enable_progress_bar()

    def _watch(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What transformers gets in place of a bar; one over tensors (or files) moves ours."""
        if not args or not hasattr(args[0], "__len__") or self.bar is None:
            return factory(*args, **kwargs)
        self.bar.total = self.bar.done + len(args[0])
        return self._each(args[0])

    def _each(self, items: Any) -> Iterator[Any]:
        for item in items:
            yield item
            if self.bar is not None:
                self.bar(1)
