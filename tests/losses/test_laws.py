"""What holds of every loss in the folder: a new file gets all of this by being there."""

import importlib

import pytest
import torch
from torch import nn

from csdraft.trainers.objective import Objective, losses

POSITIONS, VOCAB = 12, 40
ROUNDING = 2e-6


def module(name):
    return importlib.import_module(f"csdraft.losses.{name}")


def call(name, student, target, labels=None):
    labels = torch.zeros(len(student), dtype=torch.long) if labels is None else labels
    return getattr(module(name), name)(student, target, labels)


def logits(scale=3.0, seed=0, dtype=torch.float32):
    return (scale * torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)


def with_gradient(name, student, target):
    student = student.clone().requires_grad_(True)
    values = call(name, student, target)
    values.sum().backward()
    return values.detach(), student.grad


every = pytest.mark.parametrize("name", losses())


@every
def test_a_file_exports_its_loss(name):
    assert module(name).__all__ == [name]


@every
def test_one_float32_number_a_position(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = call(name, logits(dtype=dtype), logits(seed=1, dtype=dtype))
        assert values.shape == (POSITIONS,)
        assert values.dtype == torch.float32


@every
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_never_negative(name, scale):
    for seed in range(4):
        assert (call(name, logits(scale, seed), logits(scale, seed + 9)) >= -ROUNDING).all()


@every
def test_zero_at_equality_and_only_there(name):
    """With a gradient of zero; a loss that is not zero there says so."""
    values, gradient = with_gradient(name, logits(), logits())
    different = call(name, logits(), logits(seed=1))
    assert (different > 0.01).all()
    if getattr(module(name), "ZERO_AT_EQUALITY", True):
        assert values.abs().max() < ROUNDING
        assert gradient.abs().max() < ROUNDING
    else:
        assert values.min() > 0.01


@every
def test_a_constant_added_to_logits_changes_nothing(name):
    values = call(name, logits(), logits(seed=1))
    shifted = call(name, logits() + 7.0, logits(seed=1) - 3.0)
    assert torch.allclose(values, shifted, rtol=1e-4, atol=1e-5)


@every
def test_positions_do_not_see_each_other(name):
    student, target = logits(), logits(seed=1)
    parts = [call(name, student[i : i + 5], target[i : i + 5]) for i in range(0, POSITIONS, 5)]
    assert torch.equal(torch.cat(parts), call(name, student, target))


@every
def test_tokens_that_both_rule_out_change_nothing(name):
    """Rows of padding with logits of -inf: same values, same gradients, and none of their own."""
    student, target = logits(), logits(seed=1)
    padding = torch.full((POSITIONS, 9), float("-inf"))
    values, gradient = with_gradient(name, student, target)
    padded, padded_gradient = with_gradient(name, torch.cat([student, padding], 1), torch.cat([target, padding], 1))
    assert torch.allclose(values, padded, atol=1e-5)
    assert torch.allclose(gradient, padded_gradient[:, :VOCAB], atol=1e-6)
    assert (padded_gradient[:, VOCAB:] == 0).all()


@every
def test_a_token_that_one_rules_out_is_no_nan(name):
    ruled_out = logits()
    ruled_out[:, ::3] = float("-inf")
    for student, target in ((ruled_out, logits(seed=1)), (logits(seed=1), ruled_out)):
        values, gradient = with_gradient(name, student, target)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@every
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_bfloat16_gradients_are_finite_and_near_those_of_float32(name, scale):
    student, target = logits(scale, dtype=torch.bfloat16), logits(scale, 1, torch.bfloat16)
    _, short = with_gradient(name, student, target)
    _, long = with_gradient(name, student.float(), target.float())
    assert short.dtype == torch.bfloat16
    assert short.isfinite().all()
    assert torch.allclose(short.float(), long, rtol=0.01, atol=1e-6)


@every
def test_gradients_are_those_of_the_values(name):
    """Against differences, in the direction of the gradient itself."""
    student, target = logits(1.0), logits(1.0, 1)
    _, gradient = with_gradient(name, student, target)
    step = 1e-2 * gradient / gradient.norm()
    rise = (call(name, student + step, target) - call(name, student - step, target)).sum() / 2
    assert rise == pytest.approx((gradient * step).sum().item(), rel=0.02)


@every
def test_following_the_gradient_lowers_it(name):
    student, target = logits(), logits(seed=1)
    before = call(name, student, target).mean()
    for _ in range(50):
        _, gradient = with_gradient(name, student, target)
        student = student - 0.5 * gradient
    assert call(name, student, target).mean() < 0.95 * before


@every
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunks_add_up(name, chunk):
    hidden, target_hidden = torch.randn(13, 8, requires_grad=True), torch.randn(13, 8)
    head, target_head = nn.Linear(8, VOCAB), nn.Linear(8, VOCAB)
    labels = torch.randint(VOCAB, (13,))
    wanted = call(name, head(hidden), target_head(target_hidden), labels).sum()
    expected = torch.autograd.grad(wanted, [hidden, *head.parameters()])
    total = Objective({name: 1.0}, chunk=chunk).total(hidden, target_hidden, labels, head, target_head)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(total, [hidden, *head.parameters()]), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
