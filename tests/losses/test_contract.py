"""What every loss must be, whatever file lies in csdraft/losses."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import csdraft.losses
from csdraft.trainers.objective import Objective

POSITIONS, VOCAB = 24, 31
FOLDER = Path(csdraft.losses.__path__[0])
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[0] != "_")
ROUNDING = 2e-6
"""Sums of float32 probabilities are off by so much."""

every = pytest.mark.parametrize("name", NAMES)


def module_of(name):
    return importlib.import_module(f"csdraft.losses.{name}")


def loss_of(name):
    return getattr(module_of(name), name)


def zero_at_equality(name):
    """A loss that is not 0 where the two agree says so with `ZERO_AT_EQUALITY = False`."""
    return vars(module_of(name)).get("ZERO_AT_EQUALITY", True)


def logits(scale=3.0, dtype=torch.float32, seed=0):
    """Student, target, labels; the student's want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, target = (scale * torch.randn(POSITIONS, VOCAB, generator=generator) for _ in range(2))
    labels = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    return student.to(dtype).requires_grad_(), target.to(dtype), labels


@every
def test_a_file_exports_one_function_of_its_name(name):
    assert module_of(name).__all__ == [name]
    parameters = list(inspect.signature(loss_of(name)).parameters.values())
    assert [p.name for p in parameters[:3]] == ["student_logits", "target_logits", "labels"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])


@every
def test_an_objective_finds_it_by_name(name):
    student, target, labels = logits()
    total = Objective({name: 2.0}).total(student, target, labels, torch.nn.Identity(), torch.nn.Identity())
    torch.testing.assert_close(total, 2 * loss_of(name)(student, target, labels).sum())


@every
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_never_negative_and_one_float32_a_position(name, scale):
    for dtype in (torch.float32, torch.bfloat16):
        value = loss_of(name)(*logits(scale, dtype))
        assert value.shape == (POSITIONS,)
        assert value.dtype == torch.float32
        assert value.min() >= -ROUNDING


@every
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_where_the_two_agree(name, scale):
    student, _, labels = logits(scale)
    moved = loss_of(name)(student, student.detach() + 1.5, labels)
    value = loss_of(name)(student, student.detach().clone(), labels)
    if not zero_at_equality(name):
        assert value.min() > 0
        return
    assert max(value.abs().max(), moved.abs().max()) < 2e-5
    value.sum().backward()
    assert student.grad.abs().max() < 2e-5  # nothing to gain there: it is a minimum


@every
def test_only_where_the_two_agree(name):
    """A loss that is 0 for two that differ would leave them apart."""
    student, target, labels = logits()
    assert loss_of(name)(student, target, labels).min() > 1e-3


@every
def test_a_constant_added_to_logits_changes_nothing(name):
    student, target, labels = logits()
    moved = loss_of(name)(student + 7.0, target - 5.0, labels)
    torch.testing.assert_close(moved, loss_of(name)(student, target, labels), atol=1e-5, rtol=1e-5)


@every
@pytest.mark.parametrize("size", [1, 5, POSITIONS])
def test_positions_do_not_know_of_each_other(name, size):
    student, target, labels = logits()
    whole = loss_of(name)(student, target, labels)
    parts = [loss_of(name)(*part) for part in zip(*(x.split(size) for x in (student, target, labels)), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-6)


@every
def test_no_positions_are_no_loss(name):
    student, target, labels = (x[:0] for x in logits())
    assert loss_of(name)(student, target, labels).shape == (0,)


@every
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_gradients_in_bfloat16_are_finite(name, scale):
    student, target, labels = logits(scale, torch.bfloat16)
    loss_of(name)(student, target, labels).sum().backward()
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_both_rule_out_count_for_nothing(name, dtype):
    """Rows that pad a vocabulary: logits of -inf give the loss and the gradients of the vocabulary without them."""
    student, target, labels = logits(dtype=dtype)
    value = loss_of(name)(student, target, labels)
    value.sum().backward()
    empty = torch.full((POSITIONS, 5), float("-inf"), dtype=dtype)
    wide = torch.cat([student.detach(), empty], -1).requires_grad_()
    padded = loss_of(name)(wide, torch.cat([target, empty], -1), labels)
    padded.sum().backward()
    torch.testing.assert_close(padded, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        wide.grad[:, :VOCAB], student.grad, atol=1e-5, rtol=1e-5 if dtype.itemsize > 2 else 0.02
    )
    assert torch.equal(wide.grad[:, VOCAB:], torch.zeros(POSITIONS, 5, dtype=dtype))


@every
@pytest.mark.parametrize("ruled_out_by", ["student", "target", "both"])
def test_no_token_in_common_still_gives_numbers(name, ruled_out_by):
    student, target, labels = logits()
    ruled_out = torch.zeros(POSITIONS, VOCAB)
    ruled_out[:, : VOCAB // 2] = float("-inf")
    start = student.detach() + (ruled_out if ruled_out_by != "target" else 0)
    wanted = target + (ruled_out.flip(-1) if ruled_out_by != "student" else 0)
    start.requires_grad_()
    value = loss_of(name)(start, wanted, labels)
    value.sum().backward()
    assert value.isfinite().all()
    assert start.grad.isfinite().all()


@every
def test_gradients_are_those_of_the_values(name):
    """Against differences, in the direction of the gradient itself."""
    student, target, labels = logits(scale=1.0)
    (gradient,) = torch.autograd.grad(loss_of(name)(student, target, labels).sum(), student)
    step = 1e-2 * gradient / gradient.norm()
    ahead, behind = (loss_of(name)(student + way * step, target, labels).sum() for way in (1, -1))
    assert (ahead - behind).item() / 2 == pytest.approx((gradient * step).sum().item(), rel=0.02)


def least_of(name, target, labels):
    """The lowest sum that a student can reach: the best of the target, its top tokens alone, and the label alone."""
    none = torch.full_like(target, float("-inf"))
    students = [none.scatter(-1, labels[:, None], 0.0)]
    for k in range(1, VOCAB + 1):
        top = target.topk(k)
        students.append(none.scatter(-1, top.indices, top.values))
    return min(loss_of(name)(student, target, labels).sum().item() for student in students)


@every
def test_steps_downhill_bring_the_two_together(name):
    student, target, labels = logits(scale=1.0)
    optimizer = torch.optim.Adam([student], 0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss_of(name)(student, target, labels).sum()
        value.backward()
        optimizer.step()
        values.append(value.item())
    least = least_of(name, target, labels)
    assert values[-1] - least < 0.5 * (values[0] - least)
