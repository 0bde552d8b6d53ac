"""One prompt, answered greedily and once in every way: ways that remember would copy their own answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from csdraft.reports.report import Report

__all__ = ["AGAIN", "AUTO", "CLOCKS", "LOOKUP_LENGTH", "PLAIN", "Answer", "answers", "in_turns"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PLAIN, AGAIN = "plain", "plain again"
LOOKUP_LENGTH = 10
"""Tokens a round of transformers' prompt lookup, as its documentation has it."""
AUTO = {"assistant": "auto"}

Ways = Mapping[str, Mapping[str, Any]]
"""Keywords of `generate` by way."""


@dataclass(frozen=True)
class Answer:
    """What one way made of a prompt.

    Attributes:
        seconds: of `generate`, by clock.
        text: new tokens.
        report: csdraft's own; None where transformers decodes.
    """

    seconds: dict[str, float]
    text: tuple[int, ...]
    report: Report | None

    def pace(self, clock: str) -> float:
        """Seconds of a new token: a text that parts at a near-tie may be longer than plain's."""
        return self.seconds[clock] / len(self.text)


def in_turns(drafted: Ways, number: int) -> dict[str, Mapping[str, Any]]:
    """Plain first and last, whose mean is what the others are compared with; of those another one begins each time."""
    names, turn = list(drafted), number % len(drafted)
    return {PLAIN: {}, **{name: drafted[name] for name in names[turn:] + names[:turn]}, AGAIN: {}}


def answers(target: Any, prompt: Sequence[int], ways: Ways, tokens: int) -> dict[str, Answer]:
    """Lets every way answer, in the order given.

    Args:
        prompt: token ids.
        tokens: new ones at most.
    """
    return {name: _answer(target, prompt, options, tokens) for name, options in ways.items()}


def _answer(target: Any, prompt: Sequence[int], options: Mapping[str, Any], tokens: int) -> Answer:
    ids = torch.tensor([list(prompt)], device=target.device)
    ours = "assistant" in options
    asked = {**options, "reuse": False, "return_dict_in_generate": True} if ours else options  # all read the prompt
    began = {name: clock() for name, clock in CLOCKS.items()}
    made = target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **asked
    )
    seconds = {name: clock() - began[name] for name, clock in CLOCKS.items()}
    row = made.sequences[0] if ours else made[0]
    return Answer(seconds, tuple(row[len(prompt) :].tolist()), made.report if ours else None)
