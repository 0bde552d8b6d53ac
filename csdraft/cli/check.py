"""`csdraft check`: compares greedy texts and samples with those of plain generate."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from csdraft.cli._models import Opened, as_inputs, chat_of_text, encode, open_models, prompts_of_file
from csdraft.data.text import read_utf8

__all__ = ["chi_square", "greedy", "one_forward", "run", "single_steps"]

PROMPTS = (
    "def fibonacci(n):\n",
    "Once upon a time there was a little girl who",
    "The three laws of motion are: 1.",
    "import numpy as np\n\nclass Matrix:\n",
    "Q: What is the capital of France?\nA:",
)
SAMPLED_PROMPTS = 2
TOP_K = 4
LEAST_COUNT = 10
"""Cells of the chi-square table with fewer counts than this in both samples together are pooled."""
SMALLEST_P = 1e-3
"""A test passes if its p is larger."""


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    passed: bool
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:<24}  {self.detail}"


def run(args: argparse.Namespace) -> int:
    opened = open_models(args)
    if opened.assistant is None:
        raise ValueError("there is nothing to check: name an assistant with --cascade or --drafter")
    opened.target.generation_config = _bare(opened.target.generation_config)
    passed = True
    for outcome in _outcomes(opened, _prompts(opened, args), args):
        print(outcome, flush=True)
        passed &= outcome.passed
    print("all passed" if passed else "FAILED: the assistant changes what the target writes")
    return 0 if passed else 1


def _outcomes(opened: Opened, prompts: list[dict[str, Tensor]], args: argparse.Namespace) -> Iterator[Outcome]:
    for number, inputs in enumerate(prompts, 1):
        yield greedy(opened, inputs, args.max_new_tokens, f"greedy, prompt {number}")
    if args.samples:
        for number, inputs in enumerate(prompts[:SAMPLED_PROMPTS], 1):
            yield from distribution(opened, inputs, args, f"prompt {number}")


def _prompts(opened: Opened, args: argparse.Namespace) -> list[dict[str, Tensor]]:
    path = args.prompts
    if path is not None and path.endswith(".jsonl"):
        return [as_inputs(opened, ids) for ids in prompts_of_file(opened, path, args)]
    lines = PROMPTS if path is None else [line for line in read_utf8(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one per line")
    chat = chat_of_text(args)
    return [encode(opened, line, args.max_new_tokens, chat) for line in lines]


def _bare(config: GenerationConfig) -> GenerationConfig:
    """Keeps only the ids of special tokens."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in ids})


def _start(target: Any, inputs: dict[str, Tensor]) -> int:
    """Where the new tokens begin in what `generate` returns."""
    return 1 if target.config.is_encoder_decoder else inputs["input_ids"].shape[1]


# Greedy.


def greedy(opened: Opened, inputs: dict[str, Tensor], length: int, name: str) -> Outcome:
    """Compares a greedy text with plain generate's, and each of its tokens with the target's top logit."""
    target, rules = opened.target, {"do_sample": False, "max_new_tokens": length}
    start = _start(target, inputs)
    plain = target.generate(**inputs, **rules)[0, start:]
    ours = target.generate(**inputs, **rules, assistant=opened.assistant, strict=True, **opened.options)[0, start:]
    same, at = torch.equal(plain, ours), _first_difference(plain, ours)
    steps = single_steps(target, inputs, ours)  # (tokens, vocab)
    best = steps.max(-1).values  # (tokens,)
    # Even if these forwards agree, another kernel may round the last bit differently.
    least = torch.finfo(target.dtype).eps * float(best.abs().max())
    rounding = max(float((steps - one_forward(target, inputs, ours)).abs().max()), least)
    gaps = best - steps.gather(-1, ours.to(steps.device)[:, None])[:, 0]  # (tokens,)
    flips, widest = int((gaps > 0).sum()), float(gaps.max())
    tied = at <= min(len(plain), len(ours)) and widest <= 2 * rounding  # a shorter text is not a near-tie
    text = "same text" if same else f"leaves plain generate's text at token {at}"
    ties = (
        "no near-ties" if not flips else f"{flips} of {len(ours)} tokens below the top logit, by {widest:.2g} at most"
    )
    return Outcome(same or tied, name, f"{text}; {ties} (rounding {rounding:.1g})")


