"""Draw docs/images/flip.png (and flip-narrow.png, for phones): one question answered without and with a selector.

    python docs/make_picture.py --adapter runs/demo/train/adapter     # of `make demo`, or another one of the embedded SLM

Everything in the picture is read from a real trace of the two answers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.patches import FancyBboxPatch

import s2t
from s2t.api import Generation
from s2t.records import Step
from s2t.tasks.graders import extract_answer
from s2t.traces import TokenTexts

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUESTION = "A boy has 21 toys. His cousin has 5 fewer toys than he has. How many toys do they have together?"
GOLD = "37"
INK, MUTED, RIGHT, WRONG, FLIP, FIRED = "#1d2733", "#5b6875", "#19703f", "#b3261e", "#f6b26b", "#d6e6f5"
SHOWN = 4  # candidates in the picture; the others have next to no probability


@dataclass(frozen=True)
class Shape:
    """Where things stand: inches of the whole, then fractions of it (left, bottom, width, height)."""

    size: tuple[float, float]
    text: str
    question: tuple[float, float]
    answers: tuple[tuple[float, float, float, float], ...]
    heading: tuple[float, float]
    bars: tuple[tuple[float, float, float, float], ...]


SHAPES = {
    "flip.png": Shape(
        size=(9, 2.3),
        text=QUESTION,
        question=(0.025, 0.92),
        answers=((0.02, 0.03, 0.33, 0.8), (0.355, 0.03, 0.33, 0.8)),
        heading=(0.705, 0.78),
        bars=((0.74, 0.06, 0.12, 0.52), (0.86, 0.06, 0.12, 0.52)),
    ),
    "flip-narrow.png": Shape(  # for a phone: one below the other
        size=(3.3, 6.3),
        text=QUESTION.replace("His", "\nHis").replace("How", "\nHow"),
        question=(0.05, 0.93),
        answers=((0.03, 0.56, 0.94, 0.29), (0.03, 0.26, 0.94, 0.29)),
        heading=(0.05, 0.23),
        bars=((0.15, 0.02, 0.33, 0.17), (0.55, 0.02, 0.33, 0.17)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="runs/demo/train/adapter")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images"))
    given = parser.parse_args()
    model = s2t.load("tiny:slm", adapter=given.adapter)
    texts = TokenTexts(model.pair.slm.tokenizer)
    answers = {name: model.generate(QUESTION, name, trace=True) for name in ("greedy", "s2t-local")}
    flips = [step for step in answers["s2t-local"].steps if step.flip]
    if not flips:
        raise SystemExit(f"the adapter {given.adapter} flips no token of this answer; try another one.")
    for name, shape in SHAPES.items():
        draw(shape, answers, flips[0], texts).savefig(given.out / name, dpi=200)
        print(f"wrote {given.out / name}")


def draw(shape: Shape, answers: dict[str, Generation], flip: Step, texts: TokenTexts) -> plt.Figure:
    """The question, both answers, and the candidates of the flip."""
    figure = plt.figure(figsize=shape.size, facecolor="white")
    figure.text(*shape.question, shape.text, fontsize=10.5, color=INK, va="center", linespacing=1.4)
    for place, (name, answer) in zip(shape.answers, answers.items(), strict=True):
        _answer(figure.add_axes(place), name, answer, flip, texts)
    _candidates(figure, shape, flip, texts)
    return figure


def _answer(axes: plt.Axes, name: str, answer: Generation, flip: Step, texts: TokenTexts) -> None:
    """One answer in a box, token by token: where it triggered is shaded, where it flipped is framed."""
    axes.set(xlim=(0, 42), ylim=(6.2, 0))
    axes.axis("off")
    axes.add_patch(FancyBboxPatch((0.6, 0.3), 39.8, 5.4, "round,pad=0,rounding_size=.4", fc="#f7f9fb", ec="#d5dde5"))
    is_right = extract_answer(answer.text, gold_is_number=True) == GOLD
    axes.text(1.6, 1.1, name, fontsize=10, color=INK, weight="bold", va="center")
    verdict, colour = ("✓ right", RIGHT) if is_right else ("✗ wrong", WRONG)
    axes.text(39.4, 1.1, verdict, fontsize=10, color=colour, weight="bold", va="center", ha="right")
    line, column = 2.45, 1.6
    for step in answer.steps[:-1]:  # the last one is the stop token
        text = texts.text(step.token_id)
        if text == "\n":
            line, column = line + 1.25, 1.6
            continue
        is_flip = step.index == flip.index
        shade = FLIP if step.flip else "#f3c9c5" if is_flip else FIRED if step.fired else "none"
        if shade != "none":
            offset = len(text) - len(text.lstrip())
            box = (column + offset - 0.1, line - 0.52), len(text.strip()) + 0.2, 1.04
            axes.add_patch(FancyBboxPatch(*box, "round,pad=0,rounding_size=.15", fc=shade, ec="none"))
        for character in text:
            weight = "bold" if is_flip else "normal"
            axes.text(column + 0.5, line, character, ha="center", va="center", fontsize=8.8, color=INK, weight=weight,
                      family="DejaVu Sans Mono")  # fmt: skip
            column += 0.92


def _candidates(figure: plt.Figure, shape: Shape, flip: Step, texts: TokenTexts) -> None:
    """Bars: how likely each candidate is as the SLM writes, and as it selects."""
    assert flip.candidates is not None and flip.scores is not None
    written = np.exp(flip.candidates.logprobs)
    selected = np.exp([score if score is not None else -np.inf for score in flip.scores])
    figure.text(*shape.heading, "its own candidates for that token", fontsize=9, color=INK, va="center")
    columns = ("as it writes", written), ("as it selects", selected / selected.sum())
    for place, (title, probs) in zip(shape.bars, columns, strict=True):
        axes = figure.add_axes(place)
        axes.set(xlim=(0, 1.4), ylim=(SHOWN - 0.4, -0.6), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        best = int(np.argmax(probs))
        for index in range(SHOWN):
            colour = "#b9c6d2" if index != best else FLIP if index == flip.selected_index else "#e9958e"
            axes.barh(index, probs[index], height=0.62, color=colour)
            axes.text(probs[index] + 0.05, index, f"{probs[index]:.0%}", va="center", fontsize=8.4, color=INK)  # fmt: skip
            if place is shape.bars[0]:
                weight = "bold" if index in (0, flip.selected_index) else "normal"
                axes.text(-0.12, index, texts.text(flip.candidates.ids[index]).strip() or "␣", ha="right", va="center",
                          fontsize=9.5, family="DejaVu Sans Mono", color=INK, weight=weight)  # fmt: skip
        axes.set_title(title, fontsize=8.4, color=MUTED, loc="left", pad=3)


if __name__ == "__main__":
    main()
