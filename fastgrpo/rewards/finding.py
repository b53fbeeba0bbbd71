"""Where a reward of one's own is looked for.

    package.module:attribute     a module that Python finds by itself, an installed one for example, wins. Then come the
                                 working directory and the folder of the configuration (`reward.folder`)
    path/to/file.py:attribute    that file, from the working directory or else from the folder of the configuration

The folder in which it was found is appended to `sys.path`, behind everything else, so that the file can import its
neighbours and hides nothing.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any


def find_attribute(name: str, folder: Path | None = None) -> Any:
    """What `module:attribute` or `file.py:attribute` names. folder: of the configuration.

    Raises ValueError where there is none, with the places where it was looked for.
    """
    source, _, attribute = name.rpartition(":")
    folders = list(dict.fromkeys([Path.cwd(), *([] if folder is None else [folder.resolve()])]))
    module = _from_file(name, source, folders) if source.endswith(".py") else _from_module(name, source, folders)
    try:
        return getattr(module, attribute)
    except AttributeError:
        place = getattr(module, "__file__", None) or module
        raise ValueError(
            f"reward {name!r}: {place} has no {attribute!r}; if another file is meant, name it: path/to/file.py:{attribute}"
        ) from None


def _from_module(name: str, source: str, folders: list[Path]) -> ModuleType:
    try:
        return _imported(name, source)
    except ModuleNotFoundError as error:
        missing = error
    for folder in folders:
        parts = folder.joinpath(*source.split("."))
        if parts.with_suffix(".py").is_file() or (parts / "__init__.py").is_file():
            _append_to_path(folder)
            return _imported(name, source)
    raise ValueError(
        f"reward {name!r}: {missing}; it was looked for among the installed packages and in {_listed(folders)}. "
        f"Install it, set PYTHONPATH, or name the file: path/to/file.py:{name.rpartition(':')[2]}"
    ) from missing


def _imported(name: str, source: str) -> ModuleType:
    """The module. ModuleNotFoundError means that itself is missing; an error in it is a ValueError with the cause."""
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and f"{source}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"reward {name!r}: {error}") from error
    except Exception as error:
        raise _broken(name, source, error) from error


def _from_file(name: str, source: str, folders: list[Path]) -> ModuleType:
    found = [file for folder in folders if (file := (folder / Path(source).expanduser()).resolve()).is_file()]
    if not found:
        raise ValueError(f"reward {name!r}: no such file; it was looked for in {_listed(folders)}")
    file = found[0]
    # A module is called as a configuration would name it, so that what is in it can be found again by its module's name.
    if (known := sys.modules.get(str(file))) is not None:
        return known
    spec = importlib.util.spec_from_file_location(str(file), file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward {name!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(file)] = module
    _append_to_path(file.parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[str(file)]
        raise _broken(name, file, error) from error
    return module


def _broken(name: str, source: str | Path, error: Exception) -> ValueError:
    """The error for code that fails when it is imported, with the line in which it does."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error} (at {last.filename}:{last.lineno})"
    return ValueError(f"reward {name!r}: {source} cannot be imported: {what}")


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _listed(folders: list[Path]) -> str:
    return " and ".join(map(str, folders))
