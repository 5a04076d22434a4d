"""Whether the Hugging Face Hub can be reached: a mistyped name is an error at once on a machine without network.

The Hub's client tries again for half a minute, file by file. What is loaded from there is ``loading``'s and the data's.
"""

from __future__ import annotations

import functools
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants

_SECONDS = 10.0


@contextmanager
def cached_if_unreachable() -> Iterator[None]:
    """Within the block, let the Hub's clients use their cache alone if the Hub cannot be reached."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def is_reachable() -> bool:
    """Return whether a connection to the Hub's address can be made, looked up once; by a proxy it is taken to be."""
    address = urlsplit(constants.ENDPOINT)
    host = address.hostname or ""
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return True
    try:
        socket.create_connection((host, address.port or 443), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
