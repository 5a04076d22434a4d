"""The losses under PyTorch's own machinery (compile, opcheck, checkpointing, autocast), and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grpo_batch import (
    ALL_PATHS,
    LINEAR,
    MODULE,
    B,
    D,
    Path,
    T,
    V,
    config_of,
    from_hidden,
    from_logits,
    from_logits_inplace,
    gradients,
    inputs_for,
    make_batch,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edge_kernels import EDAConfig, GRPOLossConfig, edge_grpo_loss, linear_edge_grpo_loss, use_backend
from edge_kernels.ops import batch as batch_module
from edge_kernels.ops import head
from edge_kernels.ops.grpo_loss import grpo_loss_op
from edge_kernels.ops.linear_grpo_loss import linear_grpo_loss_op
from edge_kernels.ops.token_loss import token_loss_op

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMachinery:
    CONFIGS = (
        config_of(),
        config_of("grpo", beta=0.04, entropy_coef=0.1, top_entropy_quantile=0.5, importance_sampling_level="sequence"),
    )

    # Inductor takes seconds; whether it likes what surrounds the ops shows on one path.
    @pytest.mark.parametrize(
        ("path", "compiler"),
        [
            (from_logits_inplace, "aot_eager"),
            (from_hidden, "aot_eager"),
            pytest.param(from_hidden, "inductor", marks=pytest.mark.slow),
        ],
    )
    def test_compiles_into_one_graph(self, path: Path, compiler: str) -> None:
        batch = make_batch(dtype=torch.float32)
        torch.compiler.reset()  # one function with many configurations would meet the limit of recompilations
        for config, with_rewards in zip(self.CONFIGS, (False, True), strict=True):
            inputs = inputs_for(batch, config)
            if with_rewards:
                inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}

            def function(h: Tensor, w: Tensor, b: Tensor, inputs: dict = inputs) -> tuple[Tensor, dict]:
                if path is from_hidden:
                    out = linear_edge_grpo_loss(h, w, batch.targets, batch.mask, b, **inputs)
                else:
                    out = edge_grpo_loss(F.linear(h, w, b), batch.targets, batch.mask, **inputs, inplace=True)
                return out.loss * 2, out.metrics

            arguments = (batch.hidden, batch.weight, batch.bias)
            loss, metrics = torch.compile(function, fullgraph=True, backend=compiler)(*arguments)
            expected, expected_metrics = function(*arguments)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(metrics, expected_metrics)
            torch.testing.assert_close(torch.autograd.grad(loss, arguments), torch.autograd.grad(expected, arguments))

    def test_what_sequences_decide_compiles_into_the_same_graph(self) -> None:
        batch = make_batch(dtype=torch.float32)
        torch.compiler.reset()
        masks = {"off_policy_mask_threshold": 0.1, "mask_truncated_completions": True, "beta": 0.04}
        for config, with_rewards in (
            (config_of("geo_mean", sampler_ratio_cap=1.2, **masks), False),
            (config_of("vespo", sampler_ratio_cap=1.2, reward_kl_coef=0.1, **masks), True),
        ):
            inputs = inputs_for(batch, config)
            if with_rewards:
                inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}

            def function(h: Tensor, inputs: dict = inputs) -> tuple[Tensor, dict]:
                out = linear_edge_grpo_loss(h, batch.weight, batch.targets, batch.mask, **inputs)
                return out.loss, out.metrics

            results = torch.compile(function, fullgraph=True, backend="aot_eager")(batch.hidden)
            expected = function(batch.hidden)
            torch.testing.assert_close(results, expected)
            torch.testing.assert_close(*(torch.autograd.grad(loss, batch.hidden) for loss, _ in (results, expected)))

    @pytest.mark.parametrize("is_packed", [False, True])
    def test_opcheck(self, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checks the ops on the very arguments that the public functions give them."""
        batch = make_batch(dtype=torch.float32)
        batch.mask[:], batch.targets = True, batch.targets.clamp(0, V - 1)  # a tile's rows for the rest stay unwritten
        if is_packed:
            for name in ("hidden", "targets", "mask", "injected", "old", "ref"):
                setattr(batch, name, getattr(batch, name).detach().flatten(0, 1))
            batch.hidden.requires_grad_()
        for op, module, path, level in (
            (linear_grpo_loss_op, LINEAR, from_hidden, "token"),
            (grpo_loss_op, MODULE, from_logits, "token"),
            (token_loss_op, batch_module, from_logits, "sequence"),
        ):
            name = f"{op._name}_op"
            calls: list[tuple] = []
            monkeypatch.setattr(module, name, lambda *args, op=op, calls=calls: (calls.append(args), op(*args))[1])
            config = config_of(beta=0.04, entropy_coef=0.1, importance_sampling_level=level)
            inputs = inputs_for(batch, config)
            if is_packed:
                inputs["cu_seqlens"] = torch.tensor([0, 7, 7, 12, B * T])
            if is_packed and level == "sequence":  # whose ratios PyTorch makes; two sweeps all the same
                rewards = {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}
                config = config_of(beta=0.04, entropy_coef=0.1)
                inputs |= {**rewards, "config": config}
            path(batch, **inputs)
            arguments = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls[0]]
            torch.library.opcheck(op, tuple(arguments))

    @pytest.mark.parametrize("path", [from_logits, from_hidden])
    def test_activation_checkpointing(self, path: Path) -> None:
        batch = make_batch()

        def function(h: Tensor) -> Tensor:
            live = SimpleNamespace(**{**vars(batch), "hidden": h.tanh()})
            return path(live, advantages=batch.advantages).loss

        expected = torch.autograd.grad(function(batch.hidden), (batch.hidden, batch.weight))
        checkpointed = checkpoint(function, batch.hidden, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(checkpointed, (batch.hidden, batch.weight)), expected)

    def test_autocast(self) -> None:
        batch = make_batch(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            linear, plain = (
                from_hidden(batch, advantages=batch.advantages),
                from_logits(batch, advantages=batch.advantages),
            )
        torch.testing.assert_close(linear.loss, plain.loss)
        actual, expected = gradients(linear, batch), gradients(plain, batch)
        assert [g.dtype for g in actual] == [torch.float32] * 3
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)

    def test_the_incoming_gradient_scales(self) -> None:
        batch = make_batch()
        expected = [g * -3 for g in gradients(from_hidden(batch, advantages=batch.advantages), batch)]
        out = from_hidden(batch, advantages=batch.advantages)
        (out.loss * -3).backward()
        torch.testing.assert_close([batch.hidden.grad, batch.weight.grad, batch.bias.grad], expected)

    def test_only_what_requires_a_gradient_is_computed(self) -> None:
        batch = make_batch()
        expected = gradients(from_hidden(batch, advantages=batch.advantages), batch)
        names = ("hidden", "weight", "bias")
        for i, wanted in enumerate(names):
            part = make_batch()
            for name in names:
                getattr(part, name).requires_grad_(name == wanted)
            loss = from_hidden(part, advantages=part.advantages).loss
            torch.testing.assert_close(torch.autograd.grad(loss, getattr(part, wanted))[0], expected[i])

    def test_a_second_backward_pass_raises_with_a_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch()
        monkeypatch.setattr(head, "TILE_BYTES", 5 * V * 8)
        loss = from_hidden(batch, advantages=batch.advantages).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="returns it once; call it again"):
            loss.backward()

    @pytest.mark.parametrize("path", [from_logits, from_hidden])
    def test_a_second_derivative_raises(self, path: Path) -> None:
        batch = make_batch()
        loss = path(batch, advantages=batch.advantages).loss
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, batch.weight, create_graph=True)[0].sum().backward()

    def test_the_reference_backend_gives_the_same(self) -> None:
        batch = make_batch()
        for path in ALL_PATHS:
            expected = path(batch, advantages=batch.advantages)
            expected_gradients = gradients(expected, batch)
            with use_backend("reference"):
                out = path(batch, advantages=batch.advantages)
                torch.testing.assert_close(out.loss, expected.loss)
                torch.testing.assert_close(gradients(out, batch), expected_gradients)


