"""Tokens a round of the bundled pair, equal to stored numbers: drafting worse fails, though no text changes.

Where a change is meant to draft otherwise, `python -m tests.decoding.test_block_efficiency` prints the new numbers.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from csdraft import CascadeDrafter, Drafter, Horizontal, MaxGram, ModelDrafter, Vertical
from csdraft.drafters.auto import Auto
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests.conftest import ROOT

PROMPTS, NEW = 2, 32
HEAD = str(ROOT / "models/smol-eagle3")
GOLDEN = {
    "max_gram": (64, 32),
    "auto": (64, 23),
    "model of depth 5": (64, 25),
    "tree": (64, 18),
    "vertical": (64, 23),
    "horizontal": (64, 21),
    "cascade": (64, 21),
    "eagle3": (64, 22),
    "eagle3 and max_gram": (64, 20),
}
"""(tokens emitted, rounds) of each setting, all prompts together."""


def settings(small: torch.nn.Module) -> dict[str, Drafter]:
    """One of each kind: copied, drafted as a chain and as a tree, reviewed, in turn, and chosen by a matrix."""
    return {
        "max_gram": MaxGram(),
        "auto": Auto(remember=False),
        "model of depth 5": ModelDrafter(small, depth=5),
        "tree": ModelDrafter(small, depth=5, tree=BestFirst(nodes=24)),
        "vertical": Vertical(small, MaxGram(), depth=8, inner_length=4),
        "horizontal": Horizontal((ModelDrafter(small, depth=5), MaxGram()), (3, 10)),
        "cascade": CascadeDrafter([small, MaxGram()], [[4, 8], [0, 3]]),
        "eagle3": ModelDrafter(HEAD, depth=5),
        "eagle3 and max_gram": CascadeDrafter([HEAD, MaxGram()], [[4, 8], [0, 3]]),
    }


def measured() -> dict[str, tuple[int, int]]:
    """What each setting comes to; AssertionError if a text is not plain `generate`'s."""
    target, small = (
        AutoModelForCausalLM.from_pretrained(ROOT / "models" / name, dtype=torch.float32)
        for name in ("smol-target", "smol-drafter")
    )
    words = AutoTokenizer.from_pretrained(ROOT / "models" / "smol-target")
    lines = (ROOT / "recipes/smol/prompts.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    found = dict.fromkeys(settings(small), (0, 0))
    for line in lines:
        options = {**words(json.loads(line)["prompt"], return_tensors="pt"), "do_sample": False, "max_new_tokens": NEW}
        plain = target.generate(**options)
        for name, drafter in settings(small).items():
            how = {"schedule": Fixed(), "strict": True, "return_dict_in_generate": True}
            output = target.generate(**options, assistant=drafter, **how)
            assert output.sequences.tolist() == plain.tolist(), name
            emitted, rounds = found[name]
            found[name] = (emitted + output.report.emitted, rounds + output.report.rounds)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, int]]:
    return measured()


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_a_round_are_those_that_are_stored(name: str, found: dict[str, tuple[int, int]]) -> None:
    assert found[name] == GOLDEN[name]
    assert found[name][0] > found[name][1], "nothing was accepted"


def test_every_setting_is_stored(found: dict[str, tuple[int, int]]) -> None:
    assert set(found) == set(GOLDEN)


if __name__ == "__main__":
    print(json.dumps(measured(), indent=4))
