"""Each loss against its definition, written once more in NumPy and float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from csdraft.losses.acceptance import acceptance
from csdraft.losses.cross_entropy import cross_entropy
from csdraft.losses.forward_kl import forward_kl
from csdraft.losses.jsd import jsd
from csdraft.losses.reverse_kl import reverse_kl
from csdraft.losses.top_k import top_k
from csdraft.losses.top_k_kl import top_k_kl
from csdraft.losses.total_variation import total_variation
from tests.losses.test_contract import VOCAB, logits


def probs(values):
    e = np.exp(values - values.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    return np.sum(a * np.log(a / b), -1)


def np_jsd(p, q, labels, beta):
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def np_top_k_kl(p, q, labels, k):
    top = np.argsort(-p, -1)[:, :k]
    p_top, q_top = np.take_along_axis(p, top, -1), np.take_along_axis(q, top, -1)
    p_rest, q_rest = 1 - p_top.sum(-1), 1 - q_top.sum(-1)
    return kl(p_top, q_top) + p_rest * np.log(p_rest / q_rest)


def np_top_k(p, q, labels, k):
    top = np.argsort(-p, -1)[:, :k]
    return -np.sum(np.take_along_axis(p, top, -1) * np.log(np.take_along_axis(q, top, -1)), -1)


CASES = [
    (forward_kl, {}, lambda p, q, labels: kl(p, q)),
    (reverse_kl, {}, lambda p, q, labels: kl(q, p)),
    (jsd, {"beta": 0.5}, np_jsd),
    (jsd, {"beta": 0.1}, np_jsd),
    (total_variation, {}, lambda p, q, labels: 0.5 * np.abs(p - q).sum(-1)),
    (acceptance, {}, lambda p, q, labels: -np.log(np.minimum(p, q).sum(-1))),
    (cross_entropy, {}, lambda p, q, labels: -np.log(q[np.arange(len(labels)), labels])),
    (top_k_kl, {"k": 1}, np_top_k_kl),
    (top_k_kl, {"k": 8}, np_top_k_kl),
    (top_k, {"k": 1}, np_top_k),
    (top_k, {"k": 8}, np_top_k),
]


@pytest.mark.parametrize(("loss", "options", "reference"), CASES, ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_equals_its_definition(loss, options, reference, scale):
    student, target, labels = logits(scale)
    p, q = (probs(x.detach().double().numpy()) for x in (target, student))
    expected = reference(p, q, labels.numpy(), **options)
    np.testing.assert_allclose(loss(student, target, labels, **options).detach().numpy(), expected, 1e-4, 1e-6)


def test_defaults_are_those_of_the_docs():
    student, target, labels = logits()
    torch.testing.assert_close(jsd(student, target, labels), jsd(student, target, labels, beta=0.5))
    torch.testing.assert_close(top_k_kl(student, target, labels), top_k_kl(student, target, labels, k=64))
    torch.testing.assert_close(top_k(student, target, labels), top_k(student, target, labels, k=10))


def test_forward_kl_is_cross_entropy_on_soft_labels():
    """Same gradient: training with it is training on all of the target's samples at once."""
    student, target, labels = logits()
    forward_kl(student, target, labels).sum().backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - target.softmax(-1)).detach(), atol=1e-5, rtol=1e-4)


def test_cross_entropy_does_not_read_the_target():
    student, target, labels = logits()
    assert torch.equal(cross_entropy(student, target, labels), cross_entropy(student, -target, labels))


def test_total_variation_and_acceptance_are_one_figure():
    student, target, labels = logits()
    torch.testing.assert_close(
        1 - total_variation(student, target, labels), (-acceptance(student, target, labels)).exp()
    )


def test_acceptance_still_has_a_gradient_where_total_variation_has_lost_it():
    target = torch.zeros(1, 4)
    target[0, 0] = 200.0
    steepness = []
    for loss in (acceptance, total_variation):
        student = target.flip(-1).requires_grad_()
        loss(student, target, torch.zeros(1, dtype=torch.long)).sum().backward()
        steepness.append(student.grad.abs().max())
    assert steepness[0] > 0.1 > 1e-6 > steepness[1]


def test_the_ends_of_jsd_are_the_two_kl():
    student, target, labels = logits(1.0)
    low, high = (jsd(student, target, labels, beta=beta) for beta in (0.001, 0.999))
    torch.testing.assert_close(low / 0.001, forward_kl(student, target, labels), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(high / 0.001, reverse_kl(student, target, labels), atol=1e-3, rtol=1e-2)
    assert jsd(*logits(100.0)).max() <= math.log(2) + 1e-5


def test_top_k_kl_grows_with_k_to_forward_kl():
    student, target, labels = logits()
    values = [top_k_kl(student, target, labels, k=k) for k in (1, 4, 16, VOCAB, 10 * VOCAB)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-6).all()
    torch.testing.assert_close(values[-1], forward_kl(student, target, labels))
    torch.testing.assert_close(values[-2], values[-1])


def test_top_k_by_hand():
    """Target 1/2, 1/4, 1/8, 1/8; student 1/8, 1/2, 1/4, 1/8: the top two cost 1/2 log 8 + 1/4 log 2."""
    target, student = (torch.tensor([of]).log() for of in ([0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]))
    labels = torch.tensor([3])
    assert top_k(student, target, labels, k=1).item() == pytest.approx(0.5 * math.log(8))
    assert top_k(student, target, labels, k=2).item() == pytest.approx(0.5 * math.log(8) + 0.25 * math.log(2))
    assert top_k(target, target, labels, k=2).item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4))


def test_top_k_of_all_tokens_is_forward_kl_and_the_targets_entropy():
    student, target, labels = logits()
    entropy = -(target.softmax(-1) * target.log_softmax(-1)).sum(-1)
    whole = top_k(student, target, labels, k=10 * VOCAB)
    torch.testing.assert_close(whole, forward_kl(student, target, labels) + entropy)


@pytest.mark.parametrize(
    ("loss", "options"), [(jsd, {"beta": 0.0}), (jsd, {"beta": 1.0}), (top_k_kl, {"k": 0}), (top_k, {"k": 0})]
)
def test_options_that_make_no_sense_are_refused(loss, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        loss(*logits(), **options)
