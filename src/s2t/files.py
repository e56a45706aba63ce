"""Run folders and the files in them: every write is atomic, every manifest says what made the folder.

A run folder belongs to one command with one config; it becomes final only when the command says so. Knows
nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from s2t.config import config_dict
from s2t.errors import ConfigError, DataError
from s2t.shards import check_whole, digests

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "manifest.json"
_PACKAGES = ("s2t", "torch", "transformers", "peft")
_ABSENT = object()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; DataError when the place cannot be written, or the text holds half of a character."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(
            f"{path} cannot be written: its text holds {half}, half of a character; take it out."
        ) from error
    write_bytes(path, data)


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines as UTF-8, each ended by a newline, atomically and without holding them all in memory."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)

    _write_atomically(Path(path), write)


def write_json(path: str | Path, obj: Any) -> None:
    """Write one indented JSON document atomically; numpy values, paths and dataclasses become plain JSON."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, default=_plain) + "\n")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes atomically, unless they are there already; DataError when the place cannot be written."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    if not _holds(Path(path), data):
        _write_atomically(Path(path), write)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:  # not there, or not to be read: to be written
        return False


def write_table(path: str | Path, table: pyarrow.Table) -> None:
    """Write one parquet file atomically; DataError when the place cannot be written."""
    from pyarrow import parquet

    def write(temporary: Path) -> None:
        parquet.write_table(table, temporary)

    _write_atomically(Path(path), write)


def read_json(path: str | Path, takes_halves: bool = False) -> Any:
    """The JSON document at `path`; DataError when it is missing or not JSON."""
    return parse_json(_read_text(Path(path)), str(path), "write it again", takes_halves)


def parse_json(text: str, where: str, next_step: str = "fix it", takes_halves: bool = False) -> Any:
    """The value of a JSON text; DataError names `where` it stands, whatever the parser raises.

    So are numbers and nestings that Python does not take, and half of a character (a lone surrogate), which no file can hold;
    a reader that can show such halves takes them.
    """
    try:
        value = json.loads(text)
        if "\\u" in text and not takes_halves:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}: " if "\n" in text.strip() else f"column {error.colno}: "
        raise DataError(f"{where} is not JSON ({place}{error.msg}); {next_step}.") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{where} holds {half}, half of a surrogate pair; {next_step}.") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be read; {next_step}.") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{where} cannot be read as JSON: {_one_line(error)}; {next_step}.") from error
    return value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; DataError names file:line of a bad one."""
    return [row for _, row in read_jsonl_lines(path)]


def read_jsonl_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Like `read_jsonl`, each object with its file:line; blank lines are skipped."""
    return list(iter_jsonl(path))


