"""MkDocs hooks: pages from outside docs/ with their links, and the navigation of the design decisions."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = [
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]


def on_config(config: MkDocsConfig) -> None:
    """List the records of decisions in the navigation."""
    records = [str(path.relative_to(ROOT / "docs")) for path in sorted(ROOT.glob("docs/decisions/0*.md"))]
    (config.nav or [])[-1]["Design decisions"].extend(records)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside docs/; in the site, docs/ and the root of the repository are one folder."""
    for path in OUTSIDE:
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links of a page to where their targets are in the site."""
    place = page.file.src_uri
    source = place if page.file.generated_by else f"docs/{place}"

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link[1].partition("#")
        target = normpath(join(dirname(source), path)).removeprefix("docs/")
        return f"]({relpath(target, dirname(place) or '.')}{mark}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", moved, markdown)
