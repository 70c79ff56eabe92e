"""Hooks of mkdocs: pages outside docs/, and links from pages to files of the repository."""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def site_path(path: str) -> str:
    """Return where a file of the repository is in the site: other than pages as text, which browsers show."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith((".md", ".png")) else f"repository/{path}.txt"


def linked(path: str) -> list[str]:
    """Return the files, relative to the repository, that a page of it links to."""
    links = [target for _, target, _ in LINK.findall((ROOT / path).read_text())]
    return [os.path.normpath(PurePosixPath(path).parent / link) for link in links]


def rewritten(path: str) -> str:
    """Return a page with its links to files of the repository changed to where these are in the site."""

    def new(match: re.Match) -> str:
        text, link, anchor = match.groups(default="")
        target = os.path.normpath(PurePosixPath(path).parent / link)
        if (ROOT / target).is_dir():
            return text
        return f"[{text}]({os.path.relpath(site_path(target), PurePosixPath(site_path(path)).parent)}{anchor})"

    return LINK.sub(new, (ROOT / path).read_text())


def on_files(files, config):
    """Add README, CONTRIBUTING and CHANGELOG, and each file outside docs/ that a page links to."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    added = set(PAGES)
    while pages:
        for target in linked(pages.pop()):
            if (ROOT / target).is_file() and not target.startswith("docs/") and target not in added:
                added.add(target)
                pages += [target] if target.endswith(".md") else []
    for path in sorted(added):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_read_source(page, config):
    """Read a page with its links rewritten."""
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    return rewritten(path)
