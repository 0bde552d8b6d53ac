"""The mixed loss in chunks: the numbers and gradients of the plain computation, in memory that does not grow."""

import copy
import types
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from csdraft.losses.cross_entropy import cross_entropy
from csdraft.losses.forward_kl import forward_kl
from csdraft.losses.jsd import jsd
from csdraft.trainers.objective import Objective, losses
from csdraft.trainers.split import head_of, hidden_of, logits_of
from tests.tiny import COMMON, ENCODER_DECODERS, FAMILIES, REFUSED, fresh, noisy, tiny

MIXED = {"forward_kl": 1.0, "cross_entropy": 0.1, "jsd": {"weight": 0.5, "beta": 0.3}}
MORE = {  # families whose heads do something of their own
    "cohere": ("CohereConfig", "CohereForCausalLM", COMMON | {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", COMMON | {"logits_scaling": 3.0}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", COMMON | {"num_local_experts": 4}),
    "bart": REFUSED["bart"],  # by sessions, not here
}


def model_of(family: str, **changes: object) -> nn.Module:
    if family not in MORE:
        return fresh(family, **changes)
    config, model, options = MORE[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**(options | changes))).eval()


def texts_of(family: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels: two blocks of packed texts; of an encoder-decoder two padded pairs."""
    ids = torch.randint(3, 97, (2, 18), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if family in (*ENCODER_DECODERS, "bart"):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 5:] = 0
        labels[1, 12:] = -100
        return {"input_ids": ids[:, :9], "attention_mask": mask, "decoder_input_ids": ids.roll(1, 1)}, labels
    positions = torch.stack([torch.arange(18), torch.cat([torch.arange(7), torch.arange(11)])])
    labels[positions == 0] = -100
    labels[0, 3:6] = -100
    return {"input_ids": ids, "position_ids": positions}, labels


def plain(student: nn.Module, target: nn.Module, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """The mixed loss as one would write it for a batch that fits."""
    after = 0 if "decoder_input_ids" in inputs else 1
    labels = labels[:, after:]
    scored = labels != -100
    student_logits, target_logits = (
        model(**inputs, use_cache=False).logits[:, : labels.shape[1]][scored] for model in (student, target)
    )
    of = student_logits, target_logits.detach(), labels[scored]
    return forward_kl(*of).sum() + 0.1 * cross_entropy(*of).sum() + 0.5 * jsd(*of, beta=0.3).sum()


def ours(student: nn.Module, target: nn.Module, inputs: dict, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    after = 0 if "decoder_input_ids" in inputs else 1
    labels = labels[:, after:]
    scored = labels != -100
    hidden = [hidden_of(model, **inputs)[:, : labels.shape[1]][scored] for model in (student, target)]
    return Objective(MIXED, chunk=chunk).total(*hidden, labels[scored], head_of(student), head_of(target))


def gradients(model: nn.Module, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(student, target, inputs, labels, chunk):
    expected = plain(student, target, inputs, labels)
    wanted = gradients(student, expected)
    target.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = ours(student, target, inputs, labels, chunk)
    found = gradients(student, total)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1), msg=name)
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_family_trains_as_with_whole_logits(family, tied):
    target = model_of(family, tie_word_embeddings=tied)
    assert_same_training(noisy(target), target, *texts_of(family), chunk=5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_chunk_changes_nothing(chunk):
    target = tiny("gemma2")
    assert_same_training(noisy(target), copy.deepcopy(target), *texts_of("gemma2"), chunk=chunk)


def test_adapters_train_as_with_whole_logits():
    """LoRA on the head too: it is the module that is called."""
    peft = pytest.importorskip("peft")
    target = fresh("llama")
    student = peft.get_peft_model(noisy(target), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert_same_training(student.eval(), target, *texts_of("llama"), chunk=5)
    assert any("lm_head" in name for name, p in student.named_parameters() if p.grad is not None)


class Odd(transformers.LlamaForCausalLM):
    """Its logits depend on what the head does not read."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits + input_ids[..., None] / 10
        output.logits[..., 0] = output.logits[..., 0] + input_ids / 10
        return output


class Biased(transformers.LlamaForCausalLM):
    """So do these, and without input they differ in silence."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        if input_ids is not None:
            output.logits[..., 0] = output.logits[..., 0] + input_ids / 10
        return output


class Elsewhere(nn.Module):
    """Keeps its parts where no family has them."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__()
        self.config, self.inner = config, transformers.LlamaForCausalLM(config)

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize(
    ("family", "reason"),
    [(Odd, "cannot be run separately"), (Biased, "give other logits"), (Elsewhere, "no part that makes")],
)
def test_a_family_that_cannot_be_split_is_warned_about_and_trained(family, reason):
    target = tiny("llama")
    student = family(target.config).eval()
    inputs, labels = texts_of("llama")
    with pytest.warns(UserWarning, match=f"{reason}.*logits of all positions are held at once"):
        total = ours(student, target, inputs, labels, chunk=5)
    torch.testing.assert_close(total, plain(student, target, inputs, labels), rtol=1e-5, atol=1e-4)


def test_the_probe_leaves_a_model_as_it_was():
    student = fresh("llama").train()
    student.model.layers[0].eval()
    before = {name: module.training for name, module in student.named_modules()}
    random = torch.get_rng_state()
    head_of(student)
    assert {name: module.training for name, module in student.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in student.parameters())


def test_hooks_of_the_head_run_and_a_forward_set_on_the_model_does_not():
    """Sharding and offloading live in modules' hooks; accelerate also sets `forward` on the model itself."""
    model, seen = fresh("llama"), []
    head = head_of(model)
    model.forward = types.MethodType(lambda self, **inputs: pytest.fail("ran the model"), model)
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    head(torch.randn(3, 32))
    assert seen == ["head"]


def test_parts_that_a_wrapper_replaces_later_are_used():
    model = fresh("llama")
    head = head_of(model)
    model.lm_head = nn.Linear(32, 5)
    assert head(torch.randn(3, 32)).shape == (3, 5)


def test_sharded_weights_are_not_tried():
    """Under ZeRO-3 they have no elements until a module is called in its turn."""
    model = fresh("llama")
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = torch.empty(0)
    head = head_of(model)
    model.lm_head.weight.data = weight
    hidden = torch.randn(4, 32)
    assert torch.equal(head(hidden), model.lm_head(hidden))


@pytest.mark.parametrize("family", ["llama", "gemma2", *(name for name in MORE if name != "bart")])
def test_some_tokens_need_only_their_rows_of_the_output_layer(family):
    model, tokens = model_of(family), torch.tensor([3, 90, 7, 12])
    head = head_of(model.requires_grad_(False))
    some, hidden = logits_of(tokens, head), torch.randn(5, 32)
    assert some(hidden[:0]).shape == (0, 4)
    torch.testing.assert_close(some(hidden), head(hidden)[:, tokens])
    with torch.no_grad():  # what it reads from now on is a copy
        model.get_output_embeddings().weight.zero_()
    assert some(hidden).abs().max() > 0.01


@pytest.mark.parametrize("masked", [-5.0, torch.finfo(torch.float32).min, -torch.inf])
def test_a_family_that_treats_tokens_differently_computes_all(masked):
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, *args, **options):
            found = super().forward(*args, **options)
            logits = torch.cat([found.logits[..., :7].clamp(max=masked), found.logits[..., 7:]], -1)
            return found.__class__(logits=logits)

    head, tokens, hidden = head_of(Masked(tiny("llama").config).eval()), torch.tensor([3, 90]), torch.randn(5, 32)
    some = logits_of(tokens, head)
    assert torch.equal(some(hidden), head(hidden)[:, tokens])
    assert head.parts == {}


