"""The laws of the design, whole calls at a time: what is drafted, cached or batched never shows in the text."""

from __future__ import annotations

import copy
import importlib
import itertools
import pkgutil
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache

import csdraft
import csdraft.verifiers
from csdraft import Drafter, Horizontal, ModelDrafter, Vertical
from csdraft.decoding.cache_names import GENERATE_CACHE
from csdraft.decoding.chain import draft_chain
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Request, Verifier
from csdraft.decoding.scores import Scores
from csdraft.decoding.session import Session
from csdraft.drafters.max_gram import MaxGram
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.tiny import Scripted

FIXED = {"schedule": Fixed(), "strict": True}
GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLED = {"do_sample": True, "max_new_tokens": 12, "temperature": 0.8, "top_k": 30, "top_p": 0.95}


@dataclass(frozen=True, eq=False)
class Watched(Drafter):
    """Passes everything on, and remembers the call's sessions."""

    inner: Drafter
    sessions: list[Session] = field(default_factory=list)
    depth: int = 6  # type: ignore[assignment]

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        self.sessions[:] = contexts[0].call.sessions
        return self.inner.propose(contexts, budgets)

    def models(self) -> list[object]:
        return self.inner.models()

    def check(self, call) -> None:
        self.inner.check(call)


def forgetting(seed: int):
    """A hook for `Scripted`: some session of the call loses its cache, now and then."""
    rng = random.Random(seed)

    def hook(contexts: Sequence[Context]) -> None:
        for session in contexts[0].call.sessions:
            if rng.random() < 0.4:
                session.forget()

    return hook


def drafters(family: str, texts: Sequence[Sequence[int]] = (), before=None) -> dict[str, Drafter]:
    """One of every shape."""
    small, smaller = tiny.drafter_of(family), tiny.drafter_of(family, scale=0.2)
    oracle = Scripted(texts or [[]] * 9, wrong=0.4, before=before)
    return {
        "chain": oracle,
        "tree": Scripted(texts or [[]] * 9, wrong=0.4, branches=3, before=before),
        "model": ModelDrafter(small, depth=4),
        "vertical": Vertical(small, oracle, depth=6),
        "lenient": Vertical(small, ModelDrafter(smaller, depth=3), lenience=3.0, depth=6),
        "horizontal": Horizontal((Vertical(small, oracle), ModelDrafter(smaller), oracle), (3, 2, 2)),
        "nested": Vertical(small, Vertical(smaller, oracle, depth=3), depth=8),
    }


SHAPES = list(drafters("llama"))


# Law 2.


@pytest.mark.parametrize("shape", ["chain", "tree", "vertical", "nested", "horizontal"])
@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow), "t5"])
def test_dropping_any_cache_changes_nothing(family: str, shape: str) -> None:
    model, inputs = tiny.tiny(family), tiny.inputs_of(family, 3)
    wanted = model.generate(**inputs, **GREEDY)
    texts = tiny.continuations(wanted, inputs, family)
    watched = Watched(drafters(family, texts, forgetting(1))[shape])
    output = model.generate(**inputs, **GREEDY, assistant=watched, **FIXED)
    assert output.tolist() == wanted.tolist()
    assert watched.sessions[0].use.rolled_back > 60, "nothing was ever forgotten, so this proves little"


# Law 4.


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sampled_batch_is_its_rows(shape: str) -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 4)
    seeds = [11, 5, 11, 8]
    batch = model.generate(**inputs, **SAMPLED, row_seeds=seeds, assistant=drafters("llama")[shape], **FIXED)
    for row, text in enumerate(tiny.continuations(batch, inputs)):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
        alone = model.generate(ids, **SAMPLED, row_seeds=seeds[row : row + 1], assistant=Scripted([[]]), **FIXED)
        end = alone.shape[1]
        assert text[:end] == alone[0].tolist()
        assert set(text[end:]) <= {tiny.PAD}