class TestErrors:
    def call(self, **changes: Any) -> None:
        batch = make_batch()
        logits = F.linear(batch.hidden, batch.weight, batch.bias)
        arguments = {"logits": logits, "targets": batch.targets, "completion_mask": batch.mask}
        arguments |= {"advantages": batch.advantages, **changes}
        both = (edge_grpo_loss, arguments), (linear_edge_grpo_loss, {**arguments, "weight": batch.weight})
        both[1][1]["hidden"] = both[1][1].pop("logits")[..., :D]
        for function, options in both:
            try:
                function(**options)
            except (TypeError, ValueError) as error:
                last = error
            else:
                pytest.fail(f"{function.__name__} raised nothing")
        raise last

    def test_shapes_and_dtypes(self) -> None:
        batch = make_batch()
        message = r"completion_mask must be bool with shape \(B, T\) = \(4, 6\); got int64 \(4, 6\); pass the mask that"
        with pytest.raises(TypeError, match=message):
            self.call(completion_mask=batch.mask.long())
        with pytest.raises(ValueError, match=r"completion_mask must be .* \(4, 6\); got bool \(4, 5\)"):
            self.call(completion_mask=batch.mask[:, 1:])
        with pytest.raises(TypeError, match=r"targets must be int64 .*; got int32 \(4, 6\)"):
            self.call(targets=batch.targets.int())
        with pytest.raises(
            ValueError, match=r"advantages must .* \(B,\) = \(4,\) or \(B, T\) = \(4, 6\); got .* \(6,\)"
        ):
            self.call(advantages=torch.zeros(6))
        with pytest.raises(TypeError, match=r"advantages must be floating point .*; got int64 \(4,\)"):
            self.call(advantages=batch.groups)
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"):
            with pytest.raises(ValueError, match=rf"{name} must be floating point .* \(4, 6\); got float64 \(4, 5\)"):
                self.call(**{name: batch.old[:, 1:]})
        with pytest.raises(TypeError, match=r"injected_mask must be bool .*; got float64"):
            self.call(injected_mask=batch.old)
        with pytest.raises(ValueError, match=r"must have shape \(B, T, [VD]\); got float64 \(1, 4, 6, (13|5)\)"):
            self.call(logits=torch.zeros(1, 4, 6, 13, dtype=torch.float64))

    def test_what_belongs_together(self) -> None:
        batch = make_batch()
        with pytest.raises(ValueError, match="exactly one of advantages and rewards must be given; got both"):
            self.call(rewards=batch.rewards)
        with pytest.raises(ValueError, match="exactly one of advantages and rewards must be given; got neither"):
            self.call(advantages=None)
        with pytest.raises(TypeError, match=r"group_ids must be int64 with shape \(B,\) = \(4,\); got NoneType"):
            self.call(advantages=None, rewards=batch.rewards)
        with pytest.raises(ValueError, match="group_ids belongs to rewards"):
            self.call(group_ids=batch.groups)
        with pytest.raises(ValueError, match=r"beta = 0\.1 needs ref_logprobs; got None"):
            self.call(config=config_of(beta=0.1))
        with pytest.raises(ValueError, match=r"sampler_ratio_floor must be at most sampler_ratio_cap = 0\.5; got 0\.9"):
            GRPOLossConfig(sampler_ratio_cap=0.5, sampler_ratio_floor=0.9)
        with pytest.raises(ValueError, match=r"sampler_ratio_cap = 2\.0 needs sampling_logprobs; got None"):
            self.call(config=config_of(sampler_ratio_cap=2.0))
        with pytest.raises(ValueError, match="mask_truncated_completions=True needs truncated_mask; got None"):
            self.call(config=config_of(mask_truncated_completions=True))
        with pytest.raises(
            ValueError, match=r"truncated_mask must be bool with shape \(B,\) = \(4,\); got bool \(3,\)"
        ):
            self.call(truncated_mask=torch.zeros(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"reward_kl_coef = 0\.1 needs rewards and ref_logprobs; got advantages"):
            self.call(config=config_of(reward_kl_coef=0.1))
        with pytest.raises(ValueError, match="loss_type='vespo' has a weight for sequences"):
            GRPOLossConfig(loss_type="vespo", sampler_ratio_mode="sequence_mask")
        with pytest.raises(TypeError, match="config must be a GRPOLossConfig; got EDAConfig"):
            self.call(config=EDAConfig())
        with pytest.raises(
            ValueError, match=r"entropy_threshold must be a number or a scalar tensor; got float32 \(2,\)"
        ):
            self.call(entropy_threshold=torch.zeros(2))

    def test_targets_out_of_range_where_they_count(self) -> None:
        batch = make_batch()
        batch.targets[0, 3] = V
        with pytest.raises(ValueError, match=rf"targets must lie in \[0, V\) = \[0, {V}\) .* got {V} at \((0, )?3,?\)"):
            self.call(targets=batch.targets)

    def test_layouts_that_cannot_be_written_in_place(self) -> None:
        batch = make_batch()
        logits = torch.zeros(V, B, T).permute(1, 2, 0)
        with pytest.raises(ValueError, match="inplace=True needs logits whose last dimension is contiguous"):
            edge_grpo_loss(logits, batch.targets, batch.mask, advantages=batch.advantages, inplace=True)
