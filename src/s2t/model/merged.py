"""The merged folder as a format: what its `s2t_config.json` says, and whether its weights are still those it names.

Written by `s2t merge` and `s2t export`, read by everything that loads a model, from this machine or the hub. Knows files and
numbers; loads no weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from s2t import __version__
from s2t.errors import ConfigError, DataError, ModelError
from s2t.files import read_json
from s2t.hub import offline_unless_it_answers
from s2t.model.lora import lora_base
from s2t.model.reserved import ReservedIds
from s2t.model.tiny import is_embedded

CONFIG_FILE = "s2t_config.json"
SELECTOR_FILE = "s2t_selector.safetensors"
ADAPTER_FOLDER = "s2t_adapter"
PROBLEMS_FILE = "train_problems.txt"
FORMAT = "s2t-merged"
FORMAT_VERSION = 1
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("*.gguf", "*.safetensors", "*.safetensors.index.json", f"{ADAPTER_FOLDER}/*.safetensors")


@dataclass(frozen=True)
class MergedConfig:
    """How a merged folder was made and how it is read; its `s2t_config.json`."""

    adapter: dict[str, Any]
    """The settings of the adapter, thresholds included."""
    reserved: ReservedIds
    """The ids whose output rows hold the bins and, where criticality is read from two of them, yes and no."""
    vocab_size: int
    """Of the base model, real tokens only: added rows hold none."""
    dtype: str
    """Of the weights."""
    weights: dict[str, str]
    """sha256 of every weights file, by its path in the folder."""
    head: dict[str, float | None] = field(default_factory=dict)
    """`scale` and `softcap` that the model itself puts on its logits; the bins are read without them."""
    eval: dict[str, Any] | None = None
    """Measured accuracies, where a run of `s2t eval` was given."""
    versions: dict[str, str | None] = field(default_factory=dict)
    created: str = ""
    s2t_version: str = __version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    path: str = ""
    """The folder it was read from; not written."""

    @property
    def scope(self) -> str:
        return str(self.adapter["scope"])

    def as_json(self) -> dict[str, Any]:
        """What is written."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


def check_revision(name: str, revision: str | None) -> None:
    """Raise ConfigError for a revision of what is no repository on the hub."""
    if revision is not None and (is_embedded(name) or os.path.exists(name)):
        raise ConfigError(
            f"revision {revision} is one of a repository on the hub, and {name} is not there; leave it out."
        )


def local_folder(name: str, revision: str | None = None) -> str:
    """A merged model of the hub as the folder it was downloaded to; any other name as it is.

    A name that could be a hub id costs one look at the hub (at its cache, when offline). Raises ModelError when the
    download breaks off.
    """
    folder = _downloaded(name, revision, "merged model", is_merged)
    return name if folder is None else str(folder)


def adapter_folder(name: str | Path) -> Path:
    """The folder of a selector adapter: the name itself, or where an adapter of the hub was downloaded to.

    Raises ModelError when the download breaks off.
    """
    return _downloaded(str(name), None, "adapter", lambda folder: not is_merged(folder)) or Path(name)


