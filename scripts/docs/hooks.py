"""MkDocs hooks: add pages from the repository's root and the generated reference, and mend links that leave ``docs/``.

Links are written for the repository, where every viewer can follow them. On the site, a link to a file that has a page
leads to that page, and one to any other file becomes plain text. A broken link is left as it is, so that MkDocs' strict
mode refuses it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402

PAGES = {
    "readme.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "conduct.md": "CODE_OF_CONDUCT.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "nano.md": "src/aria/nano/README.md",
}
"""Pages of the site by the files that they show."""
_SITE = {file: page for page, file in PAGES.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add pages that do not lie in ``docs/``, with the images that they show."""
    for page, file in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for image, _, target in _LINK.findall(text):
            lies = PurePosixPath(os.path.normpath(PurePosixPath(file).parent / target))
            if image and "://" not in target and lies.parts[0] != "docs":
                files.append(File.generated(config, _image(lies), abs_src_path=str(ROOT / lies)))
    for page, text in reference.pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make links lead to pages of the site, outside of code."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    file = PurePosixPath(PAGES.get(uri, f"docs/{uri}"))
    parts = re.split(r"(^```.*?^```|`[^`\n]*`(?!\]))", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else _LINK.sub(lambda m: _mended(m, file, uri), part) for i, part in enumerate(parts))


def _image(file: PurePosixPath) -> str:
    return f"images/{file.name}"


def _mended(match: re.Match[str], file: PurePosixPath, uri: str) -> str:
    image, text, target = match.groups()
    path, sign, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return match[0]
    lies = PurePosixPath(os.path.normpath(file.parent / path))
    if lies.parts[0] == "docs":
        leads = str(lies.relative_to("docs")) if len(lies.parts) > 1 else "index.md"
    elif str(lies) in _SITE:
        leads = _SITE[str(lies)]
    elif image:
        leads = _image(lies)
    elif (ROOT / lies).exists():
        return text
    else:
        return match[0]
    if (ROOT / "docs" / leads).is_dir():
        if not (ROOT / "docs" / leads / "README.md").is_file():
            return text
        leads += "/README.md"
    relative = os.path.relpath(leads, PurePosixPath(uri).parent)
    return f"{image}[{text}]({relative}{sign}{anchor})"
