"""`s2t chat`: questions line by line, answers streamed; an end of input or /exit leaves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.reasoner import open_reasoner, say_who_answers
from s2t.config import GenerateConfig


@with_options(GenerateConfig, lambda turns: None)  # the answers are on stdout already
def command(
    config: GenerateConfig,
    history: Annotated[
        bool, typer.Option("--history", help="Put earlier questions and answers before each question.")
    ] = False,
) -> Any:
    """Answer questions line by line; each is asked afresh unless --history."""
    reasoner = open_reasoner(config)
    turns: list[dict[str, str]] = []
    for question in _questions():
        prompt = _with_history(turns, question) if history and turns else question
        pieces, answer = [], reasoner.stream(prompt, strategy=config.strategy, seed=config.seed, config=config)
        if not turns:
            say_who_answers(config)
        for piece in answer:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        turns.append({"question": question, "text": "".join(pieces)})
    return turns


def _questions() -> Iterator[str]:
    ask = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _with_history(turns: list[dict[str, str]], question: str) -> list[dict[str, str]]:
    """Earlier turns as messages before the question."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        messages.append({"role": "assistant", "content": turn["text"].strip()})
    return [*messages, {"role": "user", "content": question}]
