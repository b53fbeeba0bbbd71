"""Everything that there is to say about the package is in pyproject.toml.

This file stays for tools that look for it: `python setup.py --version`, and editable installs by an old pip.
"""

from setuptools import setup

setup()