# Law 5.


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_sees_a_token_once_unless_it_was_rolled_back(shape: str, forgets: bool) -> None:
    for family in ("llama", "t5"):
        model, inputs = tiny.tiny(family), tiny.inputs_of(family, 4)
        options = {**GREEDY, "max_new_tokens": 12}
        texts = tiny.continuations(model.generate(**inputs, **options), inputs, family)
        watched = Watched(drafters(family, texts, forgetting(2) if forgets else None)[shape])
        model.generate(**inputs, **options, assistant=watched, return_dict_in_generate=forgets, **FIXED)
        for session in watched.sessions:
            assert session.use.fed == session.kept + session.use.rolled_back - session.imported
            assert session.use.fed > 0


def test_a_right_draft_is_read_once() -> None:
    """Nothing is rolled back when nothing was wrong: the prompt and every token are read exactly once."""
    model, inputs = tiny.tiny("llama"), tiny.prompt()
    told = model.generate(**inputs, **GREEDY, eos_token_id=None)
    watched = Watched(Scripted(told.tolist(), wrong=0.0, depth=6))
    model.generate(**inputs, **GREEDY, eos_token_id=None, assistant=watched, reuse=False, **FIXED)
    target = watched.sessions[0]
    assert target.use.rolled_back == 0
    assert target.use.fed in (told.shape[1] - 1, told.shape[1])


def test_a_users_cache_is_in_the_accounts() -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 2)
    cache = DynamicCache()
    with torch.no_grad():
        short = {key: value[:, :-4] for key, value in inputs.items()}
        model(**short, **{GENERATE_CACHE: cache})
    watched = Watched(drafters("llama")["vertical"])
    model.generate(**inputs, **GREEDY, **{GENERATE_CACHE: cache}, assistant=watched, **FIXED)
    target, *others = watched.sessions
    assert target.imported == int(short["attention_mask"].sum())
    assert all(session.imported == 0 for session in others)
    for session in watched.sessions:
        assert session.use.fed == session.kept + session.use.rolled_back - session.imported


# Match: the text does not depend on the drafter.


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_sampled_text_is_the_same_with_any_drafter_and_with_none(family: str) -> None:
    model, inputs = tiny.tiny(family), tiny.inputs_of(family, 3)
    options = {**SAMPLED, "row_seeds": [3, 1, 4]}
    alone = model.generate(**inputs, **options, custom_generate=csdraft.decode)
    assert len({tuple(row) for row in alone.tolist()}) == 3
    texts = tiny.continuations(alone, inputs, family)
    for shape, drafter in drafters(family, texts).items():
        output = model.generate(**inputs, **options, assistant=drafter, return_dict_in_generate=True, **FIXED)
        assert output.sequences.tolist() == alone.tolist(), shape
        assert output.report.target.accepted.total() > 0, shape


