"""Which releases of another package an integration fits: the range that was tested, and what it builds on there."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from packaging.version import Version


class Release(NamedTuple):
    """The package that an integration is for: how it is called, what pip calls it, and the range of major.minor."""

    title: str
    package: str
    integration: str
    oldest: Version
    newest: Version


def check_release(wanted: Release, installed: str, signatures: Mapping[type, Mapping[str, Sequence[str]]]) -> None:
    """Raise ImportError for a release that does not fit; warn of one that looks right but is newer than the tests.

    ``signatures`` has, for each class, the methods that are overridden or called and the parameters relied on.
    """
    version = Version(installed)
    oldest, newest = wanted.oldest, wanted.newest
    supported = f"{wanted.title} {oldest}" if oldest == newest else f"{wanted.title} {oldest} to {newest}"
    remedy = f"pip install '{wanted.package}>={oldest},<{newest.major}.{newest.minor + 1}'"
    if version < oldest:
        raise ImportError(f"{wanted.integration} supports {supported}; got {version}; {remedy}")
    for owner, methods in signatures.items():
        for name, expected in methods.items():
            method = getattr(owner, name, None)
            found = () if method is None else tuple(inspect.signature(method).parameters)
            if [parameter for parameter in found if parameter in expected] != list(expected):
                raise ImportError(
                    f"{wanted.integration} supports {supported}; {owner.__name__}.{name} of {wanted.title} {version} "
                    f"takes {', '.join(found) or 'nothing: it is gone'}; expected {', '.join(expected)}; {remedy}"
                )
    if (version.major, version.minor) > (newest.major, newest.minor):
        warnings.warn(f"{wanted.integration} was tested with {supported}; this is {version}", stacklevel=4)
