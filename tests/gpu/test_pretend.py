"""On a pretended accelerator, see `tests.pretend`: no two devices meet, and the host seldom waits for the device."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import csdraft
from csdraft import ModelDrafter
from csdraft.decoding.graphs import RECORDERS, check_on_device
from csdraft.decoding.ledger import Ledger
from csdraft.trainers.objective import Distillation
from csdraft.trainers.students import save_student
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.gpu.test_device import FIXED, GREEDY, SAMPLED, drafters, placed
from tests.heads import kinds
from tests.heads.learned import target, texts
from tests.pretend import DEVICE, Pretended, pretended

DEPTH = 3
PENALTY = {"repetition_penalty": 1.3, "min_new_tokens": 4}
"""As chat models often have in their generation config: it depends on the text, and needs no copy to the host."""


@pytest.fixture
def device() -> Iterator[Pretended]:
    """Recorded forwards are checked there, and then run as they are."""

    def record(body):
        check_on_device(body)
        return body

    csdraft.release()
    texts()  # kept, and written faster without a pretended device
    with pytest.MonkeyPatch.context() as patch, pretended() as mode:
        patch.setitem(RECORDERS, DEVICE, lambda reader: record)
        yield mode
    csdraft.release()


@pytest.fixture
def rounds(device: Pretended, monkeypatch: pytest.MonkeyPatch) -> list[Counter]:
    """What had been copied when each round began; a recording's own timing is left out."""
    begun: list[Counter] = []
    begin = Ledger.begin

    def counted(self: Ledger) -> None:
        begun.append(Counter({key: count for key, count in device.copies.items() if "graphs.py" not in key[1]}))
        begin(self)

    monkeypatch.setattr(Ledger, "begin", counted)
    return begun


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in batch.items()}


def copies(rounds: list[Counter], direction: str) -> list[int]:
    """Of each round but the first, which reads the prompt, and the last."""
    steps = [later - earlier for earlier, later in itertools.pairwise(rounds[1:])]
    return [sum(count for (way, _), count in step.items() if way == direction) for step in steps]


# Decoding.


def cases() -> dict[str, tuple[Any, dict, int, int]]:
    """Drafter, options, and how often a round may copy to the host and from it: of a tree, once a level and once more.

    A chain copies three times from the host: where it begins, how it continues, and what is reviewed.
    """
    _, medium, small = placed("llama", DEVICE)
    made, tree = drafters(medium, small), ModelDrafter(small, depth=DEPTH, tree=BestFirst(8))
    return {
        "plain": (None, GREEDY, 1, 1),
        "model": (made["model"], GREEDY, 1, 3),
        "sampled": (made["model"], SAMPLED, 1, 3),
        "penalty": (made["model"], GREEDY | PENALTY, 1, 3),
        "sampled penalty": (made["model"], SAMPLED | PENALTY, 1, 3),
        "tree penalty": (tree, GREEDY | PENALTY, DEPTH + 1, DEPTH + 1),
        "tree": (tree, GREEDY, DEPTH + 1, DEPTH + 1),
        "max_gram": (made["max_gram"], GREEDY, 1, 1),
        "cascade": (made["cascade"], GREEDY, 26, 99),  # each row of each lenient review asks for its chances once
    }


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "name",
    [
        *("model", "sampled", "tree", "penalty", "sampled penalty", "tree penalty", "max_gram", "cascade"),
        pytest.param("plain", marks=pytest.mark.drafts_nothing),
    ],
)
def test_a_round_copies_once_to_the_host(device: Pretended, rounds: list[Counter], name: str, rows: int) -> None:
    """Which slots of a tree are kept is copied from the host for each row, too."""
    drafter, options, to_host, from_host = cases()[name]
    inputs, alone = tiny.inputs_of("llama", rows), {"custom_generate": csdraft.decode}
    options = options | {"max_new_tokens": 8} | ({"row_seeds": [3, 1, 4][:rows]} if "sampled" in name else {})
    wanted = tiny.tiny("llama").generate(**inputs, **options, **(alone if "sampled" in name else {}))
    rounds.clear()
    way = alone if drafter is None else {"assistant": drafter, **FIXED}
    output = placed("llama", DEVICE)[0].generate(**moved(inputs), **options, **way)
    assert output.device.type == DEVICE
    assert output.tolist() == wanted.tolist()
    assert max(copies(rounds, "to")) <= to_host
    assert median(copies(rounds, "from")) <= from_host + (2 * rows if name.startswith("tree") else 0)


