"""What a text says outside its thinking: the thoughts that models put between markers are no part of an answer.

Knows the markers of many models, and neither tasks nor mathematics.
"""

from __future__ import annotations

import re

# Names that stand in brackets of one of the kinds below; those of one family close each other.
_FAMILIES = {
    "think": r"(?:[a-z]+[_:-])?think(?:ing)?(?:[_-](?:fast|slow|more|step))?|thoughts?|thought[_-]process|unused94",
    "reason": r"reason(?:ing)?|reasoning[_-]content|chain[_-]of[_-]thought|cot",
    "reflect": r"reflect(?:ion)?|self[_-]reflection",
    "scratch": r"scratch[_-]?pad|draft",
    "analysis": r"analysis|deliberation|internal[_-]reasoning",
    "monologue": r"inner[_-]?monologue|inner[_-]?thoughts?|inner[_-]prefix|monologue|ponder",
}
_NAME = "|".join(f"(?P<{family}>{names})" for family, names in _FAMILIES.items())
_EDGES = r"(?:<\|?|&lt;|◁|\[|【) {0,2}"
# Attributes have names: "x < cot x here, 2 > 1" opens nothing.
_ENDS = r"(?:\s+[\w:-]+\s?=[^<>\n]{0,80}|\s{1,2})?(?:\|?>|&gt;|▷|\]|】)"
_BEGIN, _END = r"(?:begin|start)[ _-](?:of[ _-])?", r"/ ?|end[ _-](?:of[ _-])?"
_TAG = rf"{_EDGES}(?P<close>{_END})?(?:{_BEGIN})?(?:{_NAME})(?:[_-](?:start|begin|(?P<behind>end)))?{_ENDS}"
# gpt-oss: channels, as they are and as they read without their special tokens; Granite: sentences; Gemma: numbered tokens.
_OTHER = (
    r"(?P<channel_open><\|?channel\|?>\s*(?:analysis|commentary|thought)\b[^<\n]{0,40}(?:<\|message\|>)?)"
    r"|(?P<channel_close><\|channel\|>\s*final\b[^<\n]{0,40}<\|message\|>|<channel\|>)"
    r"|(?P<bare_close>(?<=[^\s])assistantfinal|<unused95>|<\|?inner_suffix\|?>)"
    r"|(?P<end><\|end\|>)"
    r"|(?P<said_open>^[ \t*#]*here(?:'s|’s| is) my (?:thought|thinking) process\W)"
    r"|(?P<said_close>^[ \t*#]*here(?:'s|’s| is) my response\W)"
)
_MARKER = re.compile(f"{_TAG}|{_OTHER}", re.IGNORECASE | re.MULTILINE)
_SPECIAL = re.compile(
    r"<\|(?:im_end|im_start|end|return|start|message|eot_id|eom_id|endoftext|end_of_text|begin_of_solution|end_of_solution|"
    r"start_response|end_response)\|>(?:assistant\b)?",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile("reasoning|thought", re.IGNORECASE)  # "[draft]" is no marker
_UNOPENED_ANALYSIS = re.compile(r"\A\s*analysis(?=[A-Z])")


def without_thinking(text: str) -> str:
    """The text without its thoughts: those between markers, one that never ended, and all before an end never begun.

    Also without the special tokens that end a message.
    """
    kept: list[str] = []
    open_family, place = None, 0
    if (match := _UNOPENED_ANALYSIS.match(text)) and "assistantfinal" in text:
        open_family, place = "channel", match.end()
    for match in _MARKER.finditer(text):
        family, is_close = _kind(match)
        if match["end"] and open_family != "channel":
            continue
        if match[0][0] in "[【" and family != "think" and not _IN_BRACKETS.search(match[0]):
            continue
        if open_family is None and is_close:
            kept = []  # a thought that the prompt began
        elif open_family is None:
            kept.append(text[place : match.start()])
            open_family = family
            continue
        elif not is_close or family != open_family:
            continue
        open_family, place = None, match.end()
    if open_family is None:
        kept.append(text[place:])
    return _SPECIAL.sub("", "\n".join(kept))


def _kind(match: re.Match[str]) -> tuple[str, bool]:
    """The family of a marker, and whether it closes."""
    if match["channel_open"] or match["said_open"]:
        return ("channel" if match["channel_open"] else "said"), False
    if match["channel_close"] or match["end"] or match["said_close"]:
        return ("said" if match["said_close"] else "channel"), True
    if match["bare_close"]:
        return {"a": "channel", "<": "monologue"}.get(match[0][0], "channel") if "unused" not in match[
            0
        ] else "think", True
    family = next(name for name in _FAMILIES if match[name] is not None)
    return family, (match["close"] or match["behind"]) is not None
