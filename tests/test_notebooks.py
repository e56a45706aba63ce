"""The notebooks run: their code on few problems by default, and as they are, in a kernel, among the slow tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "docs/notebooks").glob("*.ipynb"))
FEWER = [(r"(?m)^([A-Z]+) = \d+", r"\1 = 24"), (r"\blimit=\d+", "limit=24"), (r"\bepochs=\d+", "epochs=1")]


def cells(name: str) -> list[dict]:
    """The code cells, as the file has them."""
    found = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(*words: str, folder: Path) -> None:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-2500:]}"


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_its_outputs_and_nothing_of_the_machine(name):
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        printed = "".join(output.get("text", []))
        assert not re.search(r"(^|[\s'\"(])(/[a-z]+/|[A-Z]:\\)", printed), printed
    assert len(json.dumps(outputs)) < 200_000


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("2") else pytest.mark.slow) for name in NOTEBOOKS]
)
def test_the_code_of_a_notebook_runs_on_few_problems(name, tmp_path):
    code = "\n".join("".join(cell["source"]) for cell in cells(name))
    for pattern, fewer in FEWER:
        code = re.sub(pattern, fewer, code)
    run("-c", code, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_as_it_is_and_prints_what_is_kept(name, tmp_path):
    run(str(ROOT / "docs/run_notebooks.py"), "--check", name, folder=tmp_path)
