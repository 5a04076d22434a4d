"""Types of the compiled extension; csrc/bindings.cpp. Pointers are integer addresses, 0 where absent."""

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
