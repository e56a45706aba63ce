"""A config dataclass becomes the options of a command: names, types, defaults and help come from its fields.

The help of a field is the string beneath it. Only values given on the command line are passed on, so that
flag beats file beats default. Knows dataclasses and Typer, not what any setting means.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

import typer

from s2t.cli.output import json_text
from s2t.config import build_config

USED = (
    *("slm", "llm", "adapter", "strategy", "strategies", "policy", "method", "work", "groups", "task", "calibration"),
    *("limit", "out", "seed", "host", "port", "max_new_tokens", "batch_size", "num_candidates", "trigger_rates"),
    *("readout", "learning_rate", "epochs", "lora_rank", "base", "training", "split", "quantile", "threshold", "stop"),
)
"""The settings that people use; the first ten that a command has stand before all others."""
NUM_FIRST = 10
PANELS = {
    "ModelConfig": "How models are loaded",
    "EngineConfig": "How models are loaded",
    "ChatConfig": "How models are loaded",
    "RemoteConfig": "Models on servers",
    "ShardConfig": "Models on servers",
    "ServedConfig": "Models on servers",
    "TaskConfig": "Problems and who works them",
    "StepConfig": "How tokens are chosen",
    "DecodeConfig": "How tokens are chosen",
    "ReadoutConfig": "The selector",
    "FitConfig": "Fitting",
}
FIRST_PANEL = "Options"
OWN_PANEL = "More of this command"
COMMON_PANEL = "Every command"

COMMON = {
    "config_file": (str | None, None, "--config", "JSON file of settings, or a run's manifest.json."),
    "as_json": (bool, False, "--json", "Print one JSON document to stdout."),
    "debug": (bool, False, "--debug", "Show the traceback when something fails."),
}


def with_options(
    config_class: type[Any], show: Callable[..., None]
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn `function(config, ...) -> document` into a Typer command with an option per config field.

    Further parameters of the function are its own Typer arguments and options; `as_json` is passed when
    the function asks for it. The document goes to `show` (with `config` and those arguments that `show` asks for), or to
    stdout as JSON with --json; while a command runs under --json whatever else it prints goes to stderr. None is not printed.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        own = _own_parameters(function)

        def command(**values: Any) -> None:
            common = {name: values.pop(name) for name in COMMON}
            arguments = {parameter.name: values.pop(parameter.name) for parameter in own}
            if "as_json" in inspect.signature(function).parameters:
                arguments["as_json"] = common["as_json"]
            config = build_config(config_class, common["config_file"], values)
            _run(function, config, arguments, show, common["as_json"])

        command.__doc__ = function.__doc__
        command.__dict__["__signature__"] = Signature([*own, *_field_parameters(config_class), *_common()])
        return command

    return decorate


@lru_cache
def field_docs(config_class: type[Any]) -> dict[str, str]:
    """The string beneath each field, inherited classes included; a nearer class's string wins."""
    docs: dict[str, str] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        docs.update(_own_docs(owner))
    return docs


def _run(
    function: Callable[..., Any],
    config: Any,
    arguments: dict[str, Any],
    show: Callable[..., None],
    as_json: bool,
) -> None:
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        document = function(config, **arguments)
    if document is None:
        return
    if as_json:
        print(json_text(document))
    else:
        asked = inspect.signature(show).parameters
        show(document, **{name: value for name, value in {"config": config, **arguments}.items() if name in asked})


def _own_parameters(function: Callable[..., Any]) -> list[Parameter]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [
        parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for parameter in parameters
        if parameter.name not in ("config", "as_json")
    ]


def _field_parameters(config_class: type[Any]) -> list[Parameter]:
    """An option per setting: those that people use first, the others panel by panel."""
    hints, docs = get_type_hints(config_class), field_docs(config_class)
    panels = _panels(config_class)
    shown = [item for item in fields(config_class) if item.init]
    place = {item.name: index for index, item in enumerate(shown)}
    order = [FIRST_PANEL, OWN_PANEL, *dict.fromkeys(PANELS.values())]

    def rank(item: Field[Any]) -> tuple[int, int]:
        panel = panels[item.name]
        is_listed = panel == FIRST_PANEL and item.name in USED
        return order.index(panel), USED.index(item.name) if is_listed else len(USED) + place[item.name]

    parameters = []
    for item in sorted(shown, key=rank):
        info = typer.Option(
            _declaration(item.name, hints[item.name]),
            help=_escape(_help(item, docs.get(item.name, ""))),
            show_default=False,
            hidden=bool(item.metadata.get("hidden")),
            rich_help_panel=panels[item.name],
        )
        parameters.append(_parameter(item.name, hints[item.name] | None, None, info))
    return parameters


def _common() -> list[Parameter]:
    return [
        _parameter(
            name,
            kind,
            default,
            typer.Option(flag, help=text, show_default=False, rich_help_panel=COMMON_PANEL),
        )
        for name, (kind, default, flag, text) in COMMON.items()
    ]


def _parameter(name: str, kind: Any, default: Any, info: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _declaration(name: str, kind: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"


def _help(item: Field[Any], doc: str) -> str:
    default = item.default if item.default is not MISSING else None
    if default is None:
        return doc
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    return f"{doc} [default: {shown}]".strip()


def _escape(text: str) -> str:
    """Square brackets as text, not as Rich markup (`rich.markup.escape`, without importing Rich)."""
    return text.replace("[", "\\[")


def _panels(config_class: type[Any]) -> dict[str, str]:
    """The panel of every setting: the first one for what people use (of a short command: for all), else that of the class that
    first declared it.
    """
    names = [item.name for item in fields(config_class)]
    first = names if len(names) <= NUM_FIRST else [name for name in USED if name in names][:NUM_FIRST]
    return {name: FIRST_PANEL if name in first else _panel(config_class, name) for name in names}


def _panel(config_class: type[Any], name: str) -> str:
    owners = [owner for owner in config_class.__mro__ if name in inspect.get_annotations(owner)]
    return PANELS.get(owners[-1].__name__, OWN_PANEL)


def _own_docs(owner: type[Any]) -> dict[str, str]:
    node = _class_node(inspect.getsourcefile(owner) or "", owner.__name__)
    if node is None:
        return {}
    return {
        left.target.id: " ".join(right.value.value.split())
        for left, right in zip(node.body, node.body[1:], strict=False)
        if isinstance(left, ast.AnnAssign)
        and isinstance(left.target, ast.Name)
        and isinstance(right, ast.Expr)
        and isinstance(right.value, ast.Constant)
        and isinstance(right.value.value, str)
    }


def _class_node(path: str, name: str) -> ast.ClassDef | None:
    return next((node for node in _tree(path).body if isinstance(node, ast.ClassDef) and node.name == name), None)


@lru_cache
def _tree(path: str) -> ast.Module:
    try:
        with open(path, encoding="utf-8") as file:
            return ast.parse(file.read())
    except OSError:
        return ast.Module(body=[], type_ignores=[])  # no source beside the package: options without help
