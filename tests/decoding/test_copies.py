"""How often a round waits for the device: once for the choices, with which a chain comes too; once a tree's level."""

from copy import deepcopy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from csdraft import Horizontal, MaxGram, ModelDrafter, Vertical
from csdraft.decoding import loop
from csdraft.decoding.inputs import Inputs
from csdraft.decoding.reader import Reader
from csdraft.drafters.merged import Merged
from csdraft.trees.best_first import BestFirst
from tests.tiny import drafter_of, ragged_batch, tiny

TO_THE_HOST = {"tolist", "item", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero"}
LEVELS = 4


class Copies(TorchFunctionMode):
    """Counts what brings values of tensors to the host."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in TO_THE_HOST
        return func(*args, **kwargs or {})


@pytest.fixture
def far(monkeypatch):
    """All models are as on a device whose values the host does not see."""
    kept = lambda self, value: vars(self).update(on_host=value)  # noqa: E731 (later calls may use the same reader)
    monkeypatch.setattr(Reader, "on_host", property(lambda self: False, kept), raising=False)


@pytest.fixture
def copies(monkeypatch, far):
    """(rounds,) copies of each round."""
    counter, found, one_round, make = Copies(), [], loop.run_round, Inputs.__init__

    def counted(*args):
        before = counter.count
        with counter:
            rounds = one_round(*args)
        found.append(counter.count - before)
        return rounds

    def uncounted(*args):  # a buffer of the host's own is made
        before = counter.count
        make(*args)
        counter.count = before

    monkeypatch.setattr(loop, "run_round", counted)
    monkeypatch.setattr(Inputs, "__init__", uncounted)
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("drafter", "most"),
    [
        (lambda: ModelDrafter(drafter_of("llama"), depth=LEVELS), 1),
        (lambda: ModelDrafter(drafter_of("llama"), depth=LEVELS, tree=BestFirst()), LEVELS + 1),
        (MaxGram, 1),
    ],
    ids=["chain", "tree", "copied"],
)
def test_a_round_waits_once_and_once_more_for_each_level_of_a_tree(copies, rows, sampled, drafter, most):
    inputs = ragged_batch((20, 8, 11)[:rows])
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]  # something to copy
    options = {"do_sample": sampled, "max_new_tokens": 20, "pad_token_id": 0, "schedule": "fixed", "reuse": False}
    seeds = {"row_seeds": list(range(rows))} if sampled else {}
    torch.manual_seed(0)
    tiny("llama").generate(**inputs, **options, **seeds, assistant=drafter())
    assert max(copies) == most, copies


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "drafter",
    [
        lambda: ModelDrafter(drafter_of("llama"), depth=LEVELS),
        lambda: Horizontal((ModelDrafter(drafter_of("llama")), MaxGram()), (2, 4)),
        lambda: Vertical(drafter_of("llama"), ModelDrafter(drafter_of("llama", scale=0.2), depth=2)),
        lambda: Merged((ModelDrafter(drafter_of("llama")), MaxGram())),
    ],
    ids=["model", "horizontal", "vertical", "merged"],
)
def test_awaited_tokens_are_seen_by_whoever_looks(far, drafter, sampled):
    """The text of sampled rows does not depend on the drafter."""
    inputs, target = ragged_batch((20, 3, 11)), tiny("llama")
    options = {"do_sample": sampled, "max_new_tokens": 24, "pad_token_id": 0, "schedule": "fixed", "strict": True}
    seeds = {"row_seeds": [0, 1, 2]} if sampled else {}
    expected = target.generate(**inputs, **options, **seeds, assistant=MaxGram())
    assert torch.equal(target.generate(**inputs, **options, **seeds, assistant=drafter()), expected)


def test_a_model_that_computes_nan_is_left_out(far):
    broken, inputs = deepcopy(tiny("llama")), ragged_batch((20, 3))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    with pytest.warns(RuntimeWarning, match="nan"):
        text = tiny("llama").generate(**inputs, **options, assistant=ModelDrafter(broken), schedule="fixed")
    assert torch.equal(text, tiny("llama").generate(**inputs, **options))
