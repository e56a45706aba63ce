"""Stop strings: where a text ends, which pieces of it are safe to show, and when a sequence of a run is over.

Knows tokens and text, not models; the decoding loop asks `Stops.ends` and knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from s2t.model.chat import Detokenizer


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class StoppingText:
    """Ids of one sequence in, text pieces out, up to a stop string; no piece ever holds any part of one.

    Text that may become a stop string is held back until it is clear that it does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.is_over = False
        self.num_read = 0
        """Characters that became certain, shown or not."""
        self._text = Detokenizer(tokenizer)
        self._held = ""  # known, not yet shown

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        return self._add(self._text.push(token_id))

    def finish(self) -> str:
        """Whatever was held back, when no more tokens come."""
        piece = self._add(self._text.finish())
        if self.is_over:
            return piece
        piece, self._held = piece + self._held, ""
        return piece

    def _add(self, piece: str) -> str:
        self.num_read += len(piece)
        if self.is_over:
            return ""
        self._held += piece
        if any(stop in self._held for stop in self.stops):
            self.is_over = True
            shown, self._held = cut(self._held, self.stops), ""
            return shown
        end = len(self._held) - max((_overlap(self._held, stop) for stop in self.stops), default=0)
        shown, self._held = self._held[:end], self._held[end:]
        return shown


class Stops:
    """The stop strings of one run; `ends` is the hook of the decoding loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.content in self.stops)
        self._texts: dict[int, StoppingText] = {}

    def ends(self, request: int, token_id: int) -> bool:
        """True when this token completes a stop string of a request; to be called for every token, in order.

        A stop string that is a token of its own (`<|im_end|>`, say) is no text, so its id is looked at as well.
        """
        if token_id in self.ids:
            return True
        if request not in self._texts:
            self._texts[request] = StoppingText(self.tokenizer, self.stops)
        text = self._texts[request]
        text.push(token_id)
        return text.is_over


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
