"""Entry of the command line: the table of commands, and where errors become one line and an exit code.

A workflow has its command in `cli.work`; any other one is a file here and a line in `COMMANDS`. Exit codes: 0 done, 1 failure,
2 a mistake in use, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from s2t import __version__
from s2t.cli import chat, demo, evaluate, generate, report, reproduce, serve, study, work
from s2t.errors import S2TError

COMMANDS = {
    "demo": demo.command,
    "measure": work.COMMANDS["measure"],
    "calibrate": work.COMMANDS["calibrate"],
    "collect": work.COMMANDS["collect"],
    "train": work.COMMANDS["train"],
    "train-router": work.COMMANDS["train-router"],
    "distill": work.COMMANDS["distill"],
    "merge": work.COMMANDS["merge"],
    "export": work.COMMANDS["export"],
    "push": work.COMMANDS["push"],
    "generate": generate.command,
    "chat": chat.command,
    "eval": evaluate.command,
    "report": report.command,
    "serve": serve.command,
    "study": study.command,
    "reproduce": reproduce.command,
    "bench": work.COMMANDS["bench"],
}

RESUMED = ("demo", "measure", "collect", "train", "train-router", "distill", "eval", "study", "reproduce")
INTERRUPTED = 130
USAGE_ERROR = typer.BadParameter.__mro__[1]  # UsageError, which Typer keeps to itself
DISK_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; print at most one line to stderr when it fails, and return the exit code."""
    words, is_debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = build_app()(args=words or ["--help"], prog_name="s2t", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # Typer turns Ctrl-C into a quiet exit
            raise KeyboardInterrupt
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing to say
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if is_debug:
            traceback.print_exc()
        line, code = describe(error)
        if code == INTERRUPTED and words[:1] and words[0] in RESUMED:
            line += "; run the same command again to go on from there"
        print(f"s2t: {line}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def build_app() -> typer.Typer:
    """The Typer application with every command of `COMMANDS`."""
    app = typer.Typer(name="s2t", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def describe(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for an error that ended a command."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted", INTERRUPTED
    if isinstance(error, S2TError):
        return f"error: {_one_line(error)}", error.exit_code
    if isinstance(error, USAGE_ERROR):
        return f"error: {_usage_line(error)}", 2
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        name = f" {error.filename}" if error.filename else ""
        return (
            f"error: cannot read or write{name}: {error.strerror}; free the space or choose another path.",
            2,
        )
    text = f"{type(error).__name__}: {_one_line(error)}".rstrip(": ")
    return f"error: {text} (run with --debug for the traceback)", 1


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"s2t {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Select to Think: a small model proposes tokens, a selector picks where it matters."""


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take --debug out wherever it stands, so `s2t --debug measure` and `s2t measure --debug` agree."""
    end = words.index("--") if "--" in words else len(words)
    options = words[:end]
    return [word for word in options if word != "--debug"] + words[end:], "--debug" in options


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _usage_line(error: BaseException) -> str:
    message = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "s2t"
    return f"{message}; see: {path} --help"