def test_text_reading_processors_leave_it_so() -> None:
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 3)
    options = {**SAMPLED, "row_seeds": [3, 1, 4], "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    alone = model.generate(**inputs, **options, custom_generate=csdraft.decode)
    for shape, drafter in drafters("llama", tiny.continuations(alone, inputs)).items():
        assert model.generate(**inputs, **options, assistant=drafter, **FIXED).tolist() == alone.tolist(), shape


# Distributions, end to end. A vocabulary of 6, three tokens: 216 texts whose probabilities are enumerated.

SMALL, LENGTH = 6, 3
DRAWS = pytest.mark.parametrize("draws", [600, pytest.param(1500, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def coin():
    """A target with a small vocabulary, its drafter, a prompt, and the exact distribution of its texts."""
    options = {"vocab_size": SMALL, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    model = tiny.fresh("llama", **options)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    ids = torch.tensor([[1, 2, 5, 3]])
    texts = torch.tensor(list(itertools.product(range(SMALL), repeat=LENGTH)))
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(len(texts), -1), texts], 1)).logits[:, -LENGTH - 1 : -1]
    distribution = (logits / 0.9).log_softmax(-1).gather(2, texts[..., None]).sum((1, 2)).exp()
    return (
        model,
        tiny.noisy(model, 0.4),
        ids,
        {tuple(t): p for t, p in zip(texts.tolist(), distribution.tolist(), strict=True)},
    )


def fits(texts: torch.Tensor, distribution: dict[tuple[int, ...], float]) -> float:
    """p-value of drawn texts under the distribution, rare ones pooled."""
    seen = Counter(map(tuple, texts[:, -LENGTH:].tolist()))
    observed, expected, rest, rare = [], [], 0, 0.0
    for text, probability in distribution.items():
        if probability * len(texts) < 5:
            rest, rare = rest + seen[text], rare + probability * len(texts)
        else:
            observed.append(seen[text])
            expected.append(probability * len(texts))
    if rare > 0:
        observed, expected = [*observed, rest], [*expected, rare]
    scale = len(texts) / sum(expected)
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


def lossless_verifiers() -> list[type[Verifier]]:
    """Every verifier in the folder that says so."""
    found = []
    for module in pkgutil.iter_modules(csdraft.verifiers.__path__):
        for name in (loaded := importlib.import_module(f"csdraft.verifiers.{module.name}")).__all__:
            kind = getattr(loaded, name)
            if isinstance(kind, type) and issubclass(kind, Verifier) and kind().lossless:
                found.append(kind)
    return found


DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 0, "max_new_tokens": LENGTH}


@DRAWS
def test_the_enumerated_distribution_is_plain_generates(coin, draws: int) -> None:
    model, _, ids, distribution = coin
    options = {**DRAWN, "num_return_sequences": draws}
    assert fits(model.generate(ids, **options), distribution) > 1e-3
    other = 1.1 if draws > 1000 else 1.3  # each verifier is tested exactly, too, by enumeration in tests/verifiers
    assert fits(model.generate(ids, **options | {"temperature": other}), distribution) < 1e-6, "the test has no power"


SHAPES_DRAWN = ["model", "point masses", "tree", "vertical"]


def drawn_cases() -> list:
    """(draws, verifier, shape of the draft): every verifier with one shape, every shape with a verifier; all if slow.

    Each verifier is also tested exactly, by enumeration, with many more shapes in tests/verifiers.
    """
    found = []
    for number, verifier in enumerate(lossless_verifiers()):
        own = SHAPES_DRAWN if not verifier.chains_only else [shape for shape in SHAPES_DRAWN if shape != "tree"]
        for shape in SHAPES_DRAWN:
            name = f"{verifier.__name__}-{shape}"
            if shape == own[number % len(own)] or shape not in own:
                found.append(pytest.param(600, verifier, shape, id=f"600-{name}"))
            found.append(pytest.param(1500, verifier, shape, id=f"1500-{name}", marks=pytest.mark.slow))
    return found


def test_every_shape_is_drawn_from() -> None:
    fast = [case.values for case in drawn_cases() if not case.marks]
    assert {shape for _, verifier, shape in fast if shape != "tree" or not verifier.chains_only} == {*SHAPES_DRAWN}
    assert {verifier for _, verifier, shape in fast if shape != "tree" or not verifier.chains_only} == {
        *lossless_verifiers()
    }


@pytest.mark.parametrize(("draws", "verifier", "shape"), drawn_cases())
def test_the_distribution_is_the_targets(coin, draws: int, verifier: type[Verifier], shape: str) -> None:
    model, small, ids, distribution = coin
    likely = max(distribution, key=distribution.get)
    guess = [[*ids[0].tolist(), *likely]] * draws
    drafter = {
        "model": ModelDrafter(small, depth=2),
        "point masses": Scripted(guess, vocabulary=range(SMALL), wrong=0.2, depth=2),
        "tree": Scripted(guess, vocabulary=range(SMALL), wrong=0.2, branches=2, depth=2),
        "vertical": Vertical(small, Scripted(guess, vocabulary=range(SMALL), wrong=0.2, depth=1), depth=2),
    }[shape]
    if shape == "tree" and verifier.chains_only is True:
        with pytest.raises(ValueError, match="tree"):
            model.generate(ids, do_sample=True, max_new_tokens=3, assistant=drafter, verifier=verifier(), **FIXED)
        return
    options = {**DRAWN, "num_return_sequences": draws, "assistant": drafter, "verifier": verifier(), **FIXED}
    output = model.generate(ids, **options, return_dict_in_generate=True)
    assert fits(output.sequences, distribution) > 1e-3
    assert 0.2 < output.report.acceptance_rate < 0.99


# A chain is so many steps.


@dataclass(frozen=True, eq=False)
class Compared(Drafter):
    """Drafts by `draft_chain`, and holds that against `score` and `choice` on a second session of the same weights."""

    model: torch.nn.Module
    twin: torch.nn.Module
    rounds: list[int] = field(default_factory=list)

    def models(self) -> list[object]:
        return [self.model]

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        call = contexts[0].call
        steps = [min(b.room, 1 + (c.row + len(c.text)) % 4) for c, b in zip(contexts, budgets, strict=True)]
        rolled = draft_chain(call.session(self.model), contexts, steps, confidence=True)
        for context, wanted, drawn in zip(contexts, steps, rolled, strict=True):
            draft = context.draft
            for i in range(wanted):
                scores = call.session(self.twin).score([Request(context.row, context.text, draft, (draft.tip,))])[0]
                token = scores.choice(draft.tip)
                assert drawn.tokens[i] == token
                assert drawn.confidence[i] == pytest.approx(scores.soft(draft.tip, token), abs=1e-5)
                draft = draft.extend((token,), 1)
                if token in call.chooser.stopping.eos:
                    break
            assert len(drawn.tokens) == len(draft) - len(context.draft)
            self.rounds.append(len(drawn.tokens))
        level = call.level(self)
        return [c.draft.extend(r.tokens, level) for c, r in zip(contexts, rolled, strict=True)]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.4}, SAMPLED])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_roll_is_so_many_steps(family: str, options: dict) -> None:
    small = tiny.drafter_of(family)
    compared = Compared(small, copy.deepcopy(small))
    options = {"max_new_tokens": 14, **options, "row_seeds": [1, 2, 3], "assistant": compared, **FIXED}
    tiny.tiny(family).generate(**tiny.inputs_of(family, 3), **options)
    assert sum(compared.rounds) > 20


