"""Hidden states of the target, kept beside keys and values: as if a head had run the target itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import transformers

import csdraft
from csdraft import CascadeDrafter, MaxGram
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.draft import Draft
from csdraft.decoding.graphs import RECORDERS
from csdraft.decoding.interfaces import Budget, Context, Drafter
from tests.decoding.tape import recorder, storages
from tests.tiny import drafter_of, fresh, ragged_batch, tiny

TAPS = (0, 1, 2)
WANTED = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "schedule": "fixed", "strict": True}


@dataclass(eq=False)
class ToyHead(Drafter):
    """Drafts what the target's output layer makes of a block's output at the last token that the target has read.

    It compares all features with those of a plain forward over the text.
    """

    depth: int = 3
    branches: int = 1
    forget: bool = False
    seen: list[float] = field(default_factory=list)

    def taps(self) -> frozenset[int]:
        return frozenset(TAPS)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = []
        for context, budget in zip(contexts, budgets, strict=True):
            session = context.call.session(context.call.target)
            if self.forget and len(context.text) % 3 == 0:
                session.forget()
            stop = len(context.text) - 1
            features = session.features(context.row, context.text, stop)
            target = context.call.target
            states = target(torch.tensor([context.text.tokens[:stop]]), output_hidden_states=True).hidden_states
            self.seen += [float((features[tap] - states[tap][0]).abs().max()) for tap in TAPS]
            likely = target.lm_head(features[1][-1]).topk(self.branches).indices.tolist()
            draft = context.draft
            for level in range(min(self.depth, budget.depth)):
                tip = [context.tip if level == 0 else len(draft) - self.branches] * self.branches
                draft = draft.attach(likely, tip, context.call.level(self))
            drafts.append(draft)
        return drafts


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llama", 1),
        ("llama", 3),
        ("gemma2", 3),
        ("gpt2", 3),
        pytest.param("gemma2", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("branches", "forget"),
    [(1, False), pytest.param(2, False, marks=pytest.mark.slow), (2, True)],
    ids=["chain", "tree", "dropped"],
)
def test_features_are_those_of_a_plain_forward(family, rows, branches, forget):
    target, inputs, head = tiny(family), ragged_batch((20, 3, 11)[:rows]), ToyHead(branches=branches, forget=forget)
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    for _ in range(2):  # the second call goes on from the text of the first
        assert torch.equal(target.generate(**inputs, **WANTED, assistant=head), plain)
    assert head.seen
    assert max(head.seen) < 1e-4


def test_they_are_recorded_and_replayed_like_the_rest(monkeypatch):
    csdraft.release()
    monkeypatch.setitem(RECORDERS, "cpu", lambda reader: recorder(lambda: storages(reader)))
    target, inputs, head = fresh("llama"), ragged_batch((20, 3, 11)), ToyHead()
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(target.generate(**inputs, **WANTED, assistant=head), plain)
    assert max(head.seen) < 1e-4
    csdraft.release()


def test_a_head_may_stand_anywhere_in_a_cascade():
    target, inputs, head = tiny("llama"), ragged_batch((20, 3, 11)), ToyHead()
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)
    cascade = CascadeDrafter([drafter_of("llama"), head, MaxGram()])
    assert torch.equal(target.generate(**inputs, **WANTED, assistant=cascade), plain)
    assert max(head.seen) < 1e-4


def test_an_encoder_decoder_has_none():
    with pytest.raises(ValueError, match=r"reads hidden states \[0, 1, 2\]"):
        tiny("t5").generate(**ragged_batch(), **WANTED, assistant=ToyHead())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_users_cache_is_read_again_if_it_holds_the_text(family: str):
    """A cache of other things, such as images or embeddings, is refused."""
    model, inputs = tiny(family), ragged_batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeddings = model.get_input_embeddings()(ids)
    options = {"do_sample": False, "pad_token_id": 0}
    for given in ({"input_ids": ids}, {"inputs_embeds": embeddings + torch.randn_like(embeddings)}):
        cache = {GENERATE_CACHE: transformers.DynamicCache(config=model.config)}
        model.generate(**given, attention_mask=mask, **cache, **options, max_new_tokens=1)
        grown = {"input_ids": torch.cat([ids, ids[:, -2:]], 1), "attention_mask": torch.cat([mask, mask[:, -2:]], 1)}
        if "input_ids" in given:
            plain = model.generate(**grown, **options, max_new_tokens=24)
            assert torch.equal(model.generate(**grown, **cache, **WANTED, assistant=ToyHead()), plain)
        else:
            with pytest.raises(ValueError, match="something else than these tokens"):
                model.generate(**grown, **cache, **WANTED, assistant=ToyHead())
