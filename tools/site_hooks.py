"""MkDocs hooks: one set of Markdown files that reads well on the hosting site and in the built site.

Some pages live outside docs/, where a hosting site looks for them (README.md, the model card). They are added to the
site under the names of `ADDED`. Relative links keep working: a link to a file that is part of the site becomes a link to
its page; a link to any other file of the repository (source code, say) becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

ADDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "checkpoints/demo/README.md": "model-card.md",
    "checkpoints/demo/loss.png": "loss.png",
    "checkpoints/demo/needle.png": "needle.png",
}
"""Files outside docs/ by their place in the repository, and their names in the site."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
API = re.compile(r"<!-- api: ([\w.]+)((?: \w+)*) -->")
"""A marker of api.md: the object whose docstrings stand there and, where not all are of interest, which members."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of `ADDED`."""
    for source, name in ADDED.items():
        path = ROOT / source
        if path.suffix == ".md":
            files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites relative links, and puts the API's docstrings where api.md marks them."""
    sources = {name: source for source, name in ADDED.items()}
    place = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def rewrite(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match.group(0)
        name = site_name(posixpath.normpath(posixpath.join(place, path)))
        if name is None or files.get_file_from_path(name) is None:
            return text
        return f"{picture}[{text}]({name}{'#' + anchor if anchor else ''})"

    return API.sub(docstrings, LINK.sub(rewrite, markdown))


def docstrings(marker: re.Match[str]) -> str:
    """The block that mkdocstrings replaces by docstrings."""
    name, members = marker.groups()
    chosen = f"\n    options:\n      members: [{', '.join(members.split())}]" if members else ""
    return f"::: {name}{chosen}"


def site_name(path: str) -> str | None:
    """The name in the site of a file of the repository; None for one that is not part of it."""
    if path in ADDED:
        return ADDED[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None
