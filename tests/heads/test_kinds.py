"""Laws of heads, for every kind: what it drafts never shows in the text, and training unrolls what it drafts."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.cascade import as_drafter
from csdraft.decoding import feature_session
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.feature_session import FeatureSession
from csdraft.decoding.interfaces import Request
from csdraft.decoding.processing import Processing
from csdraft.decoding.readers import ReadingOptions
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.vertical import Vertical
from csdraft.heads.engines import ServedTarget
from csdraft.heads.head import LAST
from csdraft.models import load_model
from csdraft.trainers.objective import Distillation
from csdraft.trainers.students import check_student, make_student, save_student
from csdraft.trees.best_first import BestFirst
from csdraft.trees.sampled import Sampled
from tests.heads.kinds import NAMES, OBJECTIVE, OPTIONS, batch, learned, new, weights_in, write_weights
from tests.heads.learned import PROMPTS, naive, target, texts
from tests.heads.spied import (
    EVERY,
    FIXED,
    FORMS,
    GREEDY,
    LONG,
    SAMPLED,
    Spied,
    drawn_as_the_target,
    each_way,
    written,
    wrong_parent,
    wrong_target,
)
from tests.tiny import fresh, ragged_batch

OF_EACH = pytest.mark.parametrize("name", NAMES)


@OF_EACH
@FORMS
def test_drafts_are_those_of_a_naive_forward(name, tree, rows):
    """With features dropped at random between rounds: nothing changes but speed."""
    kept, dropped = (Spied(learned(name), tree=tree, forget=forget) for forget in (False, True))
    plain = target().generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **LONG)
    assert torch.equal(written(kept, rows, **LONG), plain)
    assert torch.equal(written(dropped, rows, **LONG), plain)
    assert kept.drafts == dropped.drafts
    assert len(kept.errors) > 10 * rows
    assert max(kept.errors + dropped.errors) < 1e-4


@OF_EACH
def test_it_continues_what_another_has_drafted(name):
    """It reads the copied token before its own, with its output at the text's last token."""
    spied = Spied(learned(name))
    plain = target().generate(**ragged_batch(PROMPTS), pad_token_id=0, **GREEDY)
    assert torch.equal(written(Horizontal((MaxGram(), spied), (1, 2)), **GREEDY), plain)
    assert sum(len(parents) > 1 for _, _, parents in spied.drafts) > 3, "a copied token and one of the head, or two"
    assert max(spied.errors) < 1e-4


@OF_EACH
@pytest.mark.parametrize("rows", [1, 3])
@EVERY
def test_the_text_is_the_targets(name, rows, every):
    """As a chain, a tree, a level of a cascade, and as the reviewer of another drafter."""
    head = learned(name)
    plain = target().generate(**ragged_batch(PROMPTS[:rows]), pad_token_id=0, **GREEDY)
    seeds = {**SAMPLED, "row_seeds": SAMPLED["row_seeds"][:rows]}
    drawn = written(MaxGram(), rows, **seeds)
    cascade = CascadeDrafter([head, MaxGram()])
    drafters = (ModelDrafter(head), ModelDrafter(head, tree=BestFirst(3, 12)), cascade, Vertical(head, MaxGram()))
    for drafter, draws in each_way(drafters, rows, every):
        assert torch.equal(written(drafter, rows, **(seeds if draws else GREEDY)), drawn if draws else plain)


@OF_EACH
def test_it_has_learned_to_draft(name):
    """Else the tests above would show little: no token of a draft would ever become text."""
    out = written(ModelDrafter(learned(name)), return_dict_in_generate=True, **GREEDY)
    assert out.report.block_efficiency > 1.3
    untaught = written(ModelDrafter(new(name)), return_dict_in_generate=True, **GREEDY)
    assert out.report.block_efficiency > untaught.report.block_efficiency


@OF_EACH
@pytest.mark.parametrize(
    ("tree", "count"),
    [
        pytest.param(None, 500, id="chain"),
        pytest.param(None, 1500, id="long chain", marks=pytest.mark.slow),
        pytest.param(Sampled(), 1500, id="tree", marks=pytest.mark.slow),
    ],
)
def test_independent_draws_have_the_targets_distribution(name, tree, count):
    drawn_as_the_target(ModelDrafter(learned(name), tree=tree), "rejection" if tree is None else "k_seq", count)


@OF_EACH
@pytest.mark.parametrize("mutant", ["parent", "target"])
def test_a_feature_of_the_wrong_position_is_found(monkeypatch, name, mutant):
    """Of the node above the parent, or of the token before."""
    if mutant == "parent":
        monkeypatch.setattr(feature_session, "_parents", wrong_parent)
    else:
        monkeypatch.setattr(feature_session.FeatureSession, "_of_target", wrong_target)
    spied = Spied(learned(name), tree=BestFirst(3, 9))
    written(spied, **GREEDY)
    assert max(spied.errors) > 1e-3