@dataclass(frozen=True, eq=False)
class Unwatched(Drafter):
    """Drafts as on an accelerator: no token is seen before the last is drawn."""

    model: torch.nn.Module

    def models(self) -> list[object]:
        return [self.model]

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        session = contexts[0].call.session(self.model)
        steps = [min(b.room, 2 + c.row) for c, b in zip(contexts, budgets, strict=True)]
        session.reader.on_host = False
        rolled = draft_chain(session, contexts, steps)
        level = contexts[0].call.level(self)
        return [c.draft.extend(r.tokens, level) for c, r in zip(contexts, rolled, strict=True)]


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED])
@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_roll_on_the_device_equals_one_on_the_host(family: str, options: dict) -> None:
    inputs, model = tiny.inputs_of(family, 3), tiny.tiny(family)
    small = tiny.drafter_of(family)
    options = {"max_new_tokens": 16, **options, "row_seeds": [1, 2, 3], "return_dict_in_generate": True, **FIXED}
    seen = model.generate(**inputs, assistant=ModelDrafter(small), **options)
    unseen = model.generate(**inputs, assistant=Unwatched(small), **options)
    assert torch.equal(seen.sequences, unseen.sequences)
    rates = [output.report.acceptance_rate for output in (seen, unseen)]
    assert rates[1] > 0
    assert abs(rates[0] - rates[1]) < 0.35  # the same tokens, in drafts of other lengths


def test_what_was_scored_is_gone_before_the_next_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a wide tree are large: two rounds' worth would double their memory, and cost time in every round."""
    model, inputs = tiny.tiny("llama"), tiny.inputs_of("llama", 2)
    alive: list[weakref.ref] = []
    forward = Session.read

    def watched(session: Session, *args, **kwargs):
        if session.model is model:
            assert not [scores for scores in alive if scores() is not None]
        return forward(session, *args, **kwargs)

    class Remembered(Scores):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(Session, "read", watched)
    monkeypatch.setattr("csdraft.decoding.session.Scores", Remembered)
    for drafter in (MaxGram(), ModelDrafter(tiny.drafter_of("llama"), tree=BestFirst())):
        alive.clear()
        model.generate(**inputs, **GREEDY, assistant=drafter, **FIXED)
        assert len(alive) > 10
