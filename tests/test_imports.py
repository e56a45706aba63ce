"""Floors: imports point downward only, and neighbours on the workflow floor meet through files."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import s2t

ROOT = Path(s2t.__file__).parent
FLOORS = (
    {"errors", "records", "config"},
    {"core", "files", "hub", "progress", "scale", "shards", "tasks", "web", "workers"},
    {"model"},
    {"methods"},
    {"decode"},
    {"combine", "summary", "traces"},
    {"measure", "collect", "train", "merge", "export", "push", "evaluate", "report", "serve"},
    {"api", "demo", "bench", "workflows"},
    {"studies", "reproduce"},
    {"cli", "integrations"},
)
WORKFLOWS = FLOORS[6]
ENTRIES = {"__init__", "__main__"}  # they re-export and start what is above everything
MODEL_LIBRARIES = {"torch", "transformers", "peft", "tokenizers", "safetensors"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "__init__.py")


def unit_of(path: Path) -> str:
    """The name on a floor: `core` of core/support.py, `files` of files.py."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def floor_of(unit: str) -> int:
    floors = [index for index, units in enumerate(FLOORS) if unit in units]
    assert floors, f"s2t.{unit} stands on no floor; give it one in tests/test_imports.py"
    return floors[0]


def imports_of(path: Path) -> set[str]:
    """Every absolute module name the file imports, inside functions too; relative imports made absolute."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(from_names(node, path))
    return names


def from_names(node: ast.ImportFrom, path: Path) -> set[str]:
    module = node.module or ""
    if node.level:
        parts = ("s2t", *path.relative_to(ROOT).parts[:-1])
        module = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [module])])
    if module == "s2t":
        return {f"s2t.{alias.name}" for alias in node.names}
    return {module}


def units_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports_of(path) if name.startswith("s2t.")}
    return {name for name in names if not name.startswith("__")} - {unit_of(path)}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) not in ENTRIES], ids=label)
def test_imports_point_downward_only(path):
    unit = unit_of(path)
    above = {other for other in units_imported(path) if floor_of(other) > floor_of(unit)}
    assert not above, f"{label(path)} imports {sorted(above)} from a higher floor"


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) in WORKFLOWS], ids=label)
def test_workflows_never_import_each_other(path):
    neighbours = units_imported(path) & WORKFLOWS
    assert not neighbours, f"{label(path)} imports its neighbour {sorted(neighbours)}; meet through files"


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) == "core"], ids=label)
def test_core_knows_no_models_and_no_files(path):
    assert not units_imported(path) & {"files", "scale", "tasks"}
    assert not {name.split(".")[0] for name in imports_of(path)} & {"transformers", "peft", "tokenizers"}


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) == "tasks"], ids=label)
def test_tasks_know_no_models(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & MODEL_LIBRARIES


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) in FLOORS[0]], ids=label)
def test_the_ground_floor_needs_the_standard_library_alone(path):
    others = {name.split(".")[0] for name in imports_of(path)} - {"s2t"}
    assert others <= set(sys.stdlib_module_names) | {"__future__"}


def test_importing_s2t_imports_no_torch():
    code = "import sys, s2t, s2t.config; sys.exit(bool({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_engines_leave_model_classes_and_quantization_to_those_who_load_a_model():
    """170 MiB that a GGUF file on llama.cpp does without."""
    code = (
        "import sys, s2t.api, s2t.decode.loop, s2t.model.gguf.opening\n"
        "print({'transformers.modeling_utils', 'transformers.quantizers', 'torch.distributed.tensor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_are_listed_and_unknown_ones_refused():
    assert {"load", "generate", "stream", "__version__"} <= set(dir(s2t))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = s2t.no_such_name


@pytest.fixture(scope="module")
def shape():
    """benchmarks/shape.py, which measures the same."""
    spec = importlib.util.spec_from_file_location("shape", Path(__file__).parents[1] / "benchmarks" / "shape.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_module_is_imported_in_a_circle_or_from_above(shape):
    graph = shape.imports()
    assert [set(units) for units in shape.FLOORS] == list(FLOORS)
    assert len(graph) > 150 and shape.circles(graph) == [] and shape.arrows_up(graph) == []


def test_one_answer_runs_through_few_functions_and_files_and_not_deep(shape):
    """A new method is one file: what every answer comes by stays small enough to be read."""
    answers = shape.answers()
    assert answers["s2t"]["functions"] <= 120 and answers["s2t"]["files"] <= 18 and answers["s2t"]["depth"] <= 12
    assert all(answers["greedy"][what] < answers["s2t"][what] for what in ("functions", "files", "depth"))


def test_a_circle_and_an_arrow_up_would_be_found(shape):
    graph = {
        "s2t.core.a": {"s2t.model.b"},
        "s2t.model.b": {"s2t.model.c"},
        "s2t.model.c": {"s2t.core.a"},
        "s2t.errors": set(),
    }
    assert shape.circles(graph) == [["s2t.core.a", "s2t.model.b", "s2t.model.c"]]
    assert shape.arrows_up(graph) == ["s2t.core.a -> s2t.model.b"]


def test_what_an_answer_runs_through_is_counted_without_what_is_not_ours(shape):
    from s2t.core.rule import winner

    assert shape.answered(lambda: sorted([winner([1.0, 2.0]), winner([0.5])])) == {
        "functions": 1,
        "files": 1,
        "depth": 1,
    }
