"""A drafter's failure costs speed, never text; threads and hundreds of calls do not disturb each other."""

import gc
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import csdraft
from csdraft import CascadeDrafter, Drafter, MaxGram, ModelDrafter, Vertical
from csdraft.decoding.draft import Draft, DraftProbs
from csdraft.schedules.fixed import Fixed
from tests.tiny import fresh, tiny

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


def longer(contexts, budgets):
    for context in contexts:
        path = context.text.tokens  # not a copy
        path += [1, 2]
    return [c.draft for c in contexts]


def shorter(contexts, budgets):
    contexts[0].text.tokens.pop()
    return [c.draft for c in contexts]


def other(contexts, budgets):
    contexts[0].text.tokens[-2:] = [3, 3]
    raise KeyError("lost")


FAILURES = [raising, outside, negative, too_deep, too_few, longer, shorter, other]


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


@pytest.mark.slow
def test_two_hundred_calls_leave_nothing_behind(target):
    """Neither Python objects nor tensors pile up, and every call's text is what a fresh cascade would write."""
    small = fresh("llama", seed=2)
    cascade = CascadeDrafter([small, MaxGram()], [[2, 4], [0, 3]])

    def live():
        csdraft.release()
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
    Draft((1, 2), (-1, -0.5), (0, 0), (0.0, 0.0)),  # type: ignore[arg-type]
    Draft((1,), (-1,), (0.5,), (0.0,)),  # type: ignore[arg-type]
    Draft([1], (-1,), (0,), (0.0,)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("draft", MALFORMED)
def test_a_malformed_draft_is_left_out(target, plain, draft):
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(PROMPT, assistant=Broken(lambda c, b: [draft]), schedule=Fixed(2), **WANTED)
    assert torch.equal(out, plain)


def tree(contexts, budgets):
    """Two drawn tokens side by side."""
    distribution = torch.full((97,), 1 / 97)
    level = contexts[0].call.level("a tree")
    return [
        Draft((1, 2), (-1, -1), (level,) * 2, (0.1,) * 2, DraftProbs("iid", (distribution, distribution)))
        for _ in contexts
    ]


def drawn(kind, width=97):
    """Two siblings of an unfamiliar distribution, or of one that is not the target's size."""
    distribution = torch.full((width,), 1 / width)

    def propose(contexts, budgets):
        level = contexts[0].call.level("drawn")
        return [
            Draft((1, 2), (-1, -1), (level,) * 2, (0.1,) * 2, DraftProbs(kind, (distribution, distribution)))
            for _ in contexts
        ]

    return propose


UNFIT = [
    ("block", tree, "is a tree, but Block verifies only chains"),
    ("without_replacement", drawn("iid"), "'iid', but WithoutReplacement verifies"),
    ("rejection", drawn("pair"), r"'pair', but Rejection verifies only \['iid'\]"),
    ("rejection", drawn("iid", 96), r"shape \(96,\), the target's distributions \(97,\)"),
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
    """Coupled draws read no distribution and know trees."""
    for sampled in (False, True):
        options = WANTED | {"do_sample": sampled, "schedule": Fixed(2), "strict": True}
        seeds = {"row_seeds": [3]} if sampled else {}
        out = target.generate(PROMPT, assistant=Broken(wrong), **options, **seeds)
        assert torch.equal(out, target.generate(PROMPT, assistant=MaxGram(), **options, **seeds))


METHODS = {
    "propose": ("fixed", "cost_model"),
    "observe": ("fixed", "cost_model"),
    "models": ("cost_model", "bandit"),
    "stages": ("cost_model", "bandit"),
    "width": ("cost_model",),
    "evidence": ("cost_model",),
    "parts": ("fixed", "cost_model"),
    "check": ("fixed", "cost_model"),
    "depth": ("fixed", "heuristic"),
}
"""What a call asks a drafter, and schedules under which it does."""


class Plain(Drafter):
    """Drafts something, and has options in no dataclass."""

    def propose(self, contexts, budgets):
        return [c.draft.extend([1] * b.depth, c.call.level(self)) for c, b in zip(contexts, budgets, strict=True)]

    def check(self, call):
        self.parts()


def failing(method: str, error: Exception) -> Drafter:
    """A drafter that raises whenever it is asked for one thing."""

    def fail(*_):
        raise error

    return type("Failing", (Plain,), {method: property(fail) if method == "depth" else fail})()


ASKED = [
    (method, schedule, nested)
    for method, schedules in METHODS.items()
    for schedule in schedules
    for nested in ((False,) if method in ("depth", "stages") else (False, True))  # of these a cascade has its own
]


@pytest.mark.parametrize(("method", "schedule", "nested"), ASKED)
def test_a_drafter_that_fails_whatever_it_is_asked(target, plain, method, schedule, nested):
    """The text is what it is without, there is one warning, the report counts it; strict raises."""
    assistant = failing(method, KeyError("lost"))
    if nested:
        assistant = CascadeDrafter([assistant, MaxGram()], [3, 3])
    options = WANTED | {"assistant": assistant, "schedule": schedule, "return_dict_in_generate": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = target.generate(PROMPT, **options)
    assert torch.equal(out.sequences, plain)
    said = [w for w in caught if w.category is RuntimeWarning and "left out" in str(w.message)]
    assert len(said) == 1
    assert out.report.failures == {"KeyError: 'lost'": 1}
    with pytest.raises(KeyError, match="lost"):
        target.generate(PROMPT, **options, strict=True)


def test_an_encoder_decoders_drafter_is_asked_for_its_models():
    """Before there is a call, if what the encoder read is not known."""
    t5 = tiny("t5")
    options = {"encoder_outputs": t5.get_encoder()(PROMPT), "attention_mask": torch.ones_like(PROMPT)}
    wanted = t5.generate(**options, max_new_tokens=8)
    with pytest.warns(RuntimeWarning, match="left out"):
        out = t5.generate(**options, assistant=failing("models", KeyError("lost")), schedule="fixed", max_new_tokens=8)
    assert torch.equal(out, wanted)


def test_a_users_mistake_is_no_failure(target):
    """What `check` says on purpose reaches the user."""
    with pytest.raises(ValueError, match="wrong tokenizer"):
        target.generate(PROMPT, assistant=failing("check", ValueError("wrong tokenizer")), **WANTED)


def test_a_drafter_that_fails_while_a_plan_is_made(target, plain, monkeypatch):
    monkeypatch.setattr("csdraft.planner.search.TOKENS", 4)
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(
            PROMPT, assistant=CascadeDrafter([failing("propose", KeyError("lost"))], "auto"), **WANTED
        )
    assert torch.equal(out, plain)


def test_the_report_of_a_cascade_is_kept_though_a_part_of_it_fails(target):
    cascade = CascadeDrafter([failing("propose", KeyError("lost"))])
    with pytest.warns(RuntimeWarning, match="left out"):
        target.generate(PROMPT, assistant=cascade, **WANTED)
    assert (cascade.report.calls, cascade.report.failures) == (1, {"KeyError: 'lost'": 1})


EVEN = torch.full((97,), 1 / 97)
NO_PROBS = {
    "nan": EVEN * float("nan"),
    "infinite": EVEN * float("inf"),
    "negative": torch.cat([EVEN[:1] * -1, EVEN[1:] + 2 / 97 / 96]),
    "zero": EVEN * 0,
    "half": EVEN / 2,
    "logits": torch.linspace(-3, 3, 97),
    "whole": torch.ones(97, dtype=torch.long),
    "short": EVEN[:96],
    "other type": [1 / 97] * 97,
}


@dataclass(frozen=True)
class WithoutProbs(Drafter):
    """Says that its tokens were drawn from what is no distribution."""

    probs: Any
    depth: int = 2  # type: ignore[assignment]

    def propose(self, contexts, budgets):
        return [
            c.draft.extend([5, 6][: b.depth], c.call.level("without_probs"), None, [self.probs] * min(b.depth, 2))
            for c, b in zip(contexts, budgets, strict=True)
        ]


@pytest.mark.parametrize("inner", [False, True], ids=["at the target", "at an inner reviewer"])
@pytest.mark.parametrize("what", NO_PROBS)
def test_what_is_no_distribution_costs_the_drafter(target, what, inner):
    """Also below an inner reviewer, whose own tokens would else not be what it says."""
    drafter = WithoutProbs(NO_PROBS[what])
    if inner:
        drafter = Vertical(fresh("llama", seed=2), drafter, depth=3)
    options = {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0, "row_seeds": [3], "eos_token_id": None}
    options |= {"verifier": "rejection", "schedule": Fixed(3), "assistant": drafter}
    with pytest.warns(RuntimeWarning, match="left out"):
        out = target.generate(PROMPT, **options, return_dict_in_generate=True)
    assert out.sequences.shape[1] == PROMPT.shape[1] + 12
    assert out.report.block_efficiency == 1
    with pytest.raises(ValueError, match=r"distribution|distribution"):
        target.generate(PROMPT, **options, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distributions_in_half_precision_are_distributions(dtype):
    for seed in range(20):
        logits = 4 * torch.randn(32_000, generator=torch.Generator().manual_seed(seed))
        assert DraftProbs("iid", (logits.softmax(-1).to(dtype),)).flaw(32_000) is None


def test_a_drafters_distributions_are_not_read_where_no_rule_reads_them(target, plain):
    """Coupled and greedy draws."""
    out = target.generate(PROMPT, assistant=WithoutProbs(NO_PROBS["nan"]), schedule=Fixed(2), strict=True, **WANTED)
    assert torch.equal(out, plain)


def sure(confidence):
    def propose(contexts, budgets):
        level, size = contexts[0].call.level("sure"), min(budgets[0].depth, 2)
        return [Draft((5, 6)[:size], (-1, 0)[:size], (level,) * size, (confidence,) * size) for _ in contexts]

    return propose


@pytest.mark.parametrize("confidence", [float("nan"), -1.0, 2.0, float("inf"), None, "x"])
def test_confidence_that_is_no_probability(target, confidence):
    """nan is a point mass, which nobody vouches for; all else costs the drafter."""
    options = WANTED | {"verifier": {"type": "lenient", "lenience": 3.0}, "schedule": Fixed(2)}
    drafter = Broken(sure(confidence))
    if confidence is not None and confidence != "x" and confidence != confidence:
        assert target.generate(PROMPT, assistant=drafter, strict=True, **options).shape[1] > PROMPT.shape[1]
        return
    with pytest.warns(RuntimeWarning, match="confidence .* must be a probability"):
        out = target.generate(PROMPT, assistant=drafter, return_dict_in_generate=True, **options)
    assert out.sequences.shape[1] == PROMPT.shape[1] + WANTED["max_new_tokens"]


def test_a_pair_without_the_likeliest_token(target):
    distribution = torch.full((97,), 0.5 / 96).index_fill(0, torch.tensor([7]), 0.5)
    pair = lambda c, b: [  # noqa: E731
        Draft(
            (1, 2),
            (-1, -1),
            (c[0].call.level("pair"),) * 2,
            (0.1,) * 2,
            DraftProbs("pair", (distribution, distribution)),
        )
        for _ in c
    ]
    options = WANTED | {"do_sample": True, "verifier": "spec_hub", "schedule": Fixed(2), "eos_token_id": None}
    with pytest.warns(RuntimeWarning, match="must hold the likeliest token 7 once"):
        out = target.generate(PROMPT, assistant=Broken(pair), **options)
    assert out.shape[1] == PROMPT.shape[1] + WANTED["max_new_tokens"]


def test_a_reviewer_with_learned_positions_stops_at_its_context():
    model, small = fresh("gpt2"), fresh("gpt2", max_position_embeddings=24)
    cascade = CascadeDrafter([small, MaxGram()], [[8, 4], [0, 8]], schedule="fixed")
    out = model.generate(PROMPT, assistant=cascade, strict=True, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(out, model.generate(PROMPT, max_new_tokens=40, do_sample=False, pad_token_id=0))
