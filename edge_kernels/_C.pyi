"""Types of the compiled extension; csrc/bindings.cpp. Pointers are integer addresses, 0 where absent."""

def exponentials(*, x: int, out: int, count: int, slope: float) -> None: ...
def want_huge_pages(address: int, bytes: int) -> None: ...
def cpu_features() -> dict[str, bool]: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def built_with() -> dict[str, str | list[str] | None]: ...
def cuda_devices() -> list[dict[str, object]]: ...
def cuda_versions() -> dict[str, str | None]: ...

# The records of csrc/calls.h.

class TokenRows:
    def __init__(
        self,
        *,
        dtype: int,
        logits: int,
        row_stride: int,
        rows: int,
        vocab: int,
        targets: int,
        ignore_index: int,
        inv_temperature: float,
        softcap: float,
        logit_scale: float,
    ) -> None: ...

class LossRule:
    def __init__(
        self,
        *,
        objective: int,
        ratio_of_sequence: bool,
        epsilon_low: float,
        epsilon_high: float,
        delta: float,
        beta: float,
        bias_corrects_kl: bool,
        sampler_cap: float,
        sampler_floor: float,
        sampler_of_sequence: bool,
        sampler_masks: bool,
        injected: int,
        sft_weight: float,
        shaped_gamma: float,
        max_log_ratio: float,
        max_kl_log_ratio: float,
    ) -> None: ...

class TokenTensors:
    def __init__(
        self,
        *,
        mask: int,
        weight: int,
        advantages: int,
        old_logprobs: int,
        ref_logprobs: int,
        sampler_ratio: int,
        sampling_logprobs: int,
        injected: int,
        entropy_threshold: int,
        bonus_weight: int,
    ) -> None: ...

# Where a call runs.

class CpuLaunch:
    def __init__(self, *, threads: int) -> None: ...

class CudaLaunch:  # in a build with CUDA
    def __init__(self, *, device: int, stream: int) -> None: ...
    def use_workspace(self, workspace: int, bytes: int) -> None: ...

def row_workspace_bytes(launch: CpuLaunch | CudaLaunch, rows: TokenRows) -> int: ...
def token_loss_workspace_bytes(launch: CpuLaunch | CudaLaunch, *, sequences: int, length: int) -> int: ...
def token_stats_forward(
    launch: CpuLaunch | CudaLaunch,
    rows: TokenRows,
    *,
    logprobs: int,
    entropy: int,
    logsumexp: int,
    maximum: int,
    total: int,
) -> None: ...
def token_stats_backward(
    launch: CpuLaunch | CudaLaunch,
    rows: TokenRows,
    *,
    entropy: int,
    maximum: int,
    total: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad_logsumexp: int,
    grad_logits: int,
    grad_row_stride: int,
) -> None: ...
def grpo_sweep(
    launch: CpuLaunch | CudaLaunch,
    rows: TokenRows,
    tensors: TokenTensors,
    rule: LossRule,
    *,
    logprobs: int,
    entropy: int,
    grad_logits: int,
    grad_row_stride: int,
) -> None: ...
def token_loss(
    launch: CpuLaunch | CudaLaunch,
    tensors: TokenTensors,
    rule: LossRule,
    *,
    dtype: int,
    sequences: int,
    length: int,
    logprobs: int,
    entropy: int,
    loss: int,
    metrics: int,
    d_logprobs: int,
    d_entropy: int,
) -> None: ...
