"""The K matrix: what is refused, what is built from it, and the worked example of the design, token by token."""

from __future__ import annotations

import pickle
import threading
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import csdraft
from csdraft import Options
from csdraft.cascade import as_drafter, options_of
from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter, Request
from csdraft.decoding.processing import Processing
from csdraft.decoding.reported import keep
from csdraft.decoding.rounds import run_round
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.kmatrix import check_k_matrix, spread_lenience
from csdraft.schedules.cost_model import CostModel
from csdraft.schedules.fixed import Fixed
from csdraft.verifiers.match import Match
from tests.tiny import VOCAB, drafter_of, noisy, prompt, tiny

K = [[5, 8, 10], [0, 1, 10], [0, 0, 10]]


class Stub(nn.Module):
    """A model that is never run."""

    def __init__(self, name: str):
        super().__init__()
        self.config = LlamaConfig(vocab_size=VOCAB)
        self.config._name_or_path = name


@dataclass(frozen=True, eq=False)
class Copier(Drafter):
    """Stands in for MaxGram: drafts as many tokens as its script says, at most those wanted."""

    found: tuple[int | None, ...] = ()
    budgets: list[Budget] = field(default_factory=list)

    def propose(self, contexts, budgets):
        (context,), (budget,) = contexts, budgets
        turn = len(self.budgets)
        self.budgets.append(budget)
        found = self.found[turn] if turn < len(self.found) else None
        count = budget.depth if found is None else min(found, budget.depth)
        return [context.draft.extend(range(3, 3 + count), context.call.level(self))]


@dataclass
class ScriptedScores:
    """Agrees with the first `agrees` new tokens, and then wants token 50."""

    request: Request
    agrees: int
    row: int = 0

    def choice(self, node: int) -> int:
        start = self.request.after[0]
        follows = node + 1
        if follows < len(self.request.draft) and node - start < self.agrees:
            return self.request.draft.tokens[follows]
        return 50

    def position(self, node: int) -> int:
        return node

    def soft(self, node: int, token: int) -> float:
        return 0.0

    def ends(self, node: int, token: int) -> bool:
        return False


class ScriptedSession:
    """A reviewer that runs no model: how many tokens each of its forwards accepts is written down."""

    def __init__(self, chooser: TokenChooser, *agrees: int):
        self.chooser, self.agrees, self.positions = chooser, agrees, 1 << 30
        self.rows: list[int] = []

    def left(self, context):
        return self.positions - len(context.text) - len(context.path)

    def score(self, requests, chooser=None):
        (request,) = requests
        agrees = self.agrees[len(self.rows)]
        self.rows.append(len(request.after))
        return [ScriptedScores(request, agrees)]


class ScriptedCall(Call):
    """A call whose sessions are scripted."""

    def __init__(self, target: nn.Module):
        self.chooser_of_all = TokenChooser(Processing([], 1), Stopping([]), Sampler(True, [0], VOCAB, "coupled"))
        super().__init__(target, self.chooser_of_all, [Text(torch.arange(3, 13))], 256, None)
        self.scripted: dict[int, ScriptedSession] = {}

    def script(self, model: nn.Module, *agrees: int) -> ScriptedSession:
        return self.scripted.setdefault(id(model), ScriptedSession(self.chooser_of_all, *agrees))

    def session(self, model):
        return self.scripted[id(model)]


@pytest.fixture
def example():
    """The cascade of the design's worked example, its copier, and a call."""
    medium, small, copier = Stub("medium"), Stub("small"), Copier((10, 7, 6, 9))
    cascade = csdraft.CascadeDrafter([medium, small, copier], K)
    return cascade, copier, ScriptedCall(Stub("target"))


