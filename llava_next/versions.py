"""Versions of installed packages, and the command that installs what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def installed(names: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def install(extra: str) -> str:
    """The command that installs an extra of this project, in the versions that it was tested with."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def unfit(name: str, least: tuple[int, int], extra: str) -> str:
    """Why a package that an extra brings cannot be used, with the cure; empty when it can. Does not import it."""
    if find_spec(name) is None:
        return f"{name} is not installed; `{install(extra)}`"
    found = installed([name]).get(name)  # none: a folder of sources, of whatever version
    if found and tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < least:
        return f"{name} {found} is older than {'.'.join(map(str, least))}; `{install(extra)}`"
    return ""
