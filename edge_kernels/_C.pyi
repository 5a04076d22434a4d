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
def token_stats_forward(
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
    logprobs: int,
    entropy: int,
    logsumexp: int,
    logsumexp_low: int = 0,
    threads: int = 0,
) -> None: ...
def token_stats_backward(
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
    entropy: int,
    logsumexp: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad_logsumexp: int,
    grad_logits: int,
    grad_row_stride: int,
    logsumexp_low: int = 0,
    threads: int = 0,
) -> None: ...

class TokenLossRule:
    def __init__(
        self,
        *,
        cispo: bool = False,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        delta: float = ...,
        beta: float = 0.0,
        sampler_cap: float = ...,
        sampler_floor: float = 0.0,
        sampler_masks: bool = False,
        injected_treatment: int = 0,
        sft_weight: float = 1.0,
        shaped_gamma: float = 0.1,
        max_log_ratio: float = ...,
        entropy_threshold: float = ...,
        bonus_weight: float = 0.0,
    ) -> None: ...

def grpo_sweep(
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
    logprobs: int,
    entropy: int,
    grad_logits: int,
    grad_row_stride: int,
    rule: TokenLossRule,
    weight: int,
    advantages: int,
    old_logprobs: int = 0,
    ref_logprobs: int = 0,
    sampler_ratio: int = 0,
    sampling_logprobs: int = 0,
    injected: int = 0,
    threads: int = 0,
) -> None: ...
def batch_loss(
    *,
    dtype: int,
    sequences: int,
    length: int,
    logprobs: int,
    entropy: int,
    mask: int,
    rule: TokenLossRule,
    ratio_of_sequence: bool,
    sampler_of_sequence: bool,
    weight: int,
    advantages: int,
    old_logprobs: int = 0,
    ref_logprobs: int = 0,
    sampler_ratio: int = 0,
    sampling_logprobs: int = 0,
    injected: int = 0,
    loss: int,
    metrics: int,
    d_logprobs: int,
    d_entropy: int,
) -> None: ...