@OF_EACH
def test_unrolled_steps_are_what_drafting_computes(name):
    """Two texts in a row, which do not see each other: each step from each entry against a naive forward."""
    head, (first, second) = learned(name), (texts()[0, :9].tolist(), texts()[5, :7].tolist())
    ids, positions = torch.tensor([first + second]), torch.tensor([[*range(9), *range(7)]])
    with torch.no_grad():
        states = [target()(torch.tensor([text]), output_hidden_states=True).hidden_states for text in (first, second)]
        features = head.fuse({tap: torch.cat([own[tap] for own in states], 1) for tap in head.taps})
        steps = list(head.unrolled(ids, positions, features, 3))
        for text, start in ((first, 0), (second, 9)):
            for entry in range(len(text) - 1):
                for step in range(min(3, len(text) - 1 - entry)):
                    logits, _ = naive(head, text[: entry + 2], text[entry + 2 : entry + 2 + step])
                    own = head.spread(head.draft_logits(steps[step][:, start + entry]))[0]
                    assert torch.allclose(own.softmax(-1), logits.softmax(-1), atol=1e-5)


@OF_EACH
def test_a_step_changes_the_heads_own_weights_alone(name):
    head = new(name)
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    theirs = {key: tensor.clone() for key, tensor in target().state_dict().items()}
    step = Distillation(head, target(), OBJECTIVE).train()
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], 1.0)
    loss = step(**batch())
    loss.backward()
    optimizer.step()
    changed = {key for key, tensor in head.state_dict().items() if not torch.equal(tensor, before[key])}
    frozen = {key for key, parameter in head.named_parameters() if not parameter.requires_grad}
    assert loss > 0
    assert changed == before.keys() - frozen - {"d2t"}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in target().state_dict().items())


@OF_EACH
def test_a_head_that_computes_what_the_target_does_has_no_loss(monkeypatch, name):
    """And one that is a token off has."""
    head = new(name)
    with torch.no_grad():
        hidden = target()(texts(), output_hidden_states=True).hidden_states[-1]
    rows = target().get_output_embeddings().weight.detach()[head.drafted]
    monkeypatch.setattr(head, "feature_loss", lambda *_: None)

    def loss(shift: int) -> float:
        def oracle(ids: Any, positions: Any, features: Any, steps: int) -> Any:
            return (hidden.roll(-1 - step - shift, 1) for step in range(steps))

        monkeypatch.setattr(head, "unrolled", oracle, raising=False)
        monkeypatch.setattr(head, "draft_logits", lambda output: output @ rows.T, raising=False)
        return float(Distillation(head, target(), OBJECTIVE)(**batch()))

    assert abs(loss(0)) < 1e-5
    assert loss(1) > 0.1


@OF_EACH
@pytest.mark.parametrize("draft_vocab", [60, None])
def test_what_is_saved_is_what_is_loaded(tmp_path, name, draft_vocab):
    head = new(name, draft_vocab=draft_vocab)
    save_student(head, tmp_path)
    file, state = weights_in(tmp_path)
    assert not state.keys() & head.lent.keys()
    found: Any = as_drafter(ModelDrafter(tmp_path), target()).network
    text = texts()[0, :12].tolist()
    for path in ([], text[5:8]):
        for mine, theirs in zip(naive(head, text, path), naive(found, text, path), strict=True):
            assert torch.equal(mine, theirs)
    again = make_student(target(), str(tmp_path))
    assert {key for key, p in again.named_parameters() if not p.requires_grad} == head.lent.keys()
    missing = max(state.keys() - {"t2d"})
    for tampered, says in (({missing: None}, missing), ({"other.weight": torch.ones(2)}, "other.weight")):
        changed = {key: tensor for key, tensor in (state | tampered).items() if tensor is not None}
        write_weights(file, changed)
        with pytest.raises(ValueError, match=says):
            load_model(str(tmp_path))


@pytest.mark.slow
@OF_EACH
def test_a_stored_head_that_has_drafted_can_be_copied(tmp_path, name):
    """Also into another process: a copy is bound to its target when it drafts."""
    save_student(new(name), tmp_path)
    drafter = ModelDrafter(tmp_path)
    first = written(drafter, 1, **GREEDY)
    for copied in (copy.deepcopy(drafter), pickle.loads(pickle.dumps(drafter))):
        assert torch.equal(written(copied, 1, **GREEDY), first)