def test_all_tokens_need_no_copy_of_the_output_layer():
    head, hidden = head_of(tiny("llama")), torch.randn(5, 32)
    assert torch.equal(logits_of(torch.arange(97), head)(hidden), head(hidden))
    assert head.parts == {}


def test_an_output_layer_with_hooks_computes_all():
    """They may bring its weights, or bring the hidden states to its device."""
    model, seen = fresh("llama"), []
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    head = head_of(model)
    seen.clear()
    logits_of(torch.tensor([3]), head)(torch.randn(5, 32))
    assert seen == ["head"]


# Heads without models.


class Counting(nn.Linear):
    """A head that counts its calls."""

    calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input)


def parts(positions: int, vocab: int = 50, target_vocab: int | None = None, width: int = 8):
    """Hidden states, labels and heads; the student's hidden states want a gradient."""
    torch.manual_seed(0)
    student, target = torch.randn(positions, width, requires_grad=True), torch.randn(positions, width)
    heads = Counting(width, vocab, bias=False), Counting(width, target_vocab or vocab, bias=False)
    return student, target, torch.randint(vocab, (positions,)), *heads


@pytest.mark.parametrize(("chunk", "calls"), [(20, 1), (7, 6)])
def test_heads_run_once_if_all_fits_into_a_chunk(chunk, calls):
    """And a second time in the backward of each chunk if not."""
    student, target, labels, *heads = parts(20)
    Objective({"forward_kl": 1.0}, chunk=chunk).total(student, target, labels, *heads).backward()
    assert [head.calls for head in heads] == [calls, calls]
    with torch.no_grad():
        Objective({"forward_kl": 1.0}, chunk=7).total(student, target, labels, *heads)
    assert heads[0].calls == calls + 3


