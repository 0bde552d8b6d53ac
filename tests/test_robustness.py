"""A drafter's failure costs speed, never text; threads and hundreds of calls do not disturb each other."""

import gc
import threading

import pytest
import torch
from tiny import fresh, tiny

from csdraft import CascadeDrafter, Drafter, MaxGram, ModelDrafter
from csdraft.decoding.draft import Draft, Law
from csdraft.schedules.fixed import Fixed

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 3, 14, 15]])
WANTED = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target():
    return tiny("llama")


@pytest.fixture(scope="module")
def plain(target):
    return target.generate(PROMPT, **WANTED)


class Broken(Drafter):
    """Drafts well for two rounds, then does something wrong."""

    def __init__(self, wrong):
        self.wrong, self.rounds = wrong, 0

    def propose(self, contexts, budgets):
        self.rounds += 1
        if self.rounds > 2:
            return self.wrong(contexts, budgets)
        return [c.draft.extend([1, 2], c.call.level(self)) for c in contexts]

    def signature(self):
        return ("broken",)


def raising(contexts, budgets):
    raise KeyError("lost")


def outside(contexts, budgets):
    return [Draft.chain([10**6]) for _ in contexts]


def negative(contexts, budgets):
    return [Draft.chain([-1]) for _ in contexts]


def too_deep(contexts, budgets):
    return [Draft.chain([1] * (b.room + 1)) for b in budgets]


def too_few(contexts, budgets):
    return []


FAILURES = [raising, outside, negative, too_deep, too_few]


@pytest.mark.parametrize("wrong", FAILURES)
def test_a_failing_drafter_is_reported_and_left_out(target, plain, wrong):
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(
            PROMPT, assistant=Broken(wrong), schedule=Fixed(2), return_dict_in_generate=True, **WANTED
        )
    assert torch.equal(out.sequences, plain)
    assert sum(out.report.failures.values()) == 1


@pytest.mark.parametrize("wrong", FAILURES)
def test_strict_raises_instead(target, wrong):
    with pytest.raises((KeyError, ValueError)):
        target.generate(PROMPT, assistant=Broken(wrong), schedule=Fixed(2), strict=True, **WANTED)


def test_a_drafter_model_with_nan_logits_is_left_out(target, plain):
    sick = fresh("llama", seed=1)
    with torch.no_grad():
        sick.lm_head.weight.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="nan"):
        out = target.generate(
            PROMPT, assistant=ModelDrafter(sick), schedule=Fixed(3), return_dict_in_generate=True, **WANTED
        )
    assert torch.equal(out.sequences, plain)
    assert "nan" in next(iter(out.report.failures))


def test_a_target_with_nan_logits_is_an_error(target):
    sick = fresh("llama", seed=1)
    with torch.no_grad():
        sick.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="nan"):
        sick.generate(PROMPT, assistant=MaxGram(), **WANTED)


def test_two_threads_with_two_cascades(target, plain):
    small = fresh("llama", seed=2)
    texts, errors = {}, []

    def write(name):
        try:
            cascade = CascadeDrafter([small, MaxGram()], [[2, 4], [0, 3]])
            for _ in range(8):
                texts.setdefault(name, []).append(target.generate(PROMPT, assistant=cascade, **WANTED))
        except Exception as error:  # a thread's failure must reach the test
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(text, plain) for name in "ab" for text in texts[name])


def test_two_hundred_calls_leave_nothing_behind(target):
    """Neither Python objects nor tensors pile up, and every call's text is what a fresh cascade would write."""
    small = fresh("llama", seed=2)
    cascade = CascadeDrafter([small, MaxGram()], [[2, 4], [0, 3]])

    def live():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor)), len(gc.get_objects())

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (1, 5 + i % 7), generator=generator) for i in range(10)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = [target.generate(prompt, **settings) for prompt in prompts]
    for call in range(40):
        target.generate(prompts[call % 10], assistant=cascade, **settings)
    tensors, objects = live()
    for call in range(160):
        out = target.generate(prompts[call % 10], assistant=cascade, **settings)
        assert torch.equal(out, wanted[call % 10])
    after_tensors, after_objects = live()
    assert after_tensors <= tensors + 5
    assert after_objects <= objects * 1.02 + 500


