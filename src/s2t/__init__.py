"""Select to Think: a small model proposes tokens, a selector picks where it matters.

The public names are loaded on first use, so that `import s2t` stays instant and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2t.api import generate, load, stream
    from s2t.integrations.transformers import custom_generate

__version__ = "0.1.0"
__all__ = ["__version__", "custom_generate", "generate", "load", "stream"]


def __getattr__(name: str) -> Any:
    if name == "custom_generate":
        from s2t.integrations.transformers import custom_generate

        return custom_generate
    if name in __all__:
        from s2t import api

        return getattr(api, name)
    raise AttributeError(f"module 's2t' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