@OF_EACH
def test_options_of_no_head_are_refused(name):
    for wrong, says in (
        ({"draft_vocab": 0}, "draft_vocab=0"),
        ({"steps": 0}, "steps=0"),
        ({"unheard_of": 1}, "unhea"),
    ):
        with pytest.raises(ValueError, match=says):
            check_student(target().config, init={name: OPTIONS.get(name, {}) | wrong})


def test_a_kind_that_is_unknown_is_named(tmp_path):
    save_student(new("medusa"), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"csdraft_head": "medussa"}))
    with pytest.raises(ValueError, match=r"medussa.*medusa"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [{"options": {"steps": 3, "layers": [1], "target_width": -1, "draft_vocab": 60}}, {"csdraft_head": "eagle3"}],
)
def test_options_on_disk_of_no_head_are_refused(tmp_path, changes):
    save_student(new("ctc"), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["options"] = {"steps": 3} if "csdraft_head" in changes else document["options"]
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(
        ValueError, match=r"config\.json: (no \w+ head has these options|csdraft_head='eagle3' is none of)"
    ):
        load_model(str(tmp_path))


@OF_EACH
def test_logits_along_a_text_are_those_of_first_drafted_tokens(name):
    """Of two texts, one of them shorter and filled up on the left."""
    head, ids = learned(name), texts()[[0, 5], :12].clone()
    ids[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        read = target()(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        states = dict(enumerate(read.hidden_states)) | {LAST: read.hidden_states[-1]}
        logits = head.along({tap: states[tap] for tap in head.taps}, ids, positions, mask)
    for row, start in ((0, 0), (1, 4)):
        for end in range(start + 2, 13):
            wanted, _ = naive(head, ids[row, start:end].tolist(), [])
            assert torch.allclose(logits[row, end - 1].softmax(-1), wanted.softmax(-1), atol=1e-5)


@OF_EACH
def test_another_text_that_an_earlier_one_begins_with_is_drafted_after(name):
    """Its last entry was one among others when it was read."""
    head, long = learned(name), texts()[0, :14]
    chooser = TokenChooser(Processing([], 1), Stopping([]), Sampler(True, [0], 97))
    of_target = Session(target(), chooser, 1, 64, None, 97, reading=ReadingOptions(taps=frozenset(head.taps)))
    session = FeatureSession(head, of_target, chooser, 1, 64, None, 97)
    session.score([Request(0, Text(long), Draft(), (ROOT,))])
    text, draft = long[:9], Draft.chain([3, 7])
    with torch.no_grad():
        (scores,) = session.score([Request(0, Text(text), draft, (0,))])
        wanted, _ = naive(head, text.tolist(), [3])
    assert torch.allclose(scores.logits[0].softmax(-1), wanted.softmax(-1), atol=1e-5)
    assert session.use.fed == session.kept + session.use.rolled_back


def test_a_target_with_several_hidden_states_for_each_token_is_named(monkeypatch):
    """Heads of csdraft are not made for it, but a folder may come from elsewhere."""
    wide = copy.deepcopy(target())
    read = wide.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        out = read(*args, **inputs)
        if out.hidden_states is not None:
            out.hidden_states = tuple(state[..., None, :].expand(-1, -1, 2, -1) for state in out.hidden_states)
        return out

    monkeypatch.setattr(wide, "forward", forward)
    head = new("eagle")
    head.base = None
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(llama\) has several hidden states for each token"):
        wide.generate(**ragged_batch(PROMPTS), pad_token_id=0, assistant=head, **GREEDY)


@pytest.mark.parametrize("name", ["eagle", "dflash"])
def test_a_targets_embedding_may_have_rows_that_are_no_tokens(tmp_path, name):
    """As that of Llama 3.2 Vision, which has eight for pictures; here it is the output layer, too."""
    tall = fresh("llama", num_hidden_layers=3, tie_word_embeddings=True)
    table = torch.nn.Embedding(105, 32)
    table.weight.data[:97] = tall.get_input_embeddings().weight
    tall.model.embed_tokens, tall.lm_head.weight = table, table.weight
    tall.lm_head.register_forward_hook(lambda *called: called[-1][..., :97])
    save_student(make_student(tall, init={name: OPTIONS.get(name, {})}), tmp_path)
    wanted = tall.generate(**ragged_batch(PROMPTS), pad_token_id=0, **GREEDY)
    drafted = tall.generate(**ragged_batch(PROMPTS), assistant=ModelDrafter(tmp_path), **FIXED, **GREEDY)
    assert torch.equal(drafted, wanted)
    head: Any = as_drafter(ModelDrafter(tmp_path), tall).network
    assert torch.equal(head.embed_tokens.weight, table.weight[:97])
    served = ServedTarget.of("tall", tall.config, lambda: table.weight)
    assert torch.equal(served.embedding(), table.weight[:97])  # what an exported head has