MALFORMED = [
    Draft((1, 2), (-1,), (0, 0), (0.0, 0.0)),
    Draft((1.5,), (-1,), (0,), (0.0,)),  # type: ignore[arg-type]
    Draft((1,), (3,), (0,), (0.0,)),
]


@pytest.mark.parametrize("draft", MALFORMED)
def test_a_malformed_draft_is_left_out(target, plain, draft):
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(PROMPT, assistant=Broken(lambda c, b: [draft]), schedule=Fixed(2), **WANTED)
    assert torch.equal(out, plain)


def tree(contexts, budgets):
    """Two drawn tokens side by side."""
    law = torch.full((97,), 1 / 97)
    level = contexts[0].call.level("a tree")
    return [Draft((1, 2), (-1, -1), (level,) * 2, (0.1,) * 2, Law("iid", (law, law))) for _ in contexts]


def drawn(kind, width=97):
    """Two siblings of an unfamiliar law, or of one that is not the target's size."""
    law = torch.full((width,), 1 / width)

    def propose(contexts, budgets):
        level = contexts[0].call.level("drawn")
        return [Draft((1, 2), (-1, -1), (level,) * 2, (0.1,) * 2, Law(kind, (law, law))) for _ in contexts]

    return propose


UNFIT = [
    ("block", tree, "is a tree, Block judges chains"),
    ("without_replacement", drawn("iid"), "'iid', WithoutReplacement judges"),
    ("rejection", drawn("pair"), r"'pair', Rejection judges \['iid'\]"),
    ("rejection", drawn("iid", 96), r"shape \(96,\), the target's laws \(97,\)"),
]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("verifier", "wrong", "says"), UNFIT)
def test_a_draft_that_the_verifier_cannot_judge_is_left_out(target, verifier, wrong, says, sampled):
    """Known before the round, where it would be an exception: the text goes on, and has its full length."""
    options = WANTED | {"do_sample": sampled, "eos_token_id": None, "verifier": verifier, "schedule": Fixed(2)}
    with pytest.warns(RuntimeWarning, match=says):
        out = target.generate(PROMPT, assistant=Broken(wrong), **options, return_dict_in_generate=True)
    assert out.sequences.shape[1] == PROMPT.shape[1] + WANTED["max_new_tokens"]
    assert out.report.plain_rounds > 0
    with pytest.raises(ValueError, match=says):
        target.generate(PROMPT, assistant=Broken(wrong), **options, strict=True)


@pytest.mark.parametrize("wrong", [tree, drawn("pair")])
def test_match_judges_any_draft(target, plain, wrong):
    """Coupled draws read no law and know trees."""
    for sampled in (False, True):
        options = WANTED | {"do_sample": sampled, "schedule": Fixed(2), "strict": True}
        seeds = {"row_seeds": [3]} if sampled else {}
        out = target.generate(PROMPT, assistant=Broken(wrong), **options, **seeds)
        assert torch.equal(out, target.generate(PROMPT, assistant=MaxGram(), **options, **seeds))


class Unhelpful(MaxGram):
    """Fails whenever somebody other than the round asks it something."""

    def evidence(self, context):
        raise KeyError("no clue")

    def keep_report(self, report):
        raise KeyError("no report")


def test_a_drafter_that_fails_outside_the_round_loses_no_text(target, plain):
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(PROMPT, assistant=Unhelpful(), schedule="cost_model", **WANTED)
    assert torch.equal(out, plain)


def test_a_reviewer_with_learned_positions_stops_at_its_context():
    model, small = fresh("gpt2"), fresh("gpt2", n_positions=24)
    cascade = CascadeDrafter([small, MaxGram()], [[8, 4], [0, 8]], schedule="fixed")
    out = model.generate(PROMPT, assistant=cascade, strict=True, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(out, model.generate(PROMPT, max_new_tokens=40, do_sample=False, pad_token_id=0))