def test_heads_run_as_often_as_in_the_process_with_the_most_positions(monkeypatch):
    """Where heads are sharded, each call of one is a call of all."""
    student, target, labels, *heads = parts(5)
    objective = Objective(MIXED, chunk=5)
    expected = objective.total(student, target, labels, *heads)
    wanted = torch.autograd.grad(expected, [student, heads[0].weight])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, _: count.fill_(8))
    heads[0].calls = heads[1].calls = 0
    total = objective.total(student, target, labels, *heads)
    assert heads[0].calls == heads[1].calls == 8
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, [student, heads[0].weight]), wanted)
    assert heads[0].calls == heads[1].calls == 16


@pytest.mark.parametrize(("vocab", "target_vocab"), [(50, 64), (64, 50)])
def test_the_wider_vocabulary_is_cut(vocab, target_vocab):
    student, target, _, *heads = parts(20, vocab, target_vocab)
    labels = torch.randint(50, (20,))
    total = Objective(MIXED, chunk=6).total(student, target, labels, *heads)
    cut = [copy.deepcopy(head) for head in heads]
    for head in cut:
        head.weight = nn.Parameter(head.weight[:50].detach())
    torch.testing.assert_close(total, Objective(MIXED).total(student, target, labels, *cut))


def test_temperatures_divide_the_logits():
    student, target, labels, *heads = parts(20)
    total = Objective({"forward_kl": 2.0}, 0.5, 3.0, chunk=6).total(student, target, labels, *heads)
    expected = forward_kl(heads[0](student) / 0.5, heads[1](target) / 3.0, labels).sum()
    torch.testing.assert_close(total, 2 * expected)


@pytest.mark.parametrize("name", losses())
def test_no_positions_are_zero_with_zero_gradients(name):
    student, target, labels, *heads = parts(0)
    total = Objective({name: 1.0}).total(student, target, labels, *heads)
    total.backward()
    assert total.item() == 0
    assert torch.equal(heads[0].weight.grad, torch.zeros_like(heads[0].weight))


def test_the_target_gets_no_gradient():
    student, target, labels, *heads = parts(20)
    target.requires_grad_()
    Objective({"jsd": 1.0}, chunk=6).total(student, target, labels, *heads).backward()
    assert heads[1].weight.grad is None
    assert target.grad is None
    assert heads[0].weight.grad is not None


@pytest.mark.parametrize("chunk", [6, 20])
def test_autocast_holds_in_the_backward_too(chunk):
    student, target, labels, *heads = parts(20)
    with torch.autocast("cpu", torch.bfloat16):
        total = Objective(MIXED, chunk=chunk).total(student, target, labels, *heads)
    total.backward()
    assert total.dtype == torch.float32
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": {}}, "must give weights"),
        ({"losses": {"foward_kl": 1.0}}, "no loss 'foward_kl'.*forward_kl"),
        ({"losses": {"_log_probs": 1.0}}, "no loss"),
        ({"losses": {"jsd": {"betta": 0.5}}}, "jsd has no option 'betta'.*beta"),
        ({"losses": {"jsd": {"beta": 2.0}}}, "beta=2.0 must"),
        ({"losses": {"jsd": {"beta": "half"}}}, "jsd={'beta': 'half'} has an option of the wrong type"),
        ({"losses": {"jsd": None}}, "weight of jsd=None must be a number"),
        ({"losses": {"forward_kl": {"beta": 0.5}}}, "forward_kl has no option 'beta'"),
        ({"losses": {"forward_kl": -1.0}}, "weight of forward_kl=-1.0"),
        ({"losses": {"forward_kl": "1"}}, "weight of forward_kl='1'"),
        ({"losses": {"forward_kl": float("nan")}}, "weight of forward_kl=nan"),
        ({"losses": {"forward_kl": 1.0}, "chunk": 0}, "chunk=0"),
        ({"losses": {"forward_kl": 1.0}, "student_temperature": 0}, "student_temperature=0"),
        ({"losses": {"forward_kl": 1.0}, "target_temperature": -1.0}, "target_temperature=-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


# Memory.


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("positions", [64, 256])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk, positions):
    arguments = parts(positions, vocab=500)
    with Largest() as seen:
        Objective(MIXED, chunk=chunk).total(*arguments).backward()
    assert seen.elements == chunk * 500


def peak_of(run) -> int:
    """Bytes that the CPU allocator held at most, on top of what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("mix", [*({name: 1.0} for name in losses()), MIXED], ids=lambda mix: "+".join(mix))
def test_the_peak_is_what_it_says(mix):
    vocab, objective = 2000, Objective(mix, chunk=64)
    peaks = {}
    for positions in (256, 1024):
        arguments = parts(positions, vocab)
        peaks[positions] = peak_of(lambda arguments=arguments: objective.total(*arguments).backward())
    rest = 3 * 8 * vocab * 4 + 8 * 1024 * 8 * 4  # the head's gradient, being summed, and hidden states
    assert peaks[1024] <= objective.peak_bytes(vocab) + rest
    assert peaks[1024] <= peaks[256] + rest  # not of the number of positions
    assert peaks[1024] >= objective.peak_bytes(vocab) / 3  # a bound that says something