@dataclass(frozen=True, eq=False)
class Late(ModelDrafter):
    """Drafts from the sixth round on: its session begins when rows have left the target's batch."""

    def propose(self, contexts: Any, budgets: Any) -> Any:
        call = contexts[0].call
        rounds = call.memo(self, lambda: [0])
        rounds[0] += 1
        return [c.draft for c in contexts] if rounds[0] < 6 else super().propose(contexts, budgets)


@pytest.mark.slow
def test_a_drafter_that_begins_after_rows_have_left(device: Pretended) -> None:
    inputs, plainly = tiny.inputs_of("llama", 4), tiny.tiny("llama")
    alone = plainly.generate(**inputs, do_sample=False, max_new_tokens=20)
    texts = [row[inputs["input_ids"].shape[1] :] for row in alone.tolist()]
    ends = [next(token for token in text if token not in texts[0] + texts[1]) for text in texts[2:]]  # of two rows
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": ends, "pad_token_id": 0}
    wanted = plainly.generate(**inputs, **options)
    target, _, small = placed("llama", DEVICE)
    for drafter in (Late(small, depth=3), ModelDrafter(small, depth=3)):
        output = target.generate(**moved(inputs), **options, assistant=drafter, **FIXED)
        assert output.tolist() == wanted.tolist()


@pytest.mark.slow
def test_lenient_reviewers_of_nothing_with_a_processor_that_reads_the_text(device: Pretended) -> None:
    """A review of an empty draft asks for no chance at all."""
    inputs, options = tiny.inputs_of("llama", 1), GREEDY | {"repetition_penalty": 1.3, "max_new_tokens": 12}
    target, medium, small = placed("llama", DEVICE)
    output = target.generate(**moved(inputs), **options, assistant=drafters(medium, small)["cascade"], **FIXED)
    assert output.tolist() == tiny.tiny("llama").generate(**inputs, **options).tolist()


# Heads and training.


STEPS = dict.fromkeys(("clover2", "ctc", "dflash", "falcon", "parallel"), 1)
STEPS |= dict.fromkeys(("chimera", "hydra", "medusa"), 4)
"""Kinds that ask the device which step of a draft a forward is of, and how often; the others wait once a round."""


@cache
def there() -> Any:
    return copy.deepcopy(target()).to(DEVICE)


def train_and_save(student: nn.Module, teacher: Any, folder: Path) -> None:
    step = Distillation(student, teacher, kinds.OBJECTIVE).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 0.01)
    batch = {key: value[:2] if isinstance(value, Tensor) else value for key, value in kinds.batch().items()}
    step(**moved(batch)).backward()
    optimizer.step()
    save_student(student, folder)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("ctc", "eagle3", "medusa") else pytest.mark.slow)
        for name in kinds.NAMES
    ],
)
def test_a_head_drafts_and_is_trained_and_saved(device, rounds, monkeypatch, tmp_path, name: str) -> None:
    """It drafts 60 of the 97 tokens, if its kind can draft some only; which ones is saved with it."""
    monkeypatch.setattr(kinds, "target", there)
    head, ids = kinds.new(name).to(DEVICE), texts()[:2, :10]
    asked = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6}
    wanted = target().generate(ids, **asked)
    output = there().generate(**moved({"inputs": ids} | asked), assistant=ModelDrafter(head, depth=DEPTH), **FIXED)
    assert output.tolist() == wanted.tolist()
    assert max(copies(rounds, "to")) <= 1 + DEPTH * STEPS.get(name, 0)
    train_and_save(head, there(), tmp_path)
    _, saved = kinds.weights_in(tmp_path)
    assert "d2t" not in saved or int(saved["t2d"].sum()) == 60


def test_a_small_model_is_trained_and_saved(device: Pretended, tmp_path: Path) -> None:
    student = copy.deepcopy(tiny.drafter_of("llama")).to(DEVICE)
    train_and_save(student, there(), tmp_path)
    _, saved = kinds.weights_in(tmp_path)
    assert saved.keys() == student.state_dict().keys()
    assert all(torch.equal(saved[name], value.cpu()) for name, value in student.state_dict().items())
