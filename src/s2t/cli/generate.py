"""`s2t generate`: one prompt, answered on stdout as it is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.reasoner import open_reasoner, say_who_answers
from s2t.config import GenerateConfig
from s2t.errors import ConfigError


def show(document: dict[str, Any]) -> None:
    print(document["text"])


@with_options(GenerateConfig, show)
def command(
    config: GenerateConfig,
    as_json: bool,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)],
    trace: Annotated[str | None, typer.Option("--trace", help="Write every step to this file as JSON lines.")] = None,
) -> Any:
    """Answer one prompt, streamed to stdout (with --trace or --json, once it is complete)."""
    text = _read_prompt(prompt)
    reasoner = open_reasoner(config)
    if trace is None and not as_json:
        pieces = reasoner.stream(
            text, strategy=config.strategy, seed=config.seed, config=config
        )  # raises for what cannot be asked
        say_who_answers(config)
        return _stream(pieces)
    generation = reasoner.generate(
        text, strategy=config.strategy, seed=config.seed, trace=trace is not None, config=config
    )
    say_who_answers(config)
    if trace is not None:
        _write_trace(Path(trace), generation.steps)
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "num_steps": len(generation.steps),
        "num_triggered": sum(step.fired for step in generation.steps),
        "num_flips": sum(step.fired and step.flip for step in generation.steps),
        "cost": generation.cost,
        "engine": reasoner.pair.slm.facts if reasoner.pair.served_slm is None else None,
    }


def _read_prompt(prompt: str) -> str:
    text = sys.stdin.read().strip() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt is empty; give it as an argument, or - to read it from stdin.")
    return text


def _stream(pieces: Any) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write_trace(path: Path, steps: Sequence[Any]) -> None:
    from s2t.files import write_text

    lines = [json.dumps({**asdict(step), "flip": step.flip}) for step in steps]
    write_text(path, "".join(f"{line}\n" for line in lines))