def test_the_worked_example_comes_out_token_by_token(example):
    """1 forward of the target, 1 of medium, 2 of small, 23 drafted tokens, 24 rows scored."""
    cascade, copier, call = example
    target = call.script(call.target, 0)
    medium = call.script(cascade.drafters[0].network, 6)
    small = call.script(cascade.drafters[1].network, 3, 6)
    (budget,) = Fixed().budgets([None], [1000], cascade)
    assert (budget.depth, budget.room) == (23, 23)
    (done,) = run_round([Context(0, call.texts[0], call)], target, cascade, Match(), [budget])
    # (asked of MaxGram, most it may hand up): row 2 for small, row 1's tail, row 2 again, row 0's tail.
    assert [(b.depth, b.room) for b in copier.budgets] == [(10, 10), (7, 7), (10, 10), (9, 9)]
    assert small.rows == [11, 7]  # 10 and 6 of MaxGram's tokens, and the text itself
    assert medium.rows == [12]
    assert target.rows == [24]
    assert done.drafted == 23
    # Medium's 6 + 1 (of which small's 4 and MaxGram's next 2 kept their levels), small's 7, MaxGram's 9.
    levels = [call.level(cascade.drafters[i].network) for i in (0, 1)] + [call.level(copier)]
    medium_level, small_level, copier_level = levels
    kept_of_first = [copier_level] * 3 + [small_level] + [copier_level] * 2 + [medium_level]
    assert list(done.draft.levels) == kept_of_first + [copier_level] * 6 + [small_level] + [copier_level] * 9


def test_only_the_outermost_cascade_charges_its_stages(example):
    """The copier also works inside medium's and small's rows, whose time is theirs: it is charged for its tail."""
    cascade, _, call = example
    call.script(cascade.drafters[0].network, 6)
    call.script(cascade.drafters[1].network, 3, 6)
    cascade.propose([Context(0, call.texts[0], call)], [Budget(23, 23)])
    medium, small, tail = (call.ledger.stage(drafter) for drafter, _ in cascade.stages())
    assert (medium[1], small[1], tail[1]) == (7, 7, 9)
    assert len(call.ledger.stages) == 3
    assert medium[0] > 0


def test_a_stage_is_charged_what_the_device_took(example, monkeypatch):
    """A GPU model returns at once, and the next reader of its tokens waits: only the device knows whose time it is."""
    cascade, copier, call = example
    call.script(cascade.drafters[0].network, 6)
    call.script(cascade.drafters[1].network, 3, 6)
    decided = []

    class Mark:
        """Reached when the device has done 5 seconds for each forward and 1 for each copy that came before."""

        def __init__(self):
            forwards = sum(len(session.rows) for session in call.scripted.values())
            self.reached = 5 * forwards + len(copier.budgets)

        def since(self, earlier):
            assert decided, "asked before the device was there"
            return self.reached - earlier.reached

    monkeypatch.setattr(call.ledger, "mark", Mark)
    cascade.propose([Context(0, call.texts[0], call)], [Budget(23, 23)])
    decided.append(True)
    assert [call.ledger.stage(drafter)[0] for drafter, _ in cascade.stages()] == [5 + 5 + 1 + 1, 5 + 1, 1]


def test_room_of_row_0_with_12_tokens_left(example):
    """The target adds one itself, so that 11 may be drafted; inside, each reviewer's room is one less."""
    cascade, copier, call = example
    target = call.script(call.target, 0)
    medium = call.script(cascade.drafters[0].network, 6)
    small = call.script(cascade.drafters[1].network, 3, 3)
    (budget,) = Fixed().budgets([None], [12 - 1], cascade)
    assert (budget.depth, budget.room) == (11, 11)
    (done,) = run_round([Context(0, call.texts[0], call)], target, cascade, Match(), [budget])
    # Medium may hand up 11, so its row 10 and small's 9. It hands up 7; of the 4 left, small's row may fill 3.
    assert [(b.depth, b.room) for b in copier.budgets] == [(9, 9), (6, 6), (3, 3)]
    assert (medium.rows, small.rows, target.rows) == ([11], [10, 4], [12])
    assert done.drafted == 11
    assert call.ledger.cut == 12 + 1 + 1 + 7  # rows 0, 1 and 2 twice


def test_a_row_never_hands_up_more_than_its_limit():
    """Small's second round could overshoot C(1, 2) = 12: medium reads 1 + 12, whatever room it has itself."""
    medium, small, copier = Stub("medium"), Stub("small"), Copier()
    cascade = csdraft.CascadeDrafter([medium, small, copier], [[20, 0, 0], [0, 9, 3], [0, 0, 10]])
    call = ScriptedCall(Stub("target"))
    call.script(small, 3, 10, 10)
    session = call.script(medium, 12, 12)
    (draft,) = cascade.propose([Context(0, call.texts[0], call)], [Budget(20, 50)])
    assert session.rows == [13, 7]  # of 20, 13 are there; 7 are left, medium adds one of them
    assert len(draft) == 20


