"""The objective: mixing, temperatures and chunks; heads and hidden states of the families."""

import copy
import types
import warnings
import weakref

import pytest
import tiny as tiny_models
import torch
import transformers
from tiny import CAUSAL, COMMON, ENCODER_DECODERS, REFUSED, VOCAB, fresh
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csdraft.losses.cross_entropy import cross_entropy
from csdraft.losses.forward_kl import forward_kl
from csdraft.losses.jsd import jsd
from csdraft.trainers.objective import Objective, head_of, hidden_of, losses

MORE = {
    "cohere": ("CohereConfig", "CohereForCausalLM", COMMON | {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", COMMON | {"logits_scaling": 3.0}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", COMMON | {"num_local_experts": 4}),
}
"""Families whose heads, or what surrounds them, are their own."""

MIXED = {"forward_kl": 1.0, "jsd": {"weight": 0.5, "beta": 0.2}, "cross_entropy": 0.1}


@pytest.fixture(autouse=True, scope="module")
def _more_families():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "FAMILIES", tiny_models.FAMILIES | MORE | {"bart": REFUSED["bart"]})
        yield


def inputs_of(family, rows=3, length=10):
    ids = torch.randint(3, VOCAB, (rows, length))
    if family in (*ENCODER_DECODERS, "bart"):
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)[:, :8]}
    return {"input_ids": ids, "position_ids": torch.arange(length).repeat(rows, 1)}


def pieces(positions=23, width=8, vocab=40, seed=0):
    """Hidden states of student and target, labels, heads; the target's are wider."""
    torch.manual_seed(seed)
    heads = nn.Linear(width, vocab), nn.Linear(width + 3, vocab)
    hidden = torch.randn(positions, width, requires_grad=True), torch.randn(positions, width + 3)
    return *hidden, torch.randint(vocab, (positions,)), *heads


def gradients(value: Tensor, of) -> list[Tensor]:
    return list(torch.autograd.grad(value, of))


def assert_close(ones, others, tolerance=1e-5):
    for one, other in zip(ones, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=tolerance)


# Mixing.


def test_losses_are_added_by_weight():
    student, target, labels, head, target_head = parts = pieces()
    logits = head(student), target_head(target)
    wanted = forward_kl(*logits, labels) + 0.5 * jsd(*logits, labels, beta=0.2) + 0.1 * cross_entropy(*logits, labels)
    total = Objective(MIXED).total(*parts)
    assert total.shape == ()
    assert total.item() == pytest.approx(wanted.sum().item(), rel=1e-5)


def test_temperatures_divide_each_side():
    student, target, labels, head, target_head = parts = pieces()
    wanted = forward_kl(head(student) / 0.5, target_head(target) / 2.0, labels).sum()
    total = Objective({"forward_kl": 1.0}, student_temperature=0.5, target_temperature=2.0).total(*parts)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_wider_vocabulary_is_cut():
    student, target, labels, head, target_head = pieces()
    wider = nn.Linear(11, 47)
    wider.load_state_dict({name: torch.cat([p, p[:7] + 9]) for name, p in target_head.state_dict().items()})
    objective = Objective(MIXED, chunk=5)
    same, padded = (objective.total(student, target, labels, head, other) for other in (target_head, wider))
    assert torch.equal(same, padded)
    swapped = [objective.total(target, student, labels, other, head) for other in (target_head, wider)]
    assert torch.equal(*swapped)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"losses": {"forward_lk": 1.0}}, "did you mean 'forward_kl'.* known: acceptance, cross_entropy"),
        ({"losses": {"_log_probs": 1.0}}, "no loss '_log_probs'"),
        ({"losses": {"jsd": {"betta": 0.5}}}, "jsd has no option 'betta': did you mean 'beta'.* known: weight, beta"),
        ({"losses": {"jsd": {"beta": 2.0}}}, "beta=2.0 must lie between 0 and 1"),
        ({"losses": {"top_k_kl": {"k": 0}}}, "k=0 must be 1 or more"),
        ({"losses": {"forward_kl": {"beta": 0.5}}}, "forward_kl has no option 'beta'"),
        ({"losses": {"forward_kl": 0}}, "weight of forward_kl=0 must be a number above 0"),
        ({"losses": {"forward_kl": "1e-3"}}, "weight of forward_kl='1e-3' must be"),
        ({"losses": {}}, "losses={} must give a weight to each of some of: acceptance"),
        ({"losses": "forward_kl"}, "losses='forward_kl' must give"),
        ({"losses": {"jsd": 1.0}, "student_temperature": 0}, "student_temperature=0 must be a number above 0"),
        ({"losses": {"jsd": 1.0}, "target_temperature": float("nan")}, "target_temperature=nan"),
        ({"losses": {"jsd": 1.0}, "chunk": 0}, "chunk=0 must be a number of positions"),
    ],
)
def test_mistakes_are_found_at_construction(arguments, match):
    with pytest.raises(ValueError, match=match):
        Objective(**arguments)


