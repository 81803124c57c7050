"""`make docs`: the site builds without warnings, has all pages and public names, and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import imagestream

CHECKOUT = Path(__file__).parent.parent


def test_site_is_complete_and_self_contained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    docs = CHECKOUT / "docs"
    pages = [page.relative_to(docs).with_suffix(".html") for page in docs.rglob("*.md") if page.stem != "README"]
    assert not [page for page in [*pages, Path("index.html"), Path("SECURITY.html")] if not (tmp_path / page).is_file()]
    html = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    external = re.compile(r'(?:src|rel="stylesheet" href)="(?:https?:)?//')
    assert not [page for page, text in html.items() if external.search(text)]
    documented = set(re.findall(r'id="imagestream\.(\w+)"', html[tmp_path / "api.html"]))
    assert documented >= {*imagestream.__all__} - {"__version__"}
    assert "Raises" in html[tmp_path / "api.html"]