def shape(drafter: Drafter):
    """A nest of drafters as lists: (lengths, stages), reviewers by name."""
    if isinstance(drafter, csdraft.Horizontal):
        return list(drafter.lengths), [shape(stage) for stage in drafter.drafters]
    if isinstance(drafter, csdraft.Vertical):
        return drafter.reviewer.config._name_or_path, drafter.lenience, shape(drafter.drafter)
    return drafter.model.config._name_or_path if isinstance(drafter, csdraft.ModelDrafter) else "copier"


def test_a_k_matrix_becomes_nested_drafters():
    medium, small, copier = Stub("medium"), Stub("small"), Copier()
    cascade = csdraft.CascadeDrafter([medium, small, copier], K, lenience=[2, 3])
    small_reviews = ("small", 3.0, ([10], ["copier"]))
    medium_reviews = ("medium", 2.0, ([1, 10], [small_reviews, "copier"]))
    assert shape(cascade.root) == ([5, 8, 10], [medium_reviews, small_reviews, "copier"])
    assert cascade.depth == 23
    assert [limit for _, limit in cascade.stages()] == [5, 13, 23]
    assert cascade.models() == [medium, small]
    assert repr(cascade).startswith("CascadeDrafter([medium, small, Copier()], [[5, 8, 10], [0, 1, 10], [0, 0, 10]]")


@pytest.mark.parametrize(
    ("k_matrix", "full"),
    [
        (4, [[4, 4], [0, 0]]),
        ([4, 6], [[4, 6], [0, 0]]),
        (([4, 6], (0, 2)), [[4, 6], [0, 2]]),
        (np.array([[4, 6], [0, 2]]), [[4, 6], [0, 2]]),
        (torch.tensor([4, 6]), [[4, 6], [0, 0]]),
    ],
)
def test_forms_of_the_k_matrix(k_matrix, full):
    drafters = [csdraft.ModelDrafter(Stub("small")), Copier()]
    assert check_k_matrix(k_matrix, drafters) == tuple(map(tuple, full))


def test_an_all_zero_row_is_token_by_token():
    cascade = csdraft.CascadeDrafter([Stub("small"), Copier()], [3, 6])
    assert shape(cascade.root) == ([3, 6], ["small", "copier"])


@pytest.mark.parametrize(
    ("k_matrix", "message"),
    [
        ("best", r"'best' is not a matrix: give 'auto', or numbers"),
        ([[1, 2], [3, 4]], r"k_matrix\[1\]\[0\]=3.*0 below the diagonal"),
        ([[1, -2], [0, 4]], r"k_matrix\[0\]\[1\]=-2"),
        ([[1, 2.5], [0, 4]], r"k_matrix\[0\]\[1\]=2.5.*whole numbers"),
        ([[1, True], [0, 4]], r"k_matrix\[0\]\[1\]=True"),
        ([1, 2, 3], r"does not fit 2 drafters: give 2 rows of 2"),
        ([[1, 2]], r"does not fit 2 drafters"),
        ([[1, 2], 3], r"does not fit 2 drafters"),
        (None, r"does not fit 2 drafters"),
        ([0, 0], r"drafts nothing"),
    ],
)
def test_a_wrong_k_matrix_is_refused(k_matrix, message):
    with pytest.raises(ValueError, match=message):
        csdraft.CascadeDrafter([Stub("small"), Copier()], k_matrix)


