"""A quantization asked for by name, JSON text or JSON file becomes a config of transformers; knows no models.

What a method needs beside that (its package, a GPU) is for transformers to say when the weights are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from s2t.errors import ConfigError, ModelError

NAMED: dict[str, dict[str, Any]] = {
    "bitsandbytes-4bit": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "bitsandbytes-8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
_INSTALL = re.compile(r"pip install [^`.;\n]*(?:\.\d[^`;\s]*)*")


def quantization_config(asked: str | None) -> Any:
    """The transformers config of a quantization; None for None.

    Raises ConfigError for a name, file or method that is not known, ModelError where the method's package is missing.
    """
    if asked is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig  # brings 50 MiB, torch.distributed among them

    values = NAMED[asked] if asked in NAMED else _read(asked)
    try:
        return AutoQuantizationConfig.from_dict(dict(values))
    except ImportError as error:
        raise ModelError(missing_package(asked, error)) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"quantization {asked[:80]} is not understood: {_line(error)[:200]}") from error


def missing_package(asked: str, error: Exception) -> str:
    """One line for a quantization whose package is not there, with the command that installs it."""
    found = _INSTALL.search(str(error))
    package = "bitsandbytes" if asked in NAMED else getattr(error, "name", None)
    command = found[0].strip(" '\"") if found else f"pip install -U {package}" if package else ""
    command = re.sub(r"(?<!')\b(\S+[<>]\S+)(?!')", r"'\1'", command)  # for the shell
    if command:
        return f"quantization {asked[:80]} needs a package that is not installed; run: {command}."
    return f"quantization {asked[:80]} needs a package that is not installed: {_line(error)[:200]}"


def _read(asked: str) -> dict[str, Any]:
    """The JSON object of a text or a file; it has to name its method."""
    text = asked
    if not asked.lstrip().startswith("{"):
        try:
            text = Path(asked).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"quantization must be {', '.join(NAMED)}, a JSON object or a JSON file; got {asked!r}."
            ) from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"quantization {asked[:80]} is not JSON: {error}.") from error
    if not isinstance(values, dict) or "quant_method" not in values:
        raise ConfigError(
            f'quantization {asked[:80]} must be a JSON object with a quant_method, such as {{"quant_method": "hqq"}}.'
        )
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
