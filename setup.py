"""What pyproject.toml cannot say: the description on a package index is README.md without what only the repository holds.

Links to files there become words, and the picture its caption. All else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)[^)]*\)")  # a link or a picture with a path relative to the repository


def long_description() -> str:
    """README.md for readers who have no repository beside it."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    return LINK.sub(lambda link: f"*{link[2]}*" if link[1] else link[2], text)


setup(long_description=long_description(), long_description_content_type="text/markdown")