def _downloaded(name: str, revision: str | None, what: str, fits: Callable[[Path], bool]) -> Path | None:
    """The snapshot of a repository of the hub that has an `s2t_config.json` of the kind asked for; else None."""
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        return None
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    with offline_unless_it_answers():
        try:
            found = cached_file(
                name,
                CONFIG_FILE,
                revision=revision,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError:  # no such repository, which loading says in its own words
            return None
        if found is None or not fits(Path(found).parent):
            return None
        try:
            return Path(snapshot_download(name, revision=revision))
        except Exception as error:  # also the HTTP library's own, which differs between versions of the hub's client
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{what} {name} cannot be downloaded: {reason}; run it again.") from error


def is_merged(name: str | Path) -> bool:
    """Whether this is a folder that `s2t merge` wrote, sound or not."""
    path = Path(name) / CONFIG_FILE
    if not os.path.isfile(path):  # of a name that is no path, too
        return False
    try:
        data = read_json(path)
    except DataError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def read_merged(folder: str | Path) -> MergedConfig:
    """The metadata of a merged folder; raises ModelError where it is damaged or from a newer s2t."""
    path = Path(folder) / CONFIG_FILE
    data = read_json(path)
    if data.get("format_version", 0) > FORMAT_VERSION or data.keys() - {item.name for item in fields(MergedConfig)}:
        raise ModelError(f"{folder} was merged by a newer s2t ({data.get('s2t_version')}); upgrade this one.")
    try:
        ids = data.pop("reserved")
        reserved = ReservedIds(tuple(ids["bins"]), (ids["criticality"][0], ids["criticality"][1]), ids["kind"])
        config = MergedConfig(reserved=reserved, **data | {"path": str(folder)})
        _ = config.scope, config.adapter["base_model"], int(config.vocab_size), dict(config.weights).items()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"merged model {folder} is damaged: {CONFIG_FILE} lacks {error}; merge it again.") from error
    return config


def base_model(name: str, revision: str | None = None) -> str:
    """The model that a merged one, or an adapter in a folder, was made from; any other name as it is."""
    folder = local_folder(name, revision)
    if is_merged(folder):
        return base_model(str(read_merged(folder).adapter["base_model"]))
    return lora_base(folder) or name


def open_merged(name: str | Path) -> MergedConfig | None:
    """Read and check a merged folder; None for anything else.

    Raises ModelError, one line, when it is from a newer s2t or a weights file is missing, added or not what was written.
    """
    if not is_merged(name):
        return None
    config = read_merged(name)
    found = {str(path.relative_to(name)): path for path in weight_files(name)}
    if unlike := sorted(found.keys() ^ config.weights.keys()):
        what = "is missing" if unlike[0] in config.weights else "was not there when it was merged"
        raise ModelError(f"merged model {name} is damaged: {unlike[0]} {what}; merge it again.")
    for file, digest in config.weights.items():
        if sha256(found[file]) != digest:
            raise ModelError(
                f"merged model {name} is damaged: {file} is not the file that was written; merge it again."
            )
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Every file of a merged folder that holds weights or says where they are."""
    return sorted(path for pattern in _WEIGHTS for path in Path(folder).glob(pattern))


def hash_weights(folder: str | Path) -> dict[str, str]:
    """sha256 of every weights file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in weight_files(folder)}


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_hashes(folder: str | Path) -> frozenset[str]:
    """Hashes of the problems that an adapter (a selector's, or a distilled SLM's) or a merged folder was trained on; empty
    without the list."""
    places: Iterable[Path] = (Path(folder) / PROBLEMS_FILE, Path(folder) / ADAPTER_FOLDER / PROBLEMS_FILE)
    return frozenset(word for path in places if os.path.isfile(path) for word in path.read_text().split())


# Writing one


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ConfigError unless a merged folder may be written here: nothing, an empty folder, or one to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not is_merged(out):
        raise ConfigError(f"{out} exists and is no merged model; choose another --out.")
    if not overwrite:
        raise ConfigError(f"{out} holds a merged model; pass --overwrite to replace it, or choose another --out.")


@contextmanager
def written_whole(out: Path, doing: str) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name when the block is over, and is gone if the block fails.

    Raises DataError, one line, where the disk does not take it.
    """
    out = Path(os.path.realpath(out))
    part = out.with_name(f".{out.name}.{doing}")
    try:
        _clear(part)  # what a killed run left
        part.mkdir(parents=True)
        yield part
        _put_in_place(part, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}; choose another --out.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, out: Path) -> None:
    """Rename the whole folder; a previous merge steps aside first, so that no mixture of the two ever has the name."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(part, out)
        return
    old = out.with_name(f".{out.name}.replaced")
    _clear(old)
    os.replace(out, old)
    try:
        os.replace(part, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove a folder with all that is in it, or a link, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