def iter_jsonl(path: str | Path, takes_halves: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Like `read_jsonl_lines`, with one line in memory at a time."""
    with _readable(Path(path)), Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_object(_decoded(line, file.tell() - len(line)), where, takes_halves)


def read_tables(paths: Iterable[str | Path], columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Concatenate parquet files into one table, in the given order; DataError names an unreadable one."""
    import pyarrow

    tables = [_read_table(Path(path), columns) for path in paths]
    if not tables:
        raise DataError("there are no parquet shards to read; run the command that writes them first.")
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise DataError(f"the parquet shards do not fit together: {_one_line(error)}.") from error


def versions() -> dict[str, str | None]:
    """Versions of s2t, Python, platform, torch, transformers and peft (None: absent); imports none."""
    found: dict[str, str | None] = {name: _version(name) for name in _PACKAGES}
    return found | {"python": platform.python_version(), "platform": platform.platform()}


@dataclass
class RunFolder:
    """One command's output folder; made by `RunFolder.open`, final after `finish`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, command: str, config: Any, ignore: tuple[str, ...] = ()) -> RunFolder:
        """Make the folder, or reopen it for the same command and config (keys in `ignore` may differ).

        A complete run stays complete, so a rerun can see there is nothing left to do. ConfigError when the
        folder holds work of another command or config, or has no name; DataError when it cannot be written.
        """
        if not str(path):
            raise ConfigError("out must name a folder, and is empty; pass --out FOLDER.")
        folder = Path(path)
        values = json.loads(json.dumps(config_dict(config), default=_plain))
        with _usable(folder):
            old = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
            before = sorted(item.name for item in folder.iterdir() if item.name != MANIFEST) if folder.is_dir() else []
            if old is not None and _has_work(folder, old):
                _check_same_run(folder, old, command, values, ignore)
                if old.get("status") == "complete":
                    return cls(folder, old)
                before = _before(old)
        run = cls(folder, _new_manifest(command, values, old) | {"already_there": before})
        run._save()
        return run

    def file(self, name: str) -> Path:
        """The path of a file in this folder."""
        return self.path / name

    def shard(self, prefix: str, index: int, suffix: str) -> Path:
        """The path of one shard, e.g. ("groups", 3, "parquet") -> groups-00003.parquet."""
        return self.path / f"{prefix}-{index:05d}.{suffix}"

    def shards(self, prefix: str, suffix: str) -> list[Path]:
        """The shards that exist, in order of their index."""
        head, tail = f"{prefix}-", f".{suffix}"
        names = [item.name for item in self.path.iterdir()] if self.path.is_dir() else []
        found = [name for name in names if name.startswith(head) and name.endswith(tail)]
        numbered = [name for name in found if name[len(head) : -len(tail)].isdecimal()]
        return [self.path / name for name in sorted(numbered)]

    @property
    def is_complete(self) -> bool:
        """Whether the command has finished this folder."""
        return self.manifest["status"] == "complete"

    def finish(self, **extra: Any) -> None:
        """Mark the run complete and save `extra` and the digests of its shards in the manifest, if that is news.

        Removes what killed processes left half-written.
        """
        for path in self.path.glob(".*.????????.tmp"):
            _remove_quietly(path)
        facts = extra | {"shards": digests(self.path)}
        if not self.is_complete or any(self.manifest.get(key) != value for key, value in facts.items()):
            self.manifest.update(facts, status="complete", finished=_now())
            self._save()

    def _save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)


def load_run(path: str | Path, command: str) -> dict[str, Any]:
    """The manifest of a complete run of `command`; DataError when the folder is anything else, or its shards are not those
    that the run wrote: one is gone, doubled or changed."""
    file = Path(path) / MANIFEST
    if not os.path.exists(file):
        raise DataError(f"{path} is not a run folder (no {MANIFEST}); run s2t {command} --out {path} first.")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("command") != command:
        got = manifest.get("command") if isinstance(manifest, dict) else None
        raise DataError(f"{path} must be a folder written by s2t {command}; got one of s2t {got}.")
    if manifest.get("status") != "complete":
        raise DataError(f"{path} is an unfinished run of s2t {command}; rerun the same command to finish it.")
    check_whole(Path(path), manifest)
    return manifest


def _before(old: Any) -> list[str]:
    """What lay in the folder when its manifest was made."""
    found = old.get("already_there") if isinstance(old, dict) else None
    return found if isinstance(found, list) else []


def _has_work(folder: Path, old: Any) -> bool:
    """False for a run that ended before it wrote anything, such as one started with a mistyped setting."""
    is_running = isinstance(old, dict) and old.get("status") == "running"
    return not is_running or any(item.name not in (MANIFEST, *_before(old)) for item in folder.iterdir())


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name that no folder can have, too
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise DataError(f"{str(folder)[:200]} cannot be used: {reason}; choose another --out.") from error


# Other servers go on with a run; an LLM in this process lists other tokens than one on servers.
_THERE_OR_NOT = ("llm_url",)


def _check_same_run(folder: Path, old: Any, command: str, values: dict[str, Any], ignore: tuple[str, ...]) -> None:
    next_step = "choose another --out, or remove the folder"
    if not isinstance(old, dict) or not isinstance(old.get("config"), dict):
        raise DataError(f"{folder / MANIFEST} is not a run manifest; {next_step}.")
    if old.get("command") != command:
        raise ConfigError(f"{folder} belongs to s2t {old.get('command')}, not s2t {command}; {next_step}.")
    for key in [*values, *(key for key in old["config"] if key not in values)]:
        before, now = old["config"].get(key, _ABSENT), values.get(key, _ABSENT)
        is_new = before is _ABSENT and now is None  # the folder is older than the setting, which is not given
        is_another = before != now and key not in ignore
        if key in _THERE_OR_NOT and before is not _ABSENT:
            is_another |= bool(before) != bool(now)
        if is_another and not is_new:
            raise ConfigError(f"{folder} was made with {key}={_shown(before)}, now {key}={_shown(now)}; {next_step}.")


def _new_manifest(command: str, values: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "command": command,
        "config": values,
        "seed": values.get("seed"),
        "versions": versions(),
        "status": "running",
        "created": (old or {}).get("created") or _now(),
        "finished": None,
    }


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        next_step = "make room or choose another --out"
        raise DataError(f"{str(path)[:200]} cannot be written: {reason}; {next_step}.") from error
    finally:
        _remove_quietly(temporary)


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError):  # an unusable folder, which the write has already reported
        path.unlink(missing_ok=True)


def _read_text(path: Path) -> str:
    with _readable(path):
        return path.read_text(encoding="utf-8")


def _decoded(line: bytes, start: int) -> str:
    """The text of a line; a mistake in it is counted from the start of the file, where the line is `start` bytes in."""
    try:
        return line.rstrip(b"\n").decode()
    except UnicodeDecodeError as error:
        raise UnicodeDecodeError("utf-8", line, start + error.start, start + error.end, error.reason) from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{str(path)[:200]} cannot be read: {error.strerror or error}; check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _json_object(line: str, where: str, takes_halves: bool = False) -> dict[str, Any]:
    row = parse_json(line, where, "fix that line", takes_halves)
    if not isinstance(row, dict):
        raise DataError(f"{where} must be one JSON object; got {type(row).__name__}; fix that line.")
    return row


def _read_table(path: Path, columns: Sequence[str] | None) -> pyarrow.Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            absent = [name for name in columns or () if name not in names]
            if not absent:
                return file.read(None if columns is None else list(columns))
    except (OSError, pyarrow.ArrowException) as error:
        reason = _one_line(error)
        raise DataError(f"{path} cannot be read as parquet: {reason}; remove it and rerun.") from error
    raise DataError(f"{path} has no column {', '.join(absent)}; it has {', '.join(names)}.")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    to_list = getattr(value, "tolist", None)  # numpy scalars and arrays, without importing numpy
    if to_list is not None:
        return to_list()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _shown(value: Any) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
