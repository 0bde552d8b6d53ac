"""Prove on your own models that drafting changes nothing: neither greedy text nor the distribution of samples.

Greedy: the text with the assistant is compared with plain generate's, and every emitted token with the logits that the
target gives when it reads that text one token at a time. A block of tokens rounds differently from single tokens, so
where two logits are closer than the model's own rounding, either token is right: such a near-tie is counted, and
passes. The rounding is measured: the difference between the logits of one forward over the text and those of single
steps. It counts as at least the relative precision of the model's dtype, since drafted tokens may be read by other
kernels than those two. In float32 near-ties hardly occur; in bfloat16 they do.

Sampling: the first tokens are drawn many times with and without the assistant, and the two tables of counts are
compared by a chi-square test; two tables of plain generate are the control.

The exit status is 0 if all passed and 1 if not.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from csdraft.cli._models import (
    Opened,
    add_chat_arguments,
    add_drafting_arguments,
    add_model_arguments,
    as_inputs,
    chat_of_text,
    encode,
    open_models,
    prompts_of_file,
)

__all__ = ["add_arguments", "chi_square", "run"]

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
"""Cells of a chi-square table that hold fewer, both samples together, are pooled."""
SMALLEST_P = 1e-3


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    passed: bool
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:<24}  {self.detail}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_drafting_arguments(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="one a line; in a .jsonl file under the key `prompt` or `messages`"
    )
    add_chat_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of the greedy texts")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="for the distribution; 0 skips it")
    parser.add_argument(
        "--sampled-tokens", type=int, default=3, metavar="N", help="tokens whose joint distribution is compared"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the sampling")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="rows sampled at once")


def run(args: argparse.Namespace) -> int:
    opened = open_models(args)
    if opened.assistant is None:
        raise ValueError("there is nothing to check: name an assistant with --cascade or --drafter")
    opened.target.generation_config = _bare(opened.target.generation_config)  # no penalty, no warper
    prompts = _prompts(opened, args)
    passed = True
    for outcome in _outcomes(opened, prompts, args):
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
    lines = PROMPTS if path is None else [line for line in Path(path).read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    chat = chat_of_text(args)
    return [encode(opened, line, chat) for line in lines]


def _bare(config: GenerationConfig) -> GenerationConfig:
    """Where texts begin and end, and nothing else."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    kept = {name: getattr(config, name) for name in ids}
    if kept["pad_token_id"] is None:
        eos = kept["eos_token_id"]
        kept["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return GenerationConfig(**kept)


# Greedy.


def greedy(opened: Opened, inputs: dict[str, Tensor], length: int, name: str) -> Outcome:
    """Compares one greedy text with plain generate's, and each of its tokens with the target's own best."""
    target, rules = opened.target, {"do_sample": False, "max_new_tokens": length}
    start = 1 if target.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    plain = target.generate(**inputs, **rules)[0, start:]
    ours = target.generate(**inputs, **rules, assistant=opened.assistant, strict=True, **opened.options)[0, start:]
    same, at = torch.equal(plain, ours), _first_difference(plain, ours)
    steps = single_steps(target, inputs, ours)
    best = steps.max(-1).values  # (tokens,)
    # A GPU's kernels may agree in these two forwards, and round the last bit otherwise in a third.
    least = torch.finfo(target.dtype).eps * float(best.abs().max())
    rounding = max(float((steps - one_forward(target, inputs, ours)).abs().max()), least)
    gaps = best - steps.gather(-1, ours.to(steps.device)[:, None])[:, 0]
    flips, widest = int((gaps > 0).sum()), float(gaps.max())
    tied = at <= min(len(plain), len(ours)) and widest <= 2 * rounding  # a text cut short is not a near-tie
    text = "same text" if same else f"leaves plain generate's text at token {at}"
    ties = (
        "no near-ties" if not flips else f"{flips} of {len(ours)} tokens below the top logit, by {widest:.2g} at most"
    )
    return Outcome(same or tied, name, f"{text}; {ties} (rounding {rounding:.1g})")


def _first_difference(plain: Tensor, ours: Tensor) -> int:
    """The first token in which they differ, counted from 1; one past the shorter if it is the other's beginning."""
    shorter = min(len(plain), len(ours))
    differing = (plain[:shorter] != ours[:shorter]).nonzero()
    return int(differing[0]) + 1 if len(differing) else shorter + 1


def single_steps(target: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(tokens, vocab) logits of plain `generate` when it is made to write `tokens`."""
    start = 1 if target.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    forced = tokens.tolist()
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
    """(tokens, vocab) logits of one forward over the whole text."""
    tokens = tokens[None].to(inputs["input_ids"])
    if target.config.is_encoder_decoder:
        start = tokens.new_full((1, 1), target.generation_config.decoder_start_token_id)
        logits = target(**inputs, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
    else:
        logits = target(input_ids=torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)).logits
    return logits[0, -tokens.shape[1] :].float()


# Sampling.


def distribution(opened: Opened, inputs: dict[str, Tensor], args: argparse.Namespace, name: str) -> Iterator[Outcome]:
    """The distribution of the first sampled tokens with the assistant, and plain generate's against itself."""
    drafting = {"assistant": opened.assistant, "strict": True, **opened.options}
    plain, control, ours = (_sample(opened, inputs, args, extra) for extra in ({}, {}, drafting))
    for label, other in (("control", control), ("sampling", ours)):
        statistic, freedom, p = chi_square(plain, other)
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
        start = 1 if opened.target.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        drawn.update(map(tuple, made[:, start:].tolist()))
    return drawn


def chi_square(first: Counter, second: Counter) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p) of the hypothesis that both samples follow one distribution."""
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
