"""What only Falcon heads do: blocks of tokens from one pass, and a glance at them in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from csdraft.heads.kinds.falcon import FalconOptions
from csdraft.trainers.objective import Distillation
from csdraft.trainers.students import check_student
from csdraft.trees.best_first import BestFirst
from tests.heads import spied as spied_module
from tests.heads import test_kinds
from tests.heads.kinds import OBJECTIVE, OPTIONS, batch, learned, new
from tests.heads.learned import naive, states_along, target, texts
from tests.heads.spied import GREEDY, Spied, written

WIDTH = 32
POSITIONS = torch.arange(40).expand(15, -1)
Entries = list[tuple[Tensor, Tensor]]
"""The embedding and the feature of each."""


@torch.no_grad()
def features_of(head: Any) -> Tensor:
    """(rows, length, feature width) what the head reads of `texts()`."""
    states = dict(enumerate(target()(texts(), output_hidden_states=True).hidden_states))
    return head.fuse({tap: states[3 if tap == -1 else tap] for tap in head.taps})


# The forward, against one that is written out entry by entry.


def recurrent(head: Any, entries: Entries) -> Tensor:
    """(k, width) torch's own LSTM over the last k entries; entries before the text are zeros."""
    block = head.options.block
    lstm = nn.LSTM(2 * WIDTH, WIDTH, num_layers=2)
    for number, layer in enumerate(head.lstm):
        lstm.get_parameter(f"weight_ih_l{number}").copy_(layer.of_input.weight)
        lstm.get_parameter(f"weight_hh_l{number}").copy_(layer.of_state.weight)
        lstm.get_parameter(f"bias_ih_l{number}").copy_(layer.of_input.bias)
        lstm.get_parameter(f"bias_hh_l{number}").zero_()
    none = torch.zeros(WIDTH), torch.zeros(WIDTH)
    read = [none] * (block - len(entries)) + entries[-block:]
    return lstm(torch.stack([torch.cat([head.norm(embedded), feature]) for embedded, feature in read]))[0]


