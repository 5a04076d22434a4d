"""The backends that a process of tests can run: Triton only where it interprets its kernels, and then only Triton.

``TRITON_INTERPRET=1 pytest tests/kernels/ops/test_token_stats*.py tests/kernels/backends/interpreted`` runs them by
hand; test_triton.py does it in a process of its own, because Triton reads the variable once, when it is first imported.
"""

from __future__ import annotations

from importlib.metadata import version

import torch

from edge_kernels.backend import is_interpreting

INTERPRETING = is_interpreting()
BACKENDS = ["triton"] if INTERPRETING else ["cpu", "reference"]
WIDEST = torch.float32 if INTERPRETING else torch.float64  # float64 is left to the reference there
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([] if INTERPRETING else [torch.float64])]
# Before Triton 3.9 the interpreter also rounds the product in a multiply-add, as no GPU does: it costs digits in
# proportion to the logits.
ROUNDS_ONCE = not INTERPRETING or tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
