"""Heads that predict the target's feature: EAGLE-1's losses and noise, HASS's steps, FSPAD's two parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaModel

from csdraft import ModelDrafter
from csdraft.trainers.objective import Distillation, Objective
from csdraft.trainers.students import check_student, make_student
from csdraft.trainers.students._kind import student_of
from tests.heads.kinds import OBJECTIVE, batch, new
from tests.heads.learned import PROMPTS, target, texts
from tests.heads.spied import FIXED, GREEDY
from tests.tiny import CAUSAL, ragged_batch, tiny

POSITIONS = torch.arange(40).expand(15, -1)
OF_EACH = pytest.mark.parametrize("name", ["eagle", "hass", "fspad"])


@torch.no_grad()
def features_of(head: Any) -> torch.Tensor:
    """(rows, length, width) what the head reads of `texts()`."""
    return head.fuse({-1: target()(texts(), output_hidden_states=True).hidden_states[-1]})


def parts(head: Any, objective: Objective = OBJECTIVE) -> Any:
    """What one training step compares, see `HeadKind.compared`, without noise."""
    hidden = features_of(head)
    inputs, output_layer = batch(), target().get_output_embeddings()
    return list(student_of(head).compared(head, {-1: hidden}, hidden, output_layer, inputs["labels"], inputs))


def loss_of(name: str, objective: Objective = OBJECTIVE, **options: Any) -> float:
    """Of one step on `batch()`, without noise."""
    return Distillation(new(name, **options), target(), objective).eval()(**batch()).item()


@torch.no_grad()
def test_it_is_transformers_own_layer_on_joined_inputs():
    """A Llama of one layer without its first and its last norm, fed with embeddings from outside."""
    head = new("eagle", draft_vocab=None, bias=True)
    torch.nn.init.normal_(head.fc.bias)
    config = type(head.config).from_dict(head.config.to_dict() | {"num_hidden_layers": 1})
    whole, features = LlamaModel(config).eval(), features_of(head)
    own = whole.state_dict() | {name: t for name, t in head.state_dict().items() if name in whole.state_dict()}
    whole.load_state_dict(own)
    whole.layers[0].input_layernorm = whole.norm = torch.nn.Identity()
    embedded = target().get_input_embeddings()(texts()[:, 1:])
    joined = torch.cat([embedded, features[:, :-1]], -1) @ head.fc.weight.T + head.fc.bias
    wanted = whole(inputs_embeds=joined).last_hidden_state
    found = head(texts()[:, 1:], features[:, :-1], POSITIONS[:, :-1])
    assert torch.allclose(found.hidden_states[0], wanted, atol=1e-5)
    assert torch.allclose(found.logits, target().lm_head(wanted), atol=1e-4)


def test_the_output_layer_is_the_targets_own():
    whole, part = new("eagle", draft_vocab=None), new("eagle", draft_vocab=60)
    assert torch.equal(whole.lm_head.weight, target().lm_head.weight)
    assert not whole.lm_head.weight.requires_grad
    assert torch.equal(part.lm_head.weight, target().lm_head.weight[part.drafted])
    assert part.lm_head.weight.requires_grad


@OF_EACH
def test_noise_is_of_training_alone(monkeypatch, name):
    head, read = new(name, noise=0.25), []
    features, inner = features_of(head), type(head).output
    monkeypatch.setattr(head, "output", lambda ids, places, given, *rest: read.append(given) or inner(
        head, ids, places, given, *rest))  # fmt: skip
    outputs = list(head.eval().unrolled(texts(), POSITIONS, features, 2))
    assert torch.equal(read[0], features)
    head.along({-1: features}, texts(), POSITIONS, torch.ones_like(texts()))
    assert torch.equal(read[2], features[:, :-1])
    noisy = list(head.train().unrolled(texts(), POSITIONS, features, 2))
    noise = read[3] - features
    assert 0.24 < noise.abs().max() <= 0.25 + 1e-6
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(0.25 / 3**0.5, rel=0.05)
    assert torch.equal(read[4], noisy[0])  # what it has computed has no noise
    assert not torch.equal(noisy[0], outputs[0])
    head.along({-1: features}, texts(), POSITIONS, torch.ones_like(texts()))
    assert torch.equal(read[5], features[:, :-1])  # decoding is not unrolled


@OF_EACH
def test_features_are_compared_with_those_of_the_token_they_predict(name):
    """Each step: the distance by hand, from features without noise, to the target's next feature."""
    head = new(name, steps=2, decay=0.5, regression=2.0, noise=0.1, draft_vocab=None).train()
    torch.manual_seed(3)
    found = [part.item() for part in parts(head) if isinstance(part, torch.Tensor)]
    torch.manual_seed(3)
    features = features_of(head)
    outputs = list(head.unrolled(texts(), POSITIONS, features, 2))
    for step, weight in ((0, 2 / 3), (1, 1 / 3)):
        off = (outputs[step][:, : -2 - step] - features[:, 1 + step : -1]).abs()
        wanted = torch.where(off < 1, off**2 / 2, off - 0.5).mean(-1).sum()
        assert found[step] == pytest.approx((2.0 * weight * wanted).item(), rel=1e-5)


