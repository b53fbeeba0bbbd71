"""What `mkdocs build` needs to know of this repository: some pages and pictures lie outside of docs/.

They keep their paths in the site, so a link differs in it only by the `../` that leads out of docs/, or the `docs/` that
leads into it. `mkdocs.yml` names this file.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = [
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "kernels/README.md",
    "benchmarks/results/**/README.md",
    "benchmarks/results/**/*.png",
]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what lies outside of docs/ under its path in the repository."""
    for path in sorted(found for pattern in OUTSIDE for found in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's links as they are in the site, where docs/ and the repository's root are one folder."""
    if Path(str(page.file.abs_src_path)).parent == ROOT / "docs":
        return re.sub(r"\]\(\.\./", "](", markdown)
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
