"""Heads that draft from one hidden state by a small cell: what each has that the tests of all kinds do not ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from csdraft import ModelDrafter
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context
from csdraft.heads.kinds.chimera import Chimera
from csdraft.trainers.objective import Distillation, Objective
from csdraft.trainers.students import check_student
from csdraft.trees.best_first import BestFirst
from tests.heads import test_kinds
from tests.heads.kinds import OBJECTIVE, OPTIONS, batch, learned, new
from tests.heads.learned import naive, target, texts
from tests.heads.spied import GREEDY, SAMPLED, Spied, written


@torch.no_grad()
def last_state(text: list[int]) -> torch.Tensor:
    """(width,) the target's hidden state of the token before a text's last one."""
    return target()(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]


# Hydra.


@pytest.fixture
def prefix(monkeypatch):
    """All Hydra heads of a test have the prefix layer and two blocks."""
    learned.cache_clear()
    monkeypatch.setitem(OPTIONS, "hydra", {"prefix": True, "layers": 2})
    yield
    learned.cache_clear()


@pytest.mark.usefixtures("prefix")
@pytest.mark.slow
def test_hydra_with_a_prefix_layer_is_as_exact(tmp_path):
    assert new("hydra").config.num_hidden_layers == 1
    for tree in (None, BestFirst(3, 9)):
        test_kinds.test_drafts_are_those_of_a_naive_forward("hydra", tree, rows=1)
        test_kinds.test_drafts_are_those_of_a_naive_forward("hydra", tree, rows=3)
    test_kinds.test_unrolled_steps_are_what_drafting_computes("hydra")
    test_kinds.test_it_has_learned_to_draft("hydra")
    test_kinds.test_a_step_changes_the_heads_own_weights_alone("hydra")
    test_kinds.test_what_is_saved_is_what_is_loaded(tmp_path, "hydra", 60)


def test_a_hydra_head_reads_all_tokens_before_its_own():
    head, text, drafted = learned("hydra"), texts()[0, :12].tolist(), [5, 6]
    embedded = head.embed_tokens.weight[[text[-1], *drafted]]
    for number in range(3):
        joined = torch.cat([last_state(text), embedded[: number + 1].flatten()])
        block = head.blocks[number][0]
        read = joined @ block.residual.weight.T + nn.functional.silu(block.linear(joined))
        logits, _ = naive(head, text, drafted[:number])
        assert torch.allclose(logits[head.drafted], read @ head.outputs[number].weight.T, atol=1e-5)


def test_a_hydra_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="layers=0"):
        check_student(target().config, init={"hydra": {"layers": 0}})


@pytest.mark.parametrize("name", ["hydra", "clover2"])
def test_the_text_layer_reads_the_text_alone(prefix, name):
    """Once a round, whatever the depth of the draft; of a batch in which all rows draft."""
    head, calls = learned(name), []
    layer = head.prefix.layer if name == "hydra" else head.augmenting.layer
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        out = written(ModelDrafter(head), 1, return_dict_in_generate=True, **GREEDY)
    finally:
        handle.remove()
    assert 0 < len(calls) <= out.report.rounds


# Recurrent Drafter.


@dataclass(frozen=True, eq=False)
class Counting(ModelDrafter):
    """Notes each draft, and how many drafted tokens the head read for it."""

    rounds: list[tuple[Draft, int]] = field(default_factory=list)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        session, context = contexts[0].call.session(self.network), contexts[0]
        before, unread = session.use.fed, session.unread(context.row, context.text)
        made = super().propose(contexts, budgets)
        if len(made[0]):
            self.rounds.append((made[0], session.use.fed - before - unread))
        return made


def test_beams_of_a_tree_share_their_prefixes():
    """Three beams of four tokens: the text's last token and three tokens a level are read, however beams part."""
    drafter = Counting(learned("redrafter", 40), tree=BestFirst(3, 9))  # one that is unsure: its drafts are deep
    written(drafter, 1, **GREEDY | {"max_new_tokens": 40})
    saved = 0
    full = [(draft, read) for draft, read in drafter.rounds if max(map(draft.depth, range(len(draft)))) >= 3]
    for draft, read in full:
        paths = [tuple(draft.tokens[node] for node in draft.path(node)) for node in range(len(draft))]
        assert len(set(paths)) == len(paths)
        assert read <= 3 * 3
        beams = [path for path in paths if not any(other[:-1] == path for other in paths)]
        saved += sum(map(len, beams)) - len(paths)
    assert len(full) > 3
    assert saved > 2 * len(full)  # what beams that do not share would read more


def test_the_cell_is_that_of_the_paper():
    head, text, drafted = learned("redrafter"), texts()[0, :12].tolist(), [5, 6, 7, 8, 9, 10]
    hidden, state = last_state(text), torch.zeros(32)
    for number, token in enumerate([text[-1], *drafted]):
        state = nn.functional.silu(head.of_state.weight @ state + head.of_token(head.embed_tokens.weight[token]))
        _, output = naive(head, text, drafted[:number])
        assert torch.allclose(output, torch.cat([hidden, state]), atol=1e-5)


# Clover-2.


def test_clover2_compares_hidden_states_too():
    """The further loss is the paper's 10 times smooth L1, each step 0.7 of the one before."""
    head = new("clover2")
    without = new("clover2", regression=0.0)
    ids, positions = batch()["input_ids"], batch()["position_ids"]
    as_drafted = torch.isin(ids, head.drafted)
    with torch.no_grad():
        losses = [float(Distillation(one, target(), OBJECTIVE)(**batch())) for one in (head, without)]
        last = target()(ids, output_hidden_states=True).hidden_states[-1]
        wanted = 0.0
        weights = [0.7**step for step in range(3)]
        for step, output in enumerate(head.unrolled(ids, positions, head.fuse({-1: last}), 3)):
            length = ids.shape[1] - 2 - step
            off = nn.functional.smooth_l1_loss(
                output[:, :length, 32:64], last[:, 1 + step : 1 + step + length], reduction="none"
            )
            counted = as_drafted[:, 2 + step :]
            wanted += 10 * weights[step] / sum(weights) * float(off.mean(-1)[counted].sum()) / ids.numel()
    assert wanted > 0.1
    assert losses[0] - losses[1] == pytest.approx(wanted, rel=1e-3)


# Chimera.


def test_an_ngram_without_its_first_token_is_found(monkeypatch):
    """Most rounds read the newest tokens alone: the session must look back for the token before them."""
    monkeypatch.setattr(Chimera, "before", 0)
    spied: Any = Spied(learned("chimera"))
    written(spied, **SAMPLED)  # texts that it has not learned by heart
    assert max(spied.errors) > 1e-3


def test_chimera_begins_as_the_output_layer_of_both_states():
    head, text = new("chimera", draft_vocab=None), texts()[0, :12].tolist()
    logits, output = naive(head, text, [])
    both = last_state(text) + output[:32]
    rows = target().get_output_embeddings().weight.detach()
    assert torch.allclose(logits, rows @ both, atol=1e-4)


@pytest.mark.parametrize("name", ["hydra", "redrafter", "clover2", "chimera"])
def test_other_losses_train_them_as_well(name):
    """A loss of probabilities and one of hard labels."""
    head = new(name)
    for losses in ({"total_variation": 1.0}, {"cross_entropy": 1.0}):
        loss = Distillation(head, target(), Objective(losses))(**batch())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


def test_a_negative_weight_of_the_loss_on_hidden_states_is_refused():
    with pytest.raises(ValueError, match=r"regression=-1\.0 of a head must be 0"):
        check_student(target().config, init={"clover2": {"regression": -1.0}})
