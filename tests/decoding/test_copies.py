"""How often a round waits for the device: once for the drafts and once for the choices, whatever their number."""

import pytest
import torch
from tiny import drafter_of, ragged_batch, tiny
from torch.overrides import TorchFunctionMode

from csdraft import MaxGram, ModelDrafter
from csdraft.decoding import loop
from csdraft.decoding.inputs import Inputs
from csdraft.decoding.reader import Reader
from csdraft.trees.best_first import BestFirst

TO_THE_HOST = {"tolist", "item", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero"}
LEVELS = 4


class Copies(TorchFunctionMode):
    """Counts what brings values of tensors to the host."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in TO_THE_HOST
        return func(*args, **kwargs or {})


@pytest.fixture
def copies(monkeypatch):
    """(rounds,) copies of each round, decoded as on a device whose values the host does not see."""
    monkeypatch.setattr(Reader, "on_host", property(lambda self: False, lambda self, value: None), raising=False)
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
        (lambda: ModelDrafter(drafter_of("llama"), depth=LEVELS), 2),
        (lambda: ModelDrafter(drafter_of("llama"), depth=LEVELS, tree=BestFirst()), LEVELS + 1),
        (MaxGram, 1),
    ],
    ids=["chain", "tree", "copied"],
)
def test_a_round_waits_once_for_its_drafts_and_once_for_its_choices(copies, rows, sampled, drafter, most):
    inputs = ragged_batch((20, 3, 11)[:rows])
    options = {"do_sample": sampled, "max_new_tokens": 20, "pad_token_id": 0, "schedule": "fixed", "reuse": False}
    seeds = {"row_seeds": list(range(rows))} if sampled else {}
    torch.manual_seed(0)
    tiny("llama").generate(**inputs, **options, **seeds, assistant=drafter())
    assert max(copies) == most, copies
