"""The way of a token, as docs/method.md tells it: the stations are there, and a token comes by in their order."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import s2t

ROOT = Path(s2t.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "method.md"
STATION = re.compile(r"^\| (\d) \| .* \| `([\w/]+\.py)` \| `([\w.]+)` \|$", re.MULTILINE)


def stations():
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## The way of a token") : text.index("## One loop")]
    return [(file, function) for _, file, function in STATION.findall(section)]


def test_it_opens_the_page_with_seven_stations():
    text = PAGE.read_text(encoding="utf-8")
    assert text.index("## The way of a token") == text.index("## ")
    assert len(stations()) == 7


def test_a_token_comes_by_in_their_order():
    numbers = {station: str(i) for i, station in enumerate(stations(), 1)}
    reasoner = s2t.load(slm="tiny:slm", llm="tiny:llm")
    seen = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            file = Path(code.co_filename).relative_to(ROOT).as_posix()
            seen.append(numbers.get((file, code.co_qualname), ""))

    sys.setprofile(watch)
    try:
        done = reasoner.generate("What is 17 + 25?", strategy="s2t", threshold=0.5)
    finally:
        sys.setprofile(None)
    way = "".join(seen)
    assert way.startswith("12")
    assert way.count("34567") == sum(c == "5" for c in way) > 0, "a triggered round goes by all stations"
    assert not re.sub("34567|3467|367", "", way[2:]), "where nothing fired, or no row was ready, the order is the same"
    assert done.num_triggered > 0
