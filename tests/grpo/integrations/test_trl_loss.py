"""The trainer in TRL against TRL's own: bit for bit with everything off, to 1e-5 with the fused loss."""

from __future__ import annotations

import pytest
import torch
import trl_grid
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOTrainer
from trl_runs import TINY, history

import edge_grpo.integrations.trl.head
from edge_grpo.integrations.trl import EdgeGRPOTrainer

OFF = {"eda": False, "gec": False, "fused_loss": False}
FUSED = {"eda": False, "gec": False}


def test_everything_off_is_trl_bit_for_bit(make_trainer):
    theirs = make_trainer(GRPOTrainer)
    theirs.train()
    ours = make_trainer(**OFF)  # now: it sets the seed
    ours.train()
    assert history(ours) == history(theirs)
    assert len(history(ours)) == 3
    assert all(entry["grad_norm"] > 0 for entry in history(ours))
    for ours_, theirs_ in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(ours_, theirs_)


def test_fused_is_trls_loss_gradient_and_metrics(make_trainer):
    theirs, ours = make_trainer(GRPOTrainer), make_trainer(**FUSED)
    for case in trl_grid.small_grid():
        trl_grid.check(theirs, ours, case)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"entropy_coef": 0.01, "top_entropy_quantile": 0.5}, "entropy_coef with top_entropy_quantile"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0"),
        ({"delta": 0.9}, "delta"),
    ],
)
def test_one_warning_names_what_the_fused_loss_lacks(make_trainer, options, named):
    with pytest.warns(UserWarning, match=named) as warned:
        trainer = make_trainer(**FUSED, **options)
    assert len([one for one in warned if "edge_kernels" in str(one.message)]) == 1
    assert trainer._loss_config is None


def test_what_the_fused_loss_lacks_is_trls_own_loss(make_trainer):
    with pytest.warns(UserWarning, match="use_adaptive_entropy"):
        ours = make_trainer(**FUSED, use_adaptive_entropy=True, max_steps=1)
    ours.train()
    theirs = make_trainer(GRPOTrainer, use_adaptive_entropy=True, max_steps=1)
    theirs.train()
    ((ours_,), (theirs_,)) = history(ours), history(theirs)
    assert ours_.keys() == theirs_.keys()
    for name, value in theirs_.items():
        assert ours_[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_statistics_are_of_edge_kernels_also_where_the_loss_is_trls(make_trainer, monkeypatch):
    with pytest.warns(UserWarning, match="use_adaptive_entropy"):
        trainer = make_trainer(**FUSED, use_adaptive_entropy=True)
    calls = []
    statistics = edge_grpo.integrations.trl.head.linear_token_stats
    monkeypatch.setattr(
        edge_grpo.integrations.trl.head, "linear_token_stats", lambda *a, **k: calls.append(1) or statistics(*a, **k)
    )
    case = trl_grid.Case()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, trl_grid.make_inputs(trainer, case))
    assert len(calls) == 2  # the old log-probabilities of make_inputs, and the loss


def test_a_head_that_cannot_be_read_leaves_everything_to_trl(make_trainer, make_model):
    """Its logits are not those of one weight, which only a comparison with the model's own forward shows."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden).sin()
    with pytest.warns(UserWarning, match="cannot read this model's head"):
        trainer = make_trainer(**FUSED, model=model)
    assert trainer._loss_config is None


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="attention"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="head trained whole"),
    ],
)
def test_lora_adapters_get_trls_gradient(make_trainer, lora):
    """Also with a reference, which peft makes by turning the adapters off."""
    options = {"beta": 0.04, "peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", **lora), "max_steps": 1}
    logs = []
    for cls, switches in ((GRPOTrainer, {}), (EdgeGRPOTrainer, FUSED)):
        trainer = make_trainer(cls, **switches, **options)
        trainer.train()
        logs.append(history(trainer))
    for theirs, ours in zip(*logs, strict=True):
        assert theirs["grad_norm"] > 0
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def load(dtype: torch.dtype, *, untied: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        # In 16 bits the head's products are rounded at other places.
        pytest.param({"bf16": True}, torch.float32, 3e-2, id="autocast"),
        pytest.param({"cast_lm_head_to_fp32": True}, torch.bfloat16, 3e-2, id="float32 head"),
        pytest.param({"gradient_checkpointing": True}, torch.float32, 1e-4, id="checkpointing"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 1}, torch.float32, 1e-4, id="evaluation"),
        pytest.param({"beta": 0.04, "max_steps": 2, "num_iterations": 2}, torch.float32, 1e-3, id="reference model"),
        pytest.param({"mask_truncated_completions": True, "scale_rewards": "batch"}, torch.float32, 1e-4, id="masked"),
    ],
)
def test_what_else_trl_offers_keeps_working(make_trainer, options, dtype, tolerance):
    logs = []
    for cls, switches in ((GRPOTrainer, {}), (EdgeGRPOTrainer, FUSED)):
        model = load(dtype, untied="cast_lm_head_to_fp32" in options)
        # 12 tokens cut off about half of the completions.
        short = {"max_steps": 1, "max_completion_length": 12}
        trainer = make_trainer(cls, **switches, **{**short, **options}, model=model)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry])
    assert len(logs[0]) == (2 if "eval_strategy" in options else options.get("max_steps", 1))
    assert "mask_truncated_completions" not in options or logs[0][0]["completions/clipped_ratio"] > 0
    for theirs, ours in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() & {"loss", "grad_norm", "entropy", "kl", "eval_loss", "eval_entropy"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-6), name