def test_options_are_the_losses_own():
    assert [weight for weight, _ in Objective({"top_k_kl": {"k": 3}, "jsd": {"beta": 0.1, "weight": 2}}).terms] == [1, 2]


# Chunks.


@pytest.mark.parametrize("chunk", [1, 7, 23])
def test_chunks_change_nothing(chunk):
    parts = pieces()
    of = [parts[0], *parts[3].parameters()]
    whole = Objective(MIXED, chunk=1000).total(*parts)
    total = Objective(MIXED, chunk=chunk).total(*parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_close(gradients(total, of), gradients(whole, of))


def test_nothing_flows_to_the_target():
    parts = pieces()
    parts[1].requires_grad_(True)
    Objective(MIXED, chunk=5).total(*parts).backward()
    assert parts[1].grad is None
    assert all(parameter.grad is None for parameter in parts[4].parameters())


@pytest.mark.parametrize("chunk", [4, 1000])
def test_no_positions_give_zero_gradients_rather_than_none(chunk):
    """A process without labelled positions must still take part in the others' reduction."""
    student, target, labels, *heads = pieces(0)
    total = Objective(MIXED, chunk=chunk).total(student, target, labels, *heads)
    total.backward()
    assert total.item() == 0
    assert all((parameter.grad == 0).all() for parameter in heads[0].parameters())


def test_more_chunks_than_positions_agree_with_other_processes(monkeypatch):
    """Every process calls the heads as often as the one with the most positions."""
    parts = pieces(5)
    calls = []
    parts[3].register_forward_pre_hook(lambda *_: calls.append(1))
    wanted = Objective(MIXED).total(*parts)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, _: tensor.fill_(8))
    calls.clear()
    total = Objective(MIXED, chunk=5).total(*parts)
    assert len(calls) == 8
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    of = [parts[0], *parts[3].parameters()]
    assert_close(gradients(total, of), gradients(wanted, of))
    assert len(calls) == 16


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, while they live."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.enter(tensor.untyped_storage())
        return output

    def enter(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and size:
            self.alive[key] = weakref.ref(storage, lambda _: self.leave(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def leave(self, key, size):
        del self.alive[key]
        self.now -= size


def peak(objective, positions, vocab, dtype=torch.float32):
    student, target, labels, *heads = pieces(positions, 2, vocab)
    student, target = student.detach().to(dtype).requires_grad_(True), target.to(dtype)
    heads = [head.to(dtype) for head in heads]
    with Peak() as seen:
        objective.total(student, target, labels, *heads).backward()
    return seen.most


@pytest.mark.parametrize("name", [*losses(), "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_chunk_and_not_with_positions(name, dtype):
    vocab, chunk = 500, 64
    objective = Objective(MIXED if name == "mixed" else {name: 1.0}, chunk=chunk)
    one, four, eight = (peak(objective, chunk * n, vocab, dtype) for n in (1, 4, 8))
    logits = 4 * chunk * vocab
    assert max(one, four, eight) < objective.peak_bytes(vocab) + 0.25 * logits  # hidden states, gradients of weights
    assert abs(eight - four) < 0.25 * logits
    whole = Objective(objective.losses, chunk=chunk * 8)
    assert peak(whole, chunk * 8, vocab, dtype) > 6 * eight
    assert objective.peak_bytes(vocab) < 2.6 * max(one, eight)  # the stated figure is no idle one


# Heads and hidden states.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*CAUSAL, *ENCODER_DECODERS, *MORE, "bart"])
def test_head_of_hidden_is_the_model(family, tied):
    model, inputs = fresh(family, tie_word_embeddings=tied), inputs_of(family)
    hidden = hidden_of(model, **inputs)
    assert hidden.shape[2] == 32 != VOCAB
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.allclose(head_of(model)(hidden.flatten(0, 1)), logits.flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2", "t5", "cohere"])
def test_chunked_gradients_are_those_of_the_models_own_logits(family, tied):
    """Of every parameter: tied embeddings get both their shares, soft caps and scales are passed."""
    student = fresh(family, tie_word_embeddings=tied)
    target, inputs = fresh(family, seed=1), inputs_of(family)
    labels = torch.randint(VOCAB, (student(**inputs).logits.shape[0] * student(**inputs).logits.shape[1],))
    wanted = forward_kl(student(**inputs).logits.flatten(0, 1), target(**inputs).logits.flatten(0, 1), labels).sum()
    of = [parameter for parameter in student.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(wanted, of, allow_unused=True)
    hidden = [hidden_of(model, **inputs).flatten(0, 1) for model in (student, target)]
    total = Objective({"forward_kl": 1.0}, chunk=4).total(*hidden, labels, head_of(student), head_of(target))
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
    for got, parameter in zip(torch.autograd.grad(total, of, allow_unused=True), expected, strict=True):
        assert (got is None) == (parameter is None)
        if got is not None:
            assert torch.allclose(got, parameter, rtol=1e-3, atol=1e-4 * parameter.abs().max())


def test_packed_texts_do_not_see_each_other():
    model = fresh("llama")
    ids = torch.randint(3, VOCAB, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = hidden_of(model, input_ids=ids, position_ids=positions)
    alone = hidden_of(model, input_ids=ids[:, 7:], position_ids=positions[:, 7:])
    assert torch.allclose(packed[:, 7:], alone, atol=1e-5)


def test_adapters_are_part_of_the_model():
    peft = pytest.importorskip("peft")
    model, inputs = fresh("llama"), inputs_of("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    hidden, head = hidden_of(adapted, **inputs), head_of(adapted)
    logits = adapted(**inputs).logits
    assert torch.allclose(head(hidden[0]), logits[0], atol=1e-5)
    assert not torch.allclose(head(hidden[0]), model(**inputs).logits[0], atol=1e-2)


def test_hooks_of_the_head_run_and_a_forward_set_on_the_model_does_not():
    """Offloading and sharding live in hooks of modules; accelerate also sets `forward` on the model."""
    model = fresh("llama")
    head, seen = head_of(model), []
    model.forward = types.MethodType(lambda self, **_: pytest.fail("ran the model"), model)
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    head(torch.randn(3, 32))
    assert seen == [1]


def test_parts_replaced_later_are_used():
    model = fresh("llama")
    head = head_of(model)
    model.lm_head = nn.Linear(32, 5)
    assert head(torch.randn(3, 32)).shape == (3, 5)


def test_the_model_is_left_as_it_was():
    model = fresh("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, before = torch.random.get_rng_state(), dict(model.__dict__)
    head_of(model)(torch.randn(3, 32))
    assert [module.training for module in model.modules()] == modes
    assert model.__dict__ == before
    torch.random.set_rng_state(state)


class Odd(transformers.LlamaForCausalLM):
    """A family whose logits are made of more than the body's output."""

    def forward(self, input_ids=None, **options):
        output = super().forward(input_ids=input_ids, **options)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None]
        return output


class Headless(nn.Module):
    """Keeps its parts where no family has them."""

    def __init__(self):
        super().__init__()
        self.inner = fresh("llama")
        self.config = self.inner.config

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize(("make", "why"), [(Odd, "give other logits"), (Headless, "has no part")])
def test_a_model_that_cannot_be_split_is_read_whole(make, why):
    model = make(fresh("llama").config).eval() if make is Odd else make()
    with pytest.warns(UserWarning, match=f"{why}.*logits of all positions are held at once"):
        head = head_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        inputs = inputs_of("llama")
        hidden = hidden_of(model, **inputs)
    assert torch.equal(head(hidden[0]), model(**inputs).logits[0])


def test_a_model_whose_weights_are_elsewhere_is_not_tried():
    """Sharded weights have no elements until a module is called in its turn."""
    model = fresh("llama")
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = torch.empty(0)
    head = head_of(model)
    model.lm_head.weight.data = weight
    hidden = torch.randn(4, 32)
    assert torch.equal(head(hidden), model.lm_head(hidden))
