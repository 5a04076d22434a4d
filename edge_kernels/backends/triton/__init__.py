"""The backend "triton": the contract (contract.py) for CUDA and ROCm devices, one concept a file.

arithmetic.py: a logit and a row's sums; rows.py: walking over a row; then one file an op, kernels before launchers.
tuning.py: block sizes by architecture. Under TRITON_INTERPRET=1 everything runs on CPU tensors, slowly, for tests.
"""

from edge_kernels.backends.triton.grpo_sweep import grpo_sweep
from edge_kernels.backends.triton.launch import units_per_nat
from edge_kernels.backends.triton.linear_head import linear_backward, linear_forward
from edge_kernels.backends.triton.token_loss import token_loss
from edge_kernels.backends.triton.token_stats import token_stats_backward, token_stats_forward

__all__ = [
    "grpo_sweep",
    "linear_backward",
    "linear_forward",
    "token_loss",
    "token_stats_backward",
    "token_stats_forward",
    "units_per_nat",
]
