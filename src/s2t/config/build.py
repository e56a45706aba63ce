"""A file and flags to one checked config. Flag beats file beats default; an unknown key is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from s2t.config.checks import check_folder, read_variables, require
from s2t.errors import ConfigError

C = TypeVar("C")
_TOO_LARGE = 2**31  # for what numbers of problems, tokens and seeds are passed on to
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def build_config(cls: type[C], file: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> C:
    """Merge defaults, a JSON config file and flags (None = not given) into one checked config.

    Accepts a saved manifest.json too (its `config` object is read). Raises ConfigError for an unreadable
    file, an unknown key, a value of the wrong type, one out of range, or a flag that has no effect beside the others.
    """
    values = _read_config_file(Path(file)) if file is not None else {}
    values |= {key: value for key, value in (flags or {}).items() if value is not None and value != []}
    known = {item.name for item in fields(cls) if item.init}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    require(not unknown, f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    hints = get_type_hints(cls)
    is_json = {item.name for item in fields(cls) if item.metadata.get("json")}  # type: ignore[arg-type]
    values |= {name: json.dumps(read_variables(values[name], name)) for name in is_json if values.get(name) is not None}
    typed = {name: _typed(name, value, hints[name]) for name, value in values.items()}
    if isinstance(typed.get("out"), str):
        check_folder("out", typed["out"])
    config = cls(**typed)
    if (check := getattr(config, "check_given", None)) is not None:
        check({key for key, value in (flags or {}).items() if value is not None and value != []})
    return config


def config_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values, as saved in the manifest."""
    settings = {item.name for item in fields(config) if item.init}
    return {name: value for name, value in asdict(config).items() if name in settings}


def parse_settings(text: str) -> dict[str, Any]:
    """`name=value,name=value` as a dict of numbers, booleans and texts; ConfigError for a part without `=`."""
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, mark, value = part.partition("=")
        if not mark:
            raise ConfigError(f"training must be name=value, comma-separated; got {part!r}.")
        settings[name.strip()] = _literal(value.strip())
    return settings


def parse_override(text: str) -> tuple[str, str]:
    """Name and value of `name=value`, whose value may hold anything; ConfigError without `=`."""
    name, mark, value = text.partition("=")
    if not mark:
        raise ConfigError(f"override must be name=value; got {text!r}.")
    return name.strip(), value.strip()


def read_as(cls: type, name: str, text: str) -> Any:
    """A text as a value of the field that it is for; text where the field takes that."""
    hint = get_type_hints(cls)[name]
    return text if get_origin(hint) is list or str in (get_args(hint) or (hint,)) else _literal(text)


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field has it (a whole number may stand for a float); ConfigError for another kind."""
    if get_origin(hint) is list:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name} must be text or a list of texts; got {value!r}.")
        return list(texts)
    kinds = get_args(hint) or (hint,)
    if float in kinds and int not in kinds and type(value) is int and abs(value) < _TOO_LARGE:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and math.isnan(value)):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ConfigError(f"{name} must be {expected}; got {_shown(value)}.")
    if type(value) is int and abs(value) >= _TOO_LARGE:
        raise ConfigError(f"{name} must be below {_TOO_LARGE}; got {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    """A value in a message, not at any length."""
    try:
        return repr(value)[:200]
    except ValueError:  # a whole number of thousands of digits
        return f"a number of {value.bit_length()} bits"


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(path)[:200]} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # no JSON or UTF-8, a number or nesting that is too large, no path
        raise ConfigError(f"config file {str(path)[:200]} is not JSON: {' '.join(str(error).split())}.") from error
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        data = data["config"]
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold one JSON object; got {type(data).__name__}.")
    return data
