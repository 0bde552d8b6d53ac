"""A weight that is multiplied once for each row is copied first: in bfloat16 on a CPU it then takes 20 times as long.

It happens to frozen weights and states that are a view of more (`states[:, -1:]`), which no test of values can see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csdraft import ModelDrafter
from tests.heads.kinds import NAMES, new
from tests.heads.learned import PROMPTS, target
from tests.heads.spied import FIXED, FORMS
from tests.tiny import fresh, ragged_batch


class Batched(TorchDispatchMode):
    """Notes the shapes of weights that are an operand of a batched product."""

    def __init__(self, *models: torch.nn.Module):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr(): p.shape for model in models for p in model.parameters()}
        self.found: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            pointers = (operand.untyped_storage().data_ptr() for operand in args)
            self.found += [self.weights[pointer] for pointer in pointers if pointer in self.weights]
        return func(*args, **(kwargs or {}))


def check(drafter: Any, goal: Any, inputs: Any, *models: torch.nn.Module) -> None:
    with Batched(*models) as batched:
        goal.generate(**inputs, assistant=drafter, max_new_tokens=8, do_sample=False, reuse=False, **FIXED)
    assert not batched.found


@pytest.mark.parametrize("name", NAMES)
@FORMS
def test_of_heads(name, tree, rows):
    head = new(name).requires_grad_(False)
    check(ModelDrafter(head, tree=tree), target(), ragged_batch(PROMPTS[:rows]), head)


@pytest.mark.parametrize("rows", [1, 3])
def test_of_models(rows):
    """With short prompts: the output layer is copied after a long one, where all its logits would take longer."""
    drafter, goal = (fresh("llama", seed=seed).requires_grad_(False).eval().bfloat16() for seed in (1, 0))
    check(ModelDrafter(drafter), goal, ragged_batch((9, 3, 5)[:rows]), drafter, goal)