@OF_EACH
def test_the_regression_is_added_to_the_other_losses(name):
    loss = {weight: loss_of(name, regression=weight) for weight in (0.0, 1.0, 3.0)}
    assert loss[1.0] > loss[0.0] + 0.01
    assert loss[3.0] - loss[0.0] == pytest.approx(3 * (loss[1.0] - loss[0.0]), rel=1e-4)
    assert not [part for part in parts(new(name, regression=0.0)) if isinstance(part, torch.Tensor)]


def test_a_kind_is_the_heads_own():
    assert [student_of(new(name)).name for name in ("eagle", "hass", "fspad")] == ["eagle", "hass", "fspad"]


def test_the_steps_of_each_kind():
    made = {name: make_student(target(), init={name: {}}).options for name in ("eagle", "fspad", "hass")}
    assert [of.steps for of in made.values()] == [1, 1, 3]
    assert made["hass"].decay == 1.0


def test_no_gradient_flows_through_the_features_of_hass():
    for name, flows in (("eagle", True), ("hass", False)):
        head = new(name)
        first, second, third = head.unrolled(texts(), POSITIONS, features_of(head), 3)
        reached = torch.autograd.grad(third.sum(), [first, second], allow_unused=True)
        assert [gradient is not None for gradient in reached] == [flows, flows]


def test_hass_of_one_step_is_eagle():
    assert loss_of("hass", steps=1) == loss_of("eagle", steps=1)


def test_hass_takes_its_top_k_loss_beside_another():
    alone = loss_of("hass", Objective({"forward_kl": 0.1})), loss_of("hass", Objective({"top_k": 1.0}))
    both = loss_of("hass", Objective({"forward_kl": 0.1, "top_k": {"weight": 1.0, "k": 10}}))
    regression = sum(part.item() for part in parts(new("hass")) if isinstance(part, torch.Tensor))
    assert both == pytest.approx(sum(alone) - regression / batch()["total"], rel=1e-4)


def test_fspad_fits_features_and_distributions_at_different_places():
    """The features are compared before the adapter, the distributions behind it."""
    head = new("fspad", draft_vocab=None)
    distributions, features = parts(head)[:2]
    features.backward(retain_graph=True)
    assert head.adapt.weight.grad is None
    assert head.up.weight.grad.abs().max() > 0
    OBJECTIVE.total(*distributions[1:]).backward()
    assert head.adapt.weight.grad.abs().max() > 0


def test_fspad_without_its_parts_is_eagle():
    plain, bare = new("eagle", draft_vocab=None), new("fspad", draft_vocab=None, expansion=0, partial_alignment=False)
    assert plain.state_dict().keys() == bare.state_dict().keys()
    assert {name for name in new("fspad").state_dict() if name not in new("eagle").state_dict()} == {
        "up.weight", "gate.weight", "down.weight", "adapt.weight"}  # fmt: skip
    head = new("fspad", draft_vocab=None)  # a new one begins with the feature's own logits
    assert torch.equal(head.draft_logits(features_of(head)), head.lm_head(features_of(head)))


def test_fspad_chooses_parts_of_the_feature_by_the_token():
    head, features = new("fspad"), torch.randn(1, 1, 32)
    for layer in (head.up, head.gate, head.down):
        torch.nn.init.normal_(layer.weight, std=0.3)
    read = [head.joined(head.embed_tokens(torch.tensor([[token]])), features) for token in (3, 4)]
    zero = [head.joined(head.embed_tokens(torch.tensor([[token]])), 0 * features) for token in (3, 4)]
    assert not torch.allclose(read[0] - zero[0], read[1] - zero[1], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("eagle", {"regression": -1.0}, "regression=-1.0"),
        ("eagle", {"noise": -0.1}, "noise=-0.1"),
        ("hass", {"noise": "much"}, "noise"),
        ("fspad", {"expansion": -1}, "expansion=-1"),
        ("eagle", {"expansion": 2}, "expansion"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, wrong, says):
    with pytest.raises(ValueError, match=says):
        check_student(target().config, init={name: wrong})


@pytest.mark.parametrize("family", CAUSAL)
def test_a_head_can_be_made_for_every_family(family):
    model: Any = tiny(family)
    head = make_student(model, init={"eagle": {}}).eval()
    inputs = ragged_batch(PROMPTS)
    plain = model.generate(**inputs, pad_token_id=0, **GREEDY)
    assert torch.equal(model.generate(**inputs, assistant=ModelDrafter(head), **FIXED, **GREEDY), plain)
