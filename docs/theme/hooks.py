"""What the site needs beside Markdown: notebooks as pages, the repository's changelog and CONTRIBUTING, links by title.

A notebook becomes Markdown before the site is built, so that its text, code and tables look like those of any page and
are searched; its name stays, so that a link to it works in the repository, too.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PREFERRED = ["image/png", "text/markdown", "text/plain"]  # a table's own HTML would bring styles of its own


NAMED = re.compile(r"\[(\w+\.(?:md|ipynb)|notebook)\]\(([^)#]+)(#[^)]*)?\)")


class NotebookFile(File):
    """A notebook that is a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the notebooks by their pages, and add those of the root."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        for added in as_page(file, config):
            files.append(added)
    for source, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Where the repository's reader sees a link by its file's name, the site's reader sees the page's title."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return NAMED.sub(lambda link: _by_title(link, page, files), markdown)


def _by_title(link: re.Match[str], page: Page, files: Files) -> str:
    target = files.get_file_from_path(str(PurePosixPath(page.file.src_uri).parent / link[2]))
    title = target.page.title if target and target.page else link[1]
    return f"[{title}]({link[2]}{link[3] or ''})"


def as_page(file: File, config: MkDocsConfig) -> list[File]:
    """The notebook as a page, and the pictures among its outputs."""
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": PREFERRED}}))
    folder = PurePosixPath(file.src_uri)
    text, resources = exporter.from_filename(
        str(file.abs_src_path), resources={"output_files_dir": folder.stem, "unique_key": folder.stem}
    )
    pictures = resources["outputs"].items()
    return [
        NotebookFile.generated(config, file.src_uri, content=text),
        *(File.generated(config, str(folder.parent / name), content=content) for name, content in pictures),
    ]