def test_a_wrong_list_of_drafters_is_refused():
    with pytest.raises(ValueError, match="at least one drafter"):
        csdraft.CascadeDrafter([])
    with pytest.raises(ValueError, match=r"; give a list, largest first"):
        csdraft.CascadeDrafter(Stub("small"))
    with pytest.raises(ValueError, match=r"drafters\[0\] reviews, but a Copier reviews nothing"):
        csdraft.CascadeDrafter([Copier(), Stub("small")], [[1, 2], [0, 2]])
    with pytest.raises(ValueError, match=r"a float; pass a csdraft\.Drafter"):
        csdraft.CascadeDrafter([0.5])
    with pytest.raises(ValueError, match="did you mean 'rejection'"):
        csdraft.CascadeDrafter([Copier()], verifier="rejektion")
    with pytest.raises(ValueError, match="did you mean 'cost_model'"):
        csdraft.CascadeDrafter([Copier()], schedule="costmodel")
    with pytest.raises(ValueError, match="verifier=3 is an int"):
        csdraft.CascadeDrafter([Copier()], verifier=3)


def test_a_statistical_drafter_need_not_be_last():
    cascade = csdraft.CascadeDrafter([Copier(), Stub("small"), Copier()], [[2, 3, 4], [0, 0, 0], [0, 0, 5]])
    assert shape(cascade.root) == ([2, 3, 4], ["copier", ("small", 1.0, ([5], ["copier"])), "copier"])


@pytest.mark.parametrize(("lenience", "spread"), [(3, [3, 3, 1]), ([2, 5], [2, 5, 1]), (1.0, [1, 1, 1])])
def test_lenience_is_for_those_who_review(lenience, spread):
    drafters = [csdraft.ModelDrafter(Stub("medium")), csdraft.ModelDrafter(Stub("small")), Copier()]
    assert spread_lenience(lenience, drafters, K) == spread


def test_a_list_of_leniences_counts_reviewers_only():
    """Small's row is zero: it drafts token by token and reviews nothing."""
    drafters = [csdraft.ModelDrafter(Stub("medium")), csdraft.ModelDrafter(Stub("small")), Copier()]
    reviews = [[5, 8, 10], [0, 1, 10], [0, 0, 0]]
    assert spread_lenience([2], drafters, reviews) == [2, 1, 1]
    with pytest.raises(ValueError, match=r"has 2 numbers for the 1 drafters that review"):
        spread_lenience([2, 3], drafters, reviews)


@pytest.mark.parametrize("lenience", [0.5, [2, 0.9], float("nan")])
def test_lenience_below_1_is_refused(lenience):
    with pytest.raises(ValueError, match=r"must be 1 \(strict\) or more"):
        csdraft.CascadeDrafter([Stub("medium"), Stub("small"), Copier()], K, lenience)
    if isinstance(lenience, float):  # also if no drafter reviews
        with pytest.raises(ValueError, match=r"must be 1 \(strict\) or more"):
            csdraft.CascadeDrafter([Copier()], 5, lenience)


def test_a_cascade_in_a_cascade_is_its_nest():
    inner = csdraft.CascadeDrafter([Stub("small"), Copier()], [[3, 6], [0, 8]])
    outer = csdraft.CascadeDrafter([inner, Copier()], [9, 4])
    assert shape(outer.root) == ([9, 4], [shape(inner.root), "copier"])


def test_a_calls_choice_wins_over_the_cascades_and_that_over_the_default():
    cascade = csdraft.CascadeDrafter([Copier()], verifier="rejection", schedule={"type": "fixed", "depth": 3})
    assert options_of(cascade, Options()) == Options(verifier="rejection", schedule=Fixed(3))
    assert options_of(cascade, Options(verifier="match")) == Options(verifier=Match(), schedule=Fixed(3))
    assert options_of(cascade, Options(schedule="heuristic")) == Options(verifier="rejection", schedule="heuristic")
    assert options_of(Copier(), Options()) == Options(verifier=Match(), schedule=CostModel())
    for given in (Options(), Options(schedule="cost_model")):
        assert options_of(None, given) == Options(verifier=Match(), schedule=Fixed(0))
    with pytest.raises(ValueError, match="did you mean 'match'"):
        Options(verifier="macth")
    with pytest.raises(ValueError, match=r"known: .*fixed"):
        Options(schedule="none of them")


