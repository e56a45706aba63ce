"""How large the house is: what one answer runs through, who imports whom, and how long the files are.

    python benchmarks/shape.py
    PYTHONPATH=OTHER/src python benchmarks/shape.py     # the same of another checkout

An answer is `generate` on the embedded pair, its models loaded before: every function of the package that is called, by
`sys.setprofile`, the files they stand in, and how deep calls of the package lie within each other. The last line is JSON.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import s2t

ROOT = Path(s2t.__file__).parent
PROMPT = "What is 17 + 25 - 8?"
LONGEST = 400
FLOORS = (
    ("errors", "records", "config"),
    ("core", "files", "hub", "progress", "scale", "shards", "tasks", "web", "workers"),
    ("model",),
    ("methods",),
    ("decode",),
    ("combine", "summary", "traces"),
    ("measure", "collect", "train", "merge", "export", "push", "evaluate", "report", "serve"),
    ("api", "demo", "bench", "workflows"),
    ("studies", "reproduce"),
    ("cli", "integrations"),
)
"""Imports point to the left or stay on the floor; tests/test_imports.py holds the package to the same."""


def answered(work: Callable[[], Any]) -> dict[str, int]:
    """Functions, files and depth of some work, over the package alone; comprehensions belong to their function."""
    functions: set[tuple[str, str]] = set()
    deepest = 0
    own = str(ROOT)

    def is_own(frame: FrameType) -> bool:
        code = frame.f_code
        return code.co_filename.startswith(own) and not code.co_name.startswith("<")

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal deepest
        if event != "call" or not is_own(frame):
            return
        functions.add((frame.f_code.co_filename, frame.f_code.co_qualname))
        depth, at = 0, frame
        while at is not None:
            depth, at = depth + is_own(at), at.f_back
        deepest = max(deepest, depth)

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return {"functions": len(functions), "files": len({file for file, _ in functions}), "depth": deepest}


def answers() -> dict[str, dict[str, int]]:
    """One answer of `s2t` and one of `greedy`, after a first one that fills what is made once."""
    reasoner = s2t.load(slm="tiny:slm", llm="tiny:llm")
    settings: dict[str, dict[str, Any]] = {"s2t": {"threshold": 0.5}, "greedy": {}}
    found = {}
    for name, how in settings.items():

        def work(name: str = name, how: dict[str, Any] = how) -> Any:
            return reasoner.generate(PROMPT, strategy=name, **how)

        first = work()
        assert name == "greedy" or first.num_triggered, "nothing fired, so the selector did not run"
        found[name] = answered(work)
    return found


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports when it is imported itself, not inside functions, nor for types alone."""
    names = {module_of(path): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        wanted: set[str] = set()
        for node in top_level(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                both = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                wanted.update(both or {node.module})
        found[name] = (wanted & names.keys()) - {name}
    return found


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import; those under `if TYPE_CHECKING` do not."""
    found: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            waiting += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            waiting += [*node.body, *(item for handler in node.handlers for item in handler.body)]
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle, as sorted groups (strongly connected, more than one)."""
    reach: dict[str, set[str]] = {}
    for start, others in graph.items():
        seen: set[str] = set()
        waiting = list(others)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        reach[start] = seen
    groups = {tuple(sorted({name, *(o for o in reach[name] if name in reach[o])})) for name in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def floor_of(module: str) -> int:
    """The floor of a module; the package itself and its entry points stand above all."""
    parts = module.split(".")
    unit = parts[1] if len(parts) > 1 else ""
    return next((index for index, units in enumerate(FLOORS) if unit in units), len(FLOORS))


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a module on a higher floor; the version in `s2t` itself is for all."""
    pairs = ((name, other) for name, others in graph.items() for other in others if other != "s2t")
    return sorted(f"{name} -> {other}" for name, other in pairs if floor_of(other) > floor_of(name))


def main() -> None:
    graph = imports()
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")
    }
    found: dict[str, Any] = answers()
    for name, figures in found.items():
        print(f"one {name} answer: " + ", ".join(f"{count} {what}" for what, count in figures.items()))
    found |= {
        "circles": circles(graph),
        "arrows_up": arrows_up(graph),
        "long_files": sorted(name for name, count in lines.items() if count > LONGEST),
        "modules": len(lines),
        "lines": sum(lines.values()),
    }
    for what in ("circles", "arrows_up", "long_files"):
        print(f"{what.replace('_', ' ')}: {len(found[what])}", *found[what], sep="\n  ")
    print(f"{found['lines']} lines in {found['modules']} files")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
