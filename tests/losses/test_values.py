"""Each loss against a few lines of NumPy in float64, and what relates one loss to another."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csdraft.losses.acceptance import acceptance
from csdraft.losses.cross_entropy import cross_entropy
from csdraft.losses.forward_kl import forward_kl
from csdraft.losses.jsd import jsd
from csdraft.losses.reverse_kl import reverse_kl
from csdraft.losses.top_k_kl import top_k_kl
from csdraft.losses.total_variation import total_variation
from csdraft.metrics.acceptance import expected_acceptance

POSITIONS, VOCAB = 9, 30
STUDENT, TARGET = (3 * torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS = torch.arange(POSITIONS) * 3


def probs(logits: Tensor) -> np.ndarray:
    powers = np.exp(logits.double().numpy())
    return powers / powers.sum(-1, keepdims=True)


student, target = probs(STUDENT), probs(TARGET)


def kl(one, other):
    return (one * np.log(one / other)).sum(-1)


def lumped(k):
    """Both laws over the target's k most probable tokens and one outcome for the others."""
    top = np.argsort(-target, -1)[:, :k]
    kept = [np.take_along_axis(law, top, -1) for law in (target, student)]
    return [np.concatenate([law, 1 - law.sum(-1, keepdims=True)], -1) for law in kept]


def mixed(beta):
    mixture = beta * target + (1 - beta) * student
    return beta * kl(target, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (forward_kl, {}, kl(target, student)),
        (reverse_kl, {}, kl(student, target)),
        (jsd, {}, mixed(0.5)),
        (jsd, {"beta": 0.1}, mixed(0.1)),
        (total_variation, {}, np.abs(target - student).sum(-1) / 2),
        (acceptance, {}, -np.log(np.minimum(target, student).sum(-1))),
        (cross_entropy, {}, -np.log(student[np.arange(POSITIONS), LABELS.numpy()])),
        (top_k_kl, {"k": 5}, kl(*lumped(5))),
        (top_k_kl, {"k": 1}, kl(*lumped(1))),
        (top_k_kl, {"k": VOCAB}, kl(target, student)),
        (top_k_kl, {}, kl(target, student)),
    ],
)
def test_numpy_agrees(loss, options, expected):
    values = loss(STUDENT, TARGET, LABELS, **options)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_jsd_tends_to_the_two_kls():
    beta, near = 1e-3, (STUDENT / 5, TARGET / 5, LABELS)
    assert torch.allclose(jsd(*near, beta=beta) / beta, forward_kl(*near), rtol=0.02)
    assert torch.allclose(jsd(*near, beta=1 - beta) / beta, reverse_kl(*near), rtol=0.02)


def test_what_is_rejected_is_what_is_not_accepted():
    accepted = expected_acceptance(STUDENT, TARGET)
    assert torch.allclose(total_variation(STUDENT, TARGET, LABELS), 1 - accepted, atol=1e-6)
    assert torch.allclose(acceptance(STUDENT, TARGET, LABELS), -accepted.log(), atol=1e-5)


def test_telling_more_tokens_apart_finds_more_difference():
    values = torch.stack([top_k_kl(STUDENT, TARGET, LABELS, k=k) for k in range(1, VOCAB + 1)])
    assert (values.diff(dim=0) >= -1e-5).all()
    assert torch.allclose(values[-1], forward_kl(STUDENT, TARGET, LABELS), atol=1e-5)


def test_disjoint_laws_still_have_a_way_to_meet():
    """Where total variation has lost its gradient, the logarithm of acceptance has not."""
    apart = torch.zeros(1, 4)
    apart[0, 0] = 200.0
    gradients = []
    for loss in (acceptance, total_variation):
        logits = apart.flip(-1).requires_grad_(True)
        loss(logits, apart, LABELS[:1]).sum().backward()
        gradients.append(logits.grad.abs().max())
    assert gradients[0] > 0.1
    assert gradients[1] < 1e-6


@pytest.mark.parametrize(("loss", "options"), [(jsd, {"beta": 0}), (jsd, {"beta": 1.0}), (top_k_kl, {"k": 0})])
def test_options_that_make_no_sense(loss, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(STUDENT, TARGET, LABELS, **options)
