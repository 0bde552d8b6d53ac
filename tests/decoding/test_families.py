"""Law 1 and 4, end to end: every family writes what plain `generate` writes, whatever is drafted."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch

from csdraft import ModelDrafter
from csdraft.schedules.fixed import Fixed
from tests import tiny
from tests.tiny import Scripted

NEW = 28
FIXED = {"schedule": Fixed(), "strict": True}
PROCESSORS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4}
CASES = [(family, attention) for family in tiny.FAMILIES for attention in tiny.attentions(family)]
DRAFTERS = ["model", "chain", "tree"]
ALL = list(product((1, 4), (False, True), DRAFTERS))
FAST = [(4, True, "tree"), (4, False, "chain"), (1, False, "model")]
"""Rows, whether there are processors, and what drafts: each value of each, and what asks most of a family together."""


def sweep() -> list:
    """Every family with each of `FAST`; with a second attention implementation, one of them in turn. All if slow."""
    found = []
    for number, (family, attention) in enumerate(CASES):
        first = attention == tiny.attentions(family)[0]
        fast = FAST if first else [FAST[number // 2 % len(FAST)]]
        found += [
            pytest.param(family, attention, *case, marks=[] if case in fast else pytest.mark.slow) for case in ALL
        ]
    return found


@cache
def plain(family: str, attention: str, rows: int, processed: bool):
    """Plain generate's output, its inputs and the options both sides get."""
    inputs = tiny.inputs_of(family, rows)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True} | (PROCESSORS if processed else {})
    return tiny.tiny(family, attention).generate(**inputs, **options), inputs, options


def drafter(kind: str, family: str, attention: str, output, inputs):
    if kind == "model":
        return ModelDrafter(tiny.drafter_of(family, attention), depth=4)
    texts = tiny.continuations(output.sequences, inputs, family)
    return Scripted(texts, wrong=0.35, branches=1 if kind == "chain" else 3)


def check_values(ours, plain_values, sequences, inputs, family: str) -> None:
    """Scores or logits agree wherever a row was still being written."""
    assert len(ours) == len(plain_values)
    start = sequences.shape[1] - len(ours)
    for row, tokens in enumerate(sequences[:, start:].tolist()):
        written = tokens.index(tiny.EOS) + 1 if tiny.EOS in tokens else len(tokens)
        for step in range(written):
            torch.testing.assert_close(ours[step][row], plain_values[step][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "attention", "rows", "processed", "kind"), sweep())
def test_greedy_is_identical(family: str, attention: str, rows: int, processed: bool, kind: str) -> None:
    wanted, inputs, options = plain(family, attention, rows, processed)
    assistant = drafter(kind, family, attention, wanted, inputs)
    output = tiny.tiny(family, attention).generate(**inputs, **options, assistant=assistant, **FIXED)
    assert output.sequences.tolist() == wanted.sequences.tolist()
    check_values(output.scores, wanted.scores, wanted.sequences, inputs, family)
    check_values(output.logits, wanted.logits, wanted.sequences, inputs, family)
    accepted, drafted = output.report.target.accepted.total(), output.report.target.drafted.total()
    assert accepted >= rows, "the drafts were of no use, so this proves little"
    assert accepted < drafted or rows == 1, "nothing was ever rejected, so this proves little"


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_the_encoder_runs_once_per_model(family: str) -> None:
    target, small = tiny.tiny(family), tiny.drafter_of(family)
    counts = {"target": 0, "drafter": 0}
    hooks = [
        model.get_encoder().register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, model in (("target", target), ("drafter", small))
    ]
    try:
        target.generate(**tiny.inputs_of(family, 4), assistant=ModelDrafter(small), max_new_tokens=12, **FIXED)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {"target": 1, "drafter": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "flan"])
def test_low_precision_stays_within_rounding_of_the_one_by_one_argmax(family: str, dtype: torch.dtype) -> None:
    model = tiny.fresh(family, attention="eager").to(dtype)
    inputs = tiny.inputs_of(family, 2)
    wanted = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assistant = Scripted(tiny.continuations(wanted, inputs, family), wrong=0.35, branches=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    output = model.generate(**inputs, **options, assistant=assistant, **FIXED)
    # What plain generate would have seen, had it written this text: its logits, one token at a time.
    forced = iter(output[:, -NEW:].unbind(1))
    told = model.generate(
        **inputs,
        **options,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[lambda ids, scores: torch.full_like(scores, -1e9).scatter_(1, next(forced)[:, None], 0.0)],
    )
    assert told.sequences.tolist() == output.tolist()
    for step, logits in enumerate(told.logits):
        chosen = logits.gather(1, told.sequences[:, step - NEW, None])[:, 0]
        gap = (logits.max(1).values - chosen).max()
        assert gap <= 4 * torch.finfo(dtype).eps * logits.abs().max(), f"step {step}: {gap} below the best"
