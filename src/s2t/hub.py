"""Whether the Hugging Face hub answers: asked once, so that a machine without a network goes on from its cache at once.

The hub's own client tries every file again and again, for minutes, before it says that there is no network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMEOUT_S = 10.0
_SILENT_S = 60.0  # for which a hub that did not answer is not asked again
_ANSWERED: set[str] = set()  # endpoints that answered this process
_ASKED: dict[str, float] = {}  # when the others did not


@contextmanager
def offline_unless_it_answers() -> Iterator[None]:
    """Within it the hub's libraries read their cache alone where the hub does not answer; as they were afterwards.

    Nothing is asked where they are offline already (HF_HUB_OFFLINE=1). Any answer will do, also one of a mirror
    (HF_ENDPOINT) that refuses the request.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    settings: Any = constants
    settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    if endpoint in _ANSWERED:
        return True
    if time.monotonic() - _ASKED.get(endpoint, -_SILENT_S) < _SILENT_S:
        return False
    from huggingface_hub import get_session

    session: Any = get_session()
    try:
        session.head(endpoint, timeout=_TIMEOUT_S)
    except Exception:  # of the HTTP library, which differs between versions of the hub's client
        _ASKED[endpoint] = time.monotonic()
        return False
    _ANSWERED.add(endpoint)
    return True
