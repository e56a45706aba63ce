"""The model card of an adapter folder: what it is, how to run it, what was measured; and the accuracies that any card shows.

Plain text of numbers that others found. Knows no models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

EVAL_FILE = "s2t_eval.json"
"""Beside an adapter: the accuracies of the last `s2t eval --card` of it."""
_SECTION = re.compile(r"## Accuracy\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_OF_BINS = ("num_bins", "score_temperature", "prior_weight")
_KEPT = ("accuracy", "ci95", "num_problems", "trigger_rate", "flip_rate")


def measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a card keeps of an eval run's summary.json: the task, and the accuracy of every strategy with its interval."""
    scores = {strategy: {name: found.get(name) for name in _KEPT} for strategy, found in summary["strategies"].items()}
    return {name: summary[name] for name in ("task", "split", "seed")} | {"strategies": scores}


def accuracy_section(found: Mapping[str, Any] | None) -> str:
    """The section `Accuracy` of a card; empty where nothing was measured."""
    if found is None:
        return ""
    title = f"{found['task']}, split {found['split']}, seed {found['seed']}"
    rows = [
        (
            name,
            f"{100 * scores['accuracy']:.1f}",
            "{:.1f} to {:.1f}".format(*(100 * bound for bound in scores["ci95"])),
            scores["num_problems"],
        )
        for name, scores in found["strategies"].items()
    ]
    return f"## Accuracy\n\n{title}\n\n{_table(('strategy', 'accuracy %', '95 % interval', 'n'), rows)}\n"


def with_accuracy(card: str, found: Mapping[str, Any]) -> str:
    """The card with its section `Accuracy` replaced, or put before the first other one; the rest stays as it is."""
    section = accuracy_section(found)
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    head, mark, rest = card.partition("\n## ")
    return f"{head.rstrip()}\n\n{section}{mark[1:]}{rest}"


def adapter_card(config: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> str:
    """The card of an adapter with these settings (`s2t_config.json`) and, where it was trained, the numbers of its training."""
    front = {"library_name": "s2t", "base_model": config["base_model"], "tags": ["select-to-think", "s2t"]}
    unread = _OF_BINS if config["readout"] == "rank" else ()
    plain = {
        key: value
        for key, value in config.items()
        if value is not None and value != "" and not isinstance(value, (dict, list, tuple)) and key not in unread
    }
    plain |= {"thresholds": json.dumps(config["thresholds"])}
    fitted = {key: value for key, value in (training or {}).items() if isinstance(value, (int, float))}
    return _CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        base=config["base_model"],
        caution="" if config["scope"] == "always" else _CAUTION,
        training=f"## Training\n\n{_table(('', 'value'), _shown(fitted))}\n" if fitted else "",
        settings=_table(("setting", "value"), _shown(plain)),
        version=config["s2t_version"],
    )


def _shown(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in values.items()
    ]


def _table(columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


_CAUTION = """
**Not for `PeftModel`**: this LoRA is for the few readings that choose, not for writing; always on, it spoils the model.
"""

_CARD = """---
{front}
---

# {base} with S2T-LOCAL: the adapter

With it {base} chooses among its own candidates where it is likely to go wrong, with no larger model at inference.

```python
import s2t

print(s2t.load("{base}", adapter="THIS FOLDER").generate("What is 12 * 13?").text)
```

In transformers: `model.generate(..., custom_generate=s2t.custom_generate("THIS FOLDER"))`. `s2t merge` makes one ordinary model
of the two. Loading checks that the base model's weights and this folder's are those it was trained with.
{caution}
{training}## Settings

{settings}
Made by s2t {version}; `s2t_config.json` has every setting. Method: arXiv 2604.26940.
"""