def _first_difference(plain: Tensor, ours: Tensor) -> int:
    """The number of the first token that differs, from 1; if one text continues the other, one past the shorter."""
    shorter = min(len(plain), len(ours))
    differing = (plain[:shorter] != ours[:shorter]).nonzero()
    return int(differing[0]) + 1 if len(differing) else shorter + 1


def single_steps(target: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (tokens, vocab) of plain `generate` when it is forced to write `tokens`."""
    start, forced = _start(target, inputs), tokens.tolist()
    made = target.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=len(forced),
        prefix_allowed_tokens_fn=lambda row, ids: [forced[len(ids) - start]],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(made.logits).float()


@torch.no_grad()
def one_forward(target: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits (tokens, vocab) of one forward over the whole text."""
    tokens = tokens[None].to(inputs["input_ids"])
    if target.config.is_encoder_decoder:
        start = tokens.new_full((1, 1), target.generation_config.decoder_start_token_id)
        logits = target(**inputs, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
    else:
        logits = target(input_ids=torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)).logits
    return logits[0, -tokens.shape[1] :].float()


# Sampling.


def distribution(opened: Opened, inputs: dict[str, Tensor], args: argparse.Namespace, name: str) -> Iterator[Outcome]:
    """Compares plain generate's first sampled tokens with a second sample of its own (control) and the assistant's."""
    drafting = {"assistant": opened.assistant, "strict": True, **opened.options}
    plain, control, ours = (_sample(opened, inputs, args, extra) for extra in ({}, {}, drafting))
    for label, other in (("control", control), ("sampling", ours)):
        statistic, freedom, p = chi_square(plain, other)
        if not freedom and len(plain | other) > 1:
            raise ValueError(
                f"--samples {args.samples}: too few to compare {len(plain | other)} different texts of "
                f"{args.sampled_tokens} tokens; give more, or fewer --sampled-tokens"
            )
        what = "plain against plain" if other is control else "assistant against plain"
        detail = f"{what}, {args.samples} samples: chi-square {statistic:.1f} ({freedom} df), p = {p:.3g}"
        yield Outcome(p > SMALLEST_P, f"{label}, {name}", detail)


def _sample(
    opened: Opened, inputs: dict[str, Tensor], args: argparse.Namespace, drafting: dict[str, Any]
) -> Counter[tuple[int, ...]]:
    """How often each continuation was drawn."""
    drawn: Counter[tuple[int, ...]] = Counter()
    for done in range(0, args.samples, args.batch):
        made = opened.target.generate(
            **inputs,
            **drafting,
            do_sample=True,
            temperature=args.temperature,
            top_k=TOP_K,
            max_new_tokens=args.sampled_tokens,
            num_return_sequences=min(args.batch, args.samples - done),
        )
        drawn.update(map(tuple, made[:, _start(opened.target, inputs) :].tolist()))
    return drawn


def chi_square(first: Counter, second: Counter) -> tuple[float, int, float]:
    """Tests whether both samples have the same distribution; returns (statistic, degrees of freedom, p)."""
    cells = [(first[key], second[key]) for key in first.keys() | second.keys()]
    full = [cell for cell in cells if sum(cell) >= LEAST_COUNT]
    rest = [cell for cell in cells if sum(cell) < LEAST_COUNT]
    if rest:
        full.append((sum(a for a, _ in rest), sum(b for _, b in rest)))
    totals = first.total(), second.total()
    statistic = 0.0
    for cell in full:
        for observed, total in zip(cell, totals, strict=True):
            expected = sum(cell) * total / sum(totals)
            statistic += (observed - expected) ** 2 / expected
    freedom = len(full) - 1
    if not freedom:
        return 0.0, 0, 1.0
    p = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2).double())
    return statistic, freedom, float(p)