def one_pass(head: Any, entries: Entries) -> list[Tensor]:
    """k of (width,): guesses of the next features. All k queries see all keys."""
    layer, attention, block = head.layer, head.layer.self_attn, head.options.block

    def split(hidden: Tensor, projection: nn.Linear, first: int, rotated: bool) -> Tensor:
        made = projection(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)[None]
        turn = head.rotary(hidden, torch.arange(first, first + len(hidden))[None])
        return (apply_rotary_pos_emb(made, made, *turn)[0] if rotated else made)[0]  # (heads, length, head size)

    keyed = torch.stack([recurrent(head, entries[: i + 1])[-1] for i in range(len(entries))])
    hidden = recurrent(head, entries)  # (k, width)
    query = split(hidden, attention.q_proj, len(entries) - block, True)
    key, value = split(keyed, attention.k_proj, 0, True), split(keyed, attention.v_proj, 0, False)
    mixed = []
    for number, own in enumerate(query):
        group = number // attention.num_key_value_groups
        weights = (own @ key[group].T / attention.head_dim**0.5).softmax(-1)
        mixed.append(weights @ value[group])
    hidden = hidden + attention.o_proj(torch.cat(mixed, -1))
    return list(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("length", [2, 3, 9])
@torch.no_grad()
def test_passes_are_those_of_a_forward_written_out(block, length):
    """Also of a text that is shorter than a block, and for two blocks and more."""
    head, text = new("falcon", block=block, steps=3), texts()[0, :length].tolist()
    for parameter in head.lstm.parameters():  # biases of a new head are 0
        parameter.copy_(0.3 * torch.randn_like(parameter))
    path, embedded = texts()[3, 20:27].tolist(), head.embed_tokens.weight
    features = states_along(tuple(text[:-1]))[-1][0]
    entries = [(embedded[token], feature) for token, feature in zip(text[1:], features, strict=True)]
    queue = one_pass(head, entries)
    for depth in range(len(path)):
        logits, _ = naive(head, text, path[:depth])
        assert torch.allclose(logits[head.drafted], head.lm_head(queue[0]), atol=1e-4)
        entries.append((embedded[path[depth]], queue.pop(0)))
        queue = queue or one_pass(head, entries)


def test_within_a_block_no_distribution_depends_on_the_tokens_before():
    text, head = texts()[0, :9].tolist(), learned("falcon")
    (second, first_of_next), (other_second, other_first) = (
        (naive(head, text, path[:1])[0], naive(head, text, path)[0]) for path in ([3, 5], [8, 13])
    )
    assert torch.equal(second, other_second)
    assert not torch.allclose(naive(head, text, [])[0], second, atol=1e-2)
    assert not torch.allclose(first_of_next, other_first, atol=1e-2)


@pytest.mark.parametrize("tree", [None, BestFirst(3, 9)], ids=["chain", "tree"])
def test_attention_runs_once_a_block(monkeypatch, tree):
    """Once for the text, and once for every second level of a draft."""
    head, calls = learned("falcon"), []
    hook = head.layer.register_forward_hook(lambda _, given, made: calls.append(given[0].shape[1]))
    spied = Spied(head, tree=tree)
    monkeypatch.setattr(spied_module, "naive", lambda *_: (torch.zeros(97), None))  # which runs the layer, too
    written(spied, rows=1, **GREEDY)
    hook.remove()
    drafts = [(tokens, parents) for _, tokens, parents in spied.drafts if tokens]
    deepest = [max(depths(parents)) for _, parents in drafts]
    assert max(deepest) > 2
    assert all(count % 2 == 0 for count in calls)  # two queries a block
    assert calls.count(2) >= len(drafts)  # of the text, its last block alone
    if tree is None:
        assert len(calls) == sum((depth + 1) // 2 for depth in deepest)
    else:
        assert len(calls) <= sum(depth // 2 + 1 for depth in deepest)


def depths(parents: tuple[int, ...]) -> list[int]:
    found: list[int] = []
    for parent in parents:
        found.append(1 + (found[parent] if parent >= 0 else 0))
    return found


@pytest.fixture
def blocks_of_three(monkeypatch):
    """All Falcon heads of a test have them."""
    learned.cache_clear()
    monkeypatch.setitem(OPTIONS, "falcon", {"block": 3})
    yield
    learned.cache_clear()


@pytest.mark.usefixtures("blocks_of_three")
@pytest.mark.slow
def test_larger_blocks_are_as_exact(tmp_path):
    assert new("falcon").options.block == 3
    for tree, rows in ((None, 1), (BestFirst(3, 9), 3)):
        test_kinds.test_drafts_are_those_of_a_naive_forward("falcon", tree, rows)
    test_kinds.test_unrolled_steps_are_what_drafting_computes("falcon")
    test_kinds.test_logits_along_a_text_are_those_of_first_drafted_tokens("falcon")
    test_kinds.test_a_step_changes_the_heads_own_weights_alone("falcon")
    test_kinds.test_what_is_saved_is_what_is_loaded(tmp_path, "falcon", 60)


# Training.


def glance(head: Any) -> tuple[Tensor, Tensor]:
    """What training shows of `texts()`: entries, (rows, length, k, 2 width), and bool which, (rows, length, k)."""
    features, sees = features_of(head), torch.ones(40, 40, dtype=torch.bool).tril().expand(15, 1, -1, -1)
    return head._glance(texts(), POSITIONS, features, sees, head.first(features))


@torch.no_grad()
def test_a_glance_shows_what_an_entry_should_predict():
    """Entry i - 2 + place of a block of three gets the token and the feature that its guess is compared with."""
    head = new("falcon", block=3)
    shown, _ = glance(head)
    hidden = target()(texts(), output_hidden_states=True).hidden_states[-1]
    for row, entry in ((0, 0), (4, 7), (14, 30)):
        for place in range(3):
            embedded = head.embed_tokens.weight[texts()[row, entry + 2 + place]]
            assert torch.equal(shown[row, entry, place], torch.cat([embedded, hidden[row, entry + 1 + place]]))


@torch.no_grad()
def test_a_glance_is_as_long_as_a_block_is_wrong(monkeypatch):
    """`glance` times its wrong tokens on average, from its first entry on; the last is never shown."""
    torch.manual_seed(0)
    head, options = new("falcon", block=3), FalconOptions(steps=3, block=3, glance=0.5)
    head.options = options
    answers = [torch.full((15, 40), 7)] + [
        torch.full((15, 40), token) for token in (7, 8, 9)
    ]  # two of three are wrong
    made = iter(answers * 40)
    monkeypatch.setattr(head, "_best", lambda _: next(made))
    shown = torch.stack([glance(head)[1] for _ in range(40)])  # (40, rows, length, 3)
    assert not (shown[..., 1:] & ~shown[..., :-1]).any()
    assert not shown[..., 2].any()
    whole = shown[:, :, :37]  # blocks that are all in the text
    assert (whole.sum(-1) == 1).all()  # 0.5 x 2
    assert not shown[:, :, 38:].any()  # a block of which one token or none is in the text: that one is right
    torch.manual_seed(1)
    head.options = FalconOptions(steps=3, block=3, glance=0.2)
    made = iter(answers * 40)
    shown = torch.stack([glance(head)[1] for _ in range(40)])
    assert abs(float(shown[:, :, :37].float().sum(-1).mean()) - 0.4) < 0.02


@torch.no_grad()
def test_a_right_block_is_not_shown(monkeypatch):
    head = new("falcon")
    monkeypatch.setattr(head, "_best", lambda guesses: torch.zeros(guesses.shape[:2], dtype=torch.long))
    assert not glance(head)[1].any()


@torch.no_grad()
def test_a_glance_changes_the_guesses_of_training_alone(monkeypatch):
    """What the head remembers of the text stays, and so do its drafts."""
    torch.manual_seed(0)
    head = new("falcon", noise=0, glance=9.0)
    features = features_of(head)
    drafted = list(head.eval().unrolled(texts(), POSITIONS, features, 2))
    trained = list(head.train().unrolled(texts(), POSITIONS, features, 2))
    changed = (drafted[0] != trained[0]).any(1).any(0)  # (feature width,)
    assert changed[1 : 1 + 2 * WIDTH].all()  # the guesses
    assert not changed[0]
    assert not changed[1 + 2 * WIDTH :].any()
    shown = (drafted[0] != trained[0]).any(-1)
    assert float(shown.float().mean()) > 0.8  # nothing is learned yet: nearly every block is wrong
    head.options = FalconOptions(steps=3, noise=0, glance=0)
    plain = list(head.unrolled(texts(), POSITIONS, features, 2))
    assert all(torch.equal(one, other) for one, other in zip(plain, drafted, strict=True))


@torch.no_grad()
def test_what_is_shown_is_read_as_the_blocks_first_entry():
    """As by an LSTM and a pass that are written out; the keys stay the text's."""
    head, row, entry = new("falcon", noise=0, glance=9.0).train(), 0, 9
    features = features_of(head)
    shown, which = glance(head)
    assert bool(which[row, entry, 0])
    output = next(head.unrolled(texts(), POSITIONS, features, 1))[row, entry]
    embedded, feature = shown[row, entry, 0].chunk(2)
    hidden = target()(texts()[row : row + 1, : entry + 1], output_hidden_states=True).hidden_states[-1][0]
    weight, ids = head.embed_tokens.weight, texts()[row, 1 : entry + 2]
    entries = [(weight[token], state) for token, state in zip(ids, hidden, strict=True)]
    block, read = [(embedded, feature), entries[-1]], recurrent
    keyed = [read(head, entries[: i + 1]) for i in range(len(entries))]
    with pytest.MonkeyPatch.context() as patch:  # the pass of one_pass reads the block, its keys the text
        given = iter([*keyed, read(head, block)])
        patch.setitem(one_pass.__globals__, "recurrent", lambda *_: next(given))
        wanted = one_pass(head, entries)
    assert torch.allclose(output[1 : 1 + 2 * WIDTH], torch.cat(wanted), atol=1e-5)


@torch.no_grad()
def test_noise_is_on_the_features_of_training_alone(monkeypatch):
    head, read = new("falcon", noise=0.25, glance=0, block=3), []
    features, inner = features_of(head), type(head)._read
    monkeypatch.setattr(head, "_read", lambda *given: read.append(given[2]) or inner(head, *given))
    list(head.eval().unrolled(texts(), POSITIONS, features, 1))
    list(head.train().unrolled(texts(), POSITIONS, features, 1))
    assert torch.equal(read[0], features)
    noise = (read[1] - features).abs().amax((0, 1))  # (feature width,)
    queue, earlier = noise[1 : 1 + 3 * WIDTH].view(3, WIDTH), noise[1 + 3 * WIDTH :].view(2, 2, WIDTH)
    assert noise[0] == 0
    assert queue[1:].max() == 0
    assert earlier[:, 0].max() == 0  # embeddings
    for part in (queue[0], earlier[:, 1]):
        assert 0.2 < part.min() <= part.max() <= 0.2501


def test_the_loss_compares_the_first_guess_with_the_feature():
    head = new("falcon", noise=0, glance=0)
    outputs, features = torch.randn(5, head.feature_width), torch.randn(5, head.feature_width)
    found = head.feature_loss(outputs, features)
    wanted = nn.functional.smooth_l1_loss(outputs[:, 1 : 1 + WIDTH], features[:, 1 : 1 + WIDTH]) * 5
    assert torch.allclose(found, wanted)
    head.options = FalconOptions(regression=0)
    assert head.feature_loss(outputs, features) is None


def test_the_first_pass_of_training_has_no_gradient():
    """The second one trains every weight."""
    torch.manual_seed(0)
    head = new("falcon", noise=0, glance=0.5)
    assert not glance(head)[0].requires_grad
    Distillation(head, target(), OBJECTIVE).train()(**batch(every=5)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


def test_wrong_tokens_are_counted_in_parts(monkeypatch):
    """So that not all logits are in memory at once."""
    head = new("falcon")
    guesses = torch.randn(3, 40, WIDTH)
    whole = head._best(guesses)
    monkeypatch.setattr("csdraft.heads.kinds.falcon.CHUNK", 7)
    assert torch.equal(head._best(guesses), whole)
    assert torch.equal(whole, head.lm_head(guesses).argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [{"block": 1}, {"block": 3, "steps": 2}, {"glance": -0.1}, {"regression": float("nan")}, {"noise": float("inf")}],
)
def test_options_of_no_falcon_head_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        check_student(target().config, init={"falcon": wrong})
