"""The one-sweep loss from logits: exact in every type, the same bits for any number of threads, in place or not."""

from __future__ import annotations

import pytest
import torch

from edge_kernels import GRPOLossConfig, edge_grpo_loss, use_backend
from edge_kernels.backend import extension

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=extension().instruction_sets())
def instruction_set(request):
    """Each instruction set has exponentials of its own."""
    before = extension().instruction_set()
    extension().use_instruction_set(request.param)
    yield request.param
    extension().use_instruction_set(before)


def batch(rows, vocab, dtype, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(1, rows, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (1, rows), generator=generator)
    advantages = torch.randn(1, rows, generator=generator)
    return logits, targets, torch.ones(1, rows, dtype=torch.bool), advantages


def gradient(logits, targets, mask, advantages, **options):
    leaf = logits.clone().requires_grad_()
    # A leaf cannot be written in place; a view of a copy can.
    out = edge_grpo_loss(leaf * 1, targets, mask, advantages=advantages, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return grad, out


# 1: a single column; 5: less than any vector; 4,096: one block exactly; 4,097: a block of one; 9,001: odd and three
# blocks. 1 row is shared by all threads, 40 are dealt out.
@pytest.mark.parametrize("vocab", [1, 5, 4096, 4097, 9001])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_agrees_with_the_reference_in_float64(instruction_set, dtype, rows, vocab, inplace):
    logits, targets, mask, advantages = batch(rows, vocab, dtype)
    grad, out = gradient(logits, targets, mask, advantages, inplace=inplace)
    with use_backend("reference"):
        expected, reference = gradient(logits.double(), targets, mask, advantages.double())
    # Only the rounding of the gradient to the logits' type, and a few float32 operations, may show.
    resolution = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(
        grad.double(), expected, rtol=0, atol=float(resolution * expected.abs().max().clamp(min=1e-3))
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.logprobs.double(), reference.logprobs, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.entropy.double(), reference.entropy, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("config", [GRPOLossConfig(), GRPOLossConfig(entropy_coef=0.1), GRPOLossConfig(softcap=5.0)])
def test_the_number_of_threads_changes_no_bit(dtype, rows, config):
    data = batch(rows, 9001, dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradient(*data, config=config)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_special_rows(instruction_set, dtype, inplace):
    """Forbidden tokens get 0; a row with NaN or +inf, or of -inf only, is NaN and spoils no other row."""
    logits, targets, mask, advantages = batch(40, 5000, dtype)
    logits[0, 1, 7:4000] = -torch.inf
    logits[0, 2, 17] = torch.nan
    logits[0, 3, 18] = torch.inf
    logits[0, 4] = -torch.inf
    targets[0, :5] = 3
    mask[0, 5] = False
    leaf = logits.clone().requires_grad_()
    out = edge_grpo_loss(leaf * 1, targets, mask, advantages=advantages, inplace=inplace)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(
            edge_grpo_loss(
                (wide := logits.double().requires_grad_()), targets, mask, advantages=advantages.double()
            ).loss,
            wide,
        )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert (grad[0, 1, 7:4000] == 0).all()
    assert grad[0, 2:5].isnan().all()
    assert (grad[0, 5] == 0).all()
    rest = [0, 1, *range(5, 40)]
    assert grad[0, rest].isfinite().all()
    atol = float(max(torch.finfo(dtype).eps, 1e-6) * expected[0, rest].abs().max())
    torch.testing.assert_close(grad[0, rest].double(), expected[0, rest], rtol=0, atol=atol)
    assert out.logprobs[0, 2:5].isnan().all()
    assert out.entropy[0, 5] == 0


def test_offset_logits_and_sharp_rows_stay_exact():
    """An offset of 3e4 leaves float32 logits a resolution of 2e-3; given them, everything else is exact to 1e-5."""
    logits, targets, mask, advantages = batch(8, 5000, torch.float32)
    logits[0, 0] += 3e4
    logits[0, 1, targets[0, 1]] = 1e4
    grad, out = gradient(logits, targets, mask, advantages)
    with use_backend("reference"):
        expected, reference = gradient(logits.double(), targets, mask, advantages.double())
    torch.testing.assert_close(out.logprobs.double(), reference.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), reference.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=float(1e-5 * expected.abs().max()))
    assert (out.entropy >= 0).all()


def test_in_place_allocates_nothing_of_the_logits_size():
    logits, targets, mask, advantages = batch(64, 50_001, torch.float32)  # 12.8 MB
    work = logits.requires_grad_() * 1
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = edge_grpo_loss(work, targets, mask, advantages=advantages, inplace=True).loss
        (grad,) = torch.autograd.grad(loss, work)
    assert max(event.cpu_memory_usage for event in profile.events()) < work.nbytes / 100
    assert grad.data_ptr() == work.data_ptr()


def test_the_gradient_is_handed_out_once():
    logits, targets, mask, advantages = batch(3, 11, torch.float32)
    out = edge_grpo_loss(logits.requires_grad_(), targets, mask, advantages=advantages)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="returns it once"):
        out.loss.backward()


def test_the_incoming_gradient_scales():
    data = batch(3, 11, torch.float32)
    once, _ = gradient(*data)
    leaf = data[0].clone().requires_grad_()
    (edge_grpo_loss(leaf, *data[1:3], advantages=data[3]).loss * -2.5).backward()
    torch.testing.assert_close(leaf.grad, -2.5 * once)