def test_a_lossy_verifier_warns_once():
    draft = partial(tiny("llama").generate, **prompt(), max_new_tokens=24, assistant=csdraft.MaxGram())
    lossy = {"type": "lenient", "lenience": 1.625}
    with pytest.warns(UserWarning, match="not lossless"):
        draft(verifier=lossy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draft(verifier=lossy)


def test_models_and_drafters_become_drafters():
    copier = Copier()
    assert as_drafter(None) is None
    assert as_drafter(copier) is copier
    assert as_drafter(tiny("llama")).model is tiny("llama")


def test_a_folder_without_a_drafter_is_named(tmp_path):
    with pytest.raises(OSError, match=r"has no drafter: no cascade\.json and no config\.json"):
        tiny("llama").generate(torch.tensor([[3, 4, 5]]), assistant=str(tmp_path), max_new_tokens=4)


def test_a_drafter_by_its_type(tmp_path, monkeypatch):
    assert as_drafter("max_gram") == csdraft.MaxGram()
    cascade = csdraft.CascadeDrafter([tiny("llama"), {"type": "max_gram", "depth": 7}], [[2, 5], [0, 3]])
    assert cascade.drafters[1] == csdraft.MaxGram(7)
    with pytest.raises(ValueError, match="'datastore' needs corpus"):
        as_drafter("datastore")
    drafter_of("llama").save_pretrained(tmp_path / "max_gram")
    monkeypatch.chdir(tmp_path)
    assert isinstance(as_drafter("max_gram"), csdraft.ModelDrafter), "a folder of that name is meant"


def test_cascade_gives_the_targets_text_and_reports():
    """Real models, the K matrix of the example, several calls: equal text, merged counts, no growth."""
    target, inputs = tiny("llama"), prompt()
    cascade = csdraft.CascadeDrafter(
        [drafter_of("llama"), noisy(tiny("llama"), 0.3), csdraft.MaxGram()], K, lenience=2.0, schedule="fixed"
    )
    expected = target.generate(**inputs, max_new_tokens=24)
    for calls in (1, 2, 3):
        output = target.generate(**inputs, assistant=cascade, max_new_tokens=24)
        assert output.tolist() == expected.tolist()
        assert (cascade.report.calls, cascade.report.emitted) == (calls, calls * 24)
        assert cascade.last_report.emitted == 24
        assert sum(map(len, cascade.report.tokens)) == 24  # the text is the last call's
    assert cascade.report.level_names[0] == "target"
    assert len(cascade.report.level_names) == 4


def test_reports_from_several_threads_add_up():
    cascade = csdraft.CascadeDrafter([Copier()])
    threads = [
        threading.Thread(target=lambda: [keep(csdraft.Report(target_calls=1), cascade) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cascade.report.calls, cascade.report.target_calls) == (800, 800)


def test_every_drafter_observes_once():
    seen = []

    @dataclass(frozen=True, eq=False)
    class Watcher(Copier):
        def observe(self, rounds):
            seen.append(self)

    watcher, small = Watcher(), Stub("small")
    csdraft.CascadeDrafter([small, watcher], [[3, 6], [0, 8]]).observe([])
    assert seen == [watcher]


def test_public_names_exist():
    assert set(csdraft.__all__) >= {"CascadeDrafter", "ModelDrafter", "MaxGram", "PromptLookup", "Vertical", "Drafter"}
    assert {"Horizontal", "Report", "decode", "enable", "install"} <= set(csdraft.__all__)
    assert all(getattr(csdraft, name) for name in (*csdraft.__all__, "__version__"))


def test_a_cascade_is_copied_and_pickled() -> None:
    """To another process, say: as drafters do, it leaves what belongs to targets behind."""
    model, inputs = tiny("llama"), prompt()
    wanted = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    planned = csdraft.CascadeDrafter([csdraft.MaxGram()], k_matrix="auto")
    planned._plans[model] = planned
    for cascade in (planned, csdraft.CascadeDrafter([drafter_of("llama"), csdraft.MaxGram()], [[2, 4], [0, 3]])):
        copied = pickle.loads(pickle.dumps(cascade))
        assert repr(copied) == repr(cascade)
        assert copied.plan is None
        if cascade is not planned:
            ours = model.generate(**inputs, max_new_tokens=9, do_sample=False, assistant=copied, schedule="fixed")
            assert ours.tolist() == wanted.tolist()
            again = pickle.loads(pickle.dumps(copied))  # now it knows a target
            assert again._target == copied._target
            assert again._target[0].model() is None
            assert deepcopy(copied)._target[0].model() is model
