"""The pages of the documentation, read as text: their prose, blocks of code and sections."""

import re
from functools import cache
from pathlib import Path

from support.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for folder in ("benchmarks", "kernels") if (page := ROOT / folder / "README.md").exists()]


@cache
def text(page: Path) -> str:
    return page.read_text()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


def blocks(content: str, language: str) -> list[tuple[str, str]]:
    """The blocks of code in that language, each with its file's name, or without."""
    found = re.findall(rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```$', content, flags=re.DOTALL | re.MULTILINE)
    return [(name, block) for name, block in found]


def section(page: Path, heading: str) -> str:
    """A page's part under a heading of the second level."""
    return text(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
