"""What verl loads when it is imported (entry point group ``verl.plugins``): it makes ``edge_sync`` a trainer mode.

Every process of a run imports verl, so the agent loop is known in its workers too. This file is no part of the package
that it imports: what goes wrong there must be said here, because verl only writes it to its debug log.
"""

import warnings

try:
    import edge_grpo.integrations.verl  # noqa: F401
except ImportError as error:
    warnings.warn(f"trainer.v1.trainer_mode=edge_sync is not available: {error}", stacklevel=2)
