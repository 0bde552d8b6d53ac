"""Drafters that learn from the target's own logits: they change no text, and are accepted on the shipped model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import csdraft
from csdraft.drafters.lookahead import Lookahead
from csdraft.drafters.n_grammys import NGrammys
from csdraft.drafters.ouroboros import Ouroboros
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.drafters.translated import Translated
from tests import tiny

SMOL = "models/smol-target"
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"


def around(drafter: csdraft.Drafter, tokenizer: Any) -> dict[str, csdraft.Drafter]:
    return {
        "token_recycling": TokenRecycling(),
        "lookahead": Lookahead(),
        "n_grammys": NGrammys(depth=5, rows=4),
        "ouroboros": Ouroboros(drafter, ngram=4),
        "translated": Translated(drafter, tokenizer, tokenizer),
    }


@cache
def on_tiny() -> dict[str, csdraft.Drafter]:
    return around(csdraft.ModelDrafter(tiny.drafter_of("llama"), depth=3), tiny.tokenizer())


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["token_recycling", "lookahead", "n_grammys", "ouroboros", "translated"])
def test_the_text_is_the_same_without(name: str, rows: int, sampled: bool) -> None:
    inputs = tiny.inputs_of("llama", rows)
    options = {"max_new_tokens": 16, "do_sample": sampled, "schedule": "fixed", "strict": True}
    if sampled:
        options |= {"temperature": 0.7, "row_seeds": [3, 1, 4][:rows]}
    output = tiny.tiny("llama").generate(**inputs, **options, assistant=on_tiny()[name], return_dict_in_generate=True)
    without = tiny.tiny("llama").generate(**inputs, **options, assistant=csdraft.MaxGram())
    assert output.sequences.tolist() == without.tolist()
    assert output.report.target.drafted.total() > 0


@cache
def smol() -> tuple[Any, dict[str, csdraft.Drafter], dict[str, Any], torch.Tensor]:
    """The shipped model, drafters for it, what both sides get, and what it writes alone."""
    small = csdraft.ModelDrafter("models/smol-drafter", depth=3)
    target = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(SMOL)(PROMPT, return_tensors="pt")
    options = {**inputs, "max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    return target, around(small, SMOL), options, target.generate(**options)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("token_recycling", 2.0), ("lookahead", 1.7), ("ouroboros", 2.8)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("n_grammys", 2.0), ("translated", 2.2))),
    ],
)
def test_accepted_on_the_shipped_model(name: str, least: float) -> None:
    target, drafters, options, plain = smol()
    how = {"schedule": "fixed", "strict": True, "return_dict_in_generate": True}
    output = target.generate(**options, **how, assistant=drafters[name])
    assert torch.equal(output.sequences, plain)
    print(f"{name}: {output.report.block_efficiency:.2f} tokens a round")
    assert output.report.block_efficiency > least


class Peeking(csdraft.MaxGram):
    """Compares what `top` says with the model's own logits."""

    def observe(self, rounds) -> None:
        for finished in rounds:
            draft, text = finished.draft, finished.context.text.tokens
            top = {k: finished.scores.top(k) for k in (1, 4)}
            for node in range(-1, len(draft)):
                ids = torch.tensor([[*text, *(draft.tokens[i] for i in draft.path(node))]])
                wanted = tiny.tiny("llama")(ids).logits[0, -1].topk(4).indices.tolist()
                assert top[4][node + 1].tolist() == wanted
                assert top[1][node + 1].tolist() == wanted[:1]
            assert len(top[4]) == len(draft) + 1


def test_the_likeliest_tokens_of_every_scored_node() -> None:
    """Of the raw logits: no processor shows."""
    options = {"do_sample": True, "top_k": 2, "max_new_tokens": 8, "strict": True, "schedule": "fixed"}
    tiny.tiny("llama").generate(**tiny.inputs_of("llama", 3), **options, assistant=Peeking(depth=3))
