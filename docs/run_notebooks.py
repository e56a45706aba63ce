"""Run the notebooks of docs/notebooks and keep their outputs: `python docs/run_notebooks.py [--check] [NAME ...]`.

Each runs in an empty folder. Progress is not kept, nor is anything of the machine or of the time. With `--check` nothing is
written: the outputs must be of the kinds, and have as many lines, as those that are kept.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).with_name("notebooks")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(notebook: NotebookNode) -> NotebookNode:
    """Every cell, in order; raises CellExecutionError at the first that fails."""
    os.environ["MPLBACKEND"] = (
        "module://matplotlib_inline.backend_inline"  # as in a notebook, whatever this shell draws with
    )
    with tempfile.TemporaryDirectory() as empty:
        resources = {"metadata": {"path": empty}}
        NotebookClient(notebook, timeout=1200, record_timing=False, resources=resources).execute()
    for cell in code_cells(notebook):
        cell.outputs = joined([output for output in cell.outputs if is_kept(output)])
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_kept(output: NotebookNode) -> bool:
    """Whether it is something printed or drawn; bars of progress are HTML, and stderr holds the rest of it."""
    if output.output_type == "stream":
        return output.name == "stdout" and bool(output.text.strip())
    return "image/png" in output.data


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """What is printed, in one piece; a kernel sends it in as many as it took time."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if "text" in output and kept and "text" in kept[-1]:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def shape(notebook: NotebookNode) -> list[list[str | int]]:
    """What each code cell gives: the number of lines printed, or that there is a picture."""
    return [
        [len(o.text.splitlines()) if "text" in o else "picture" for o in cell.outputs] for cell in code_cells(notebook)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, by the names of their files (all)")
    parser.add_argument("--check", action="store_true", help="compare with what is kept, and write nothing")
    given = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        if given.names and path.stem not in given.names:
            continue
        kept = nbformat.read(path, 4)
        ran = run(nbformat.read(path, 4))
        if not given.check:
            nbformat.write(ran, path)
        elif shape(ran) != shape(kept):
            raise SystemExit(
                f"{path.name}: outputs are {shape(ran)}, those kept are {shape(kept)}; run it without --check."
            )
        print(f"ran {path.name}")


if __name__ == "__main__":
    main()
