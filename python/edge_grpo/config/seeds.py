"""Seeds for every random choice of a run, derived from the run's seed and the choice's place.

Nothing depends on how many random numbers were drawn before, so a resumed run makes the choices it would have made.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *place: int | str) -> int:
    """Return a 63-bit seed for the choice at ``place``, for example ``derive_seed(0, "rollout", step, rank)``."""
    digest = hashlib.blake2b(repr((seed, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
