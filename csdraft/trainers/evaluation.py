"""What a drafter is worth to its target, on held-out prompts: acceptance and block efficiency, by decoding."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from csdraft.decoding.feature_session import FeatureModel
from csdraft.drafters.model import ModelDrafter
from csdraft.metrics.intervals import bootstrap_ratio
from csdraft.metrics.measures import expected_acceptance, greedy_agreement, tokens_per_call
from csdraft.models import base_model
from csdraft.reports.report import Report
from csdraft.schedules.fixed import Fixed

__all__ = ["FRESH", "Evaluation", "check_figure", "ends_of", "left_padded", "pad_of", "seed_of", "up_to_end"]

FRESH: dict[str, Any] = {"reuse": False, "graphs": False}
"""Options of `generate` for models that are trained: nothing is kept of them between calls."""


@dataclass
class Evaluation:
    """Lets target and drafter decode some prompts together, at temperature 0 and at `temperature`.

    The texts do not depend on the drafter: they are written once, by the first sitting, and later sittings
    compare the two models' distributions along them.

    Args:
        prompts: token ids of each.
        pad: token id for filling up.
        depth: drafted tokens a round; a fixed number, so that block efficiency depends on acceptance alone.
        new_tokens: of each text.
        temperature: of the sampled texts.
        rows: texts decoded at once.
    """

    prompts: Sequence[Sequence[int]]
    pad: int
    depth: int = 5
    new_tokens: int = 64
    temperature: float = 1.0
    rows: int = 8
    _written: dict[tuple[bool, int], Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def run(self, target: Any, student: nn.Module, part: slice = slice(None)) -> dict[str, float]:
        """Sums over the prompts of `part`, so that the sittings of several processes add up; see `grade`."""
        sums: dict[str, float] = {}
        places = range(len(self.prompts))[part]
        for number, prompts in self._batches(part):
            for sampled in (False, True):
                report, texts = self._decode(target, student, prompts, sampled)
                kind = "sampled" if sampled else "greedy"
                _add(sums, f"{kind}_emitted", report.emitted)
                _add(sums, f"{kind}_rounds", report.rounds)
                for place, lengths in zip(places[number:], report.lengths, strict=False):
                    _add(sums, f"{kind}_emitted_by_{place}", sum(lengths))
                    _add(sums, f"{kind}_rounds_by_{place}", len(lengths))
                for depth, (tried, accepted) in enumerate(report.target.by_depth[: self.depth], 1):
                    _add(sums, f"{kind}_accepted_{depth}", accepted)
                    _add(sums, f"{kind}_tried_{depth}", tried)
                texts = self._written.setdefault((sampled, number), texts)
                self._compare(sums, target, student, prompts, texts, sampled)
        return sums

    @torch.no_grad()
    def block_efficiencies(self, target: Any, student: nn.Module, sampled: bool) -> list[float]:
        """(prompts,) tokens a call of the target, of each prompt."""
        found = []
        for _, prompts in self._batches(slice(None)):
            report, _ = self._decode(target, student, prompts, sampled)
            found += [sum(lengths) / len(lengths) for lengths in report.lengths]
        return found

    def _batches(self, part: slice) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
        mine = self.prompts[part]
        for start in range(0, len(mine), self.rows):
            yield start, mine[start : start + self.rows]

    def _decode(self, target: Any, student: nn.Module, prompts: Any, sampled: bool) -> tuple[Report, Tensor]:
        """The report of the decoding, and the texts, (rows, prompt + new)."""
        inputs = left_padded(prompts, self.pad, target.device)
        how = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}
        output = target.generate(
            **inputs,
            assistant=ModelDrafter(student),  # type: ignore[arg-type]
            schedule=Fixed(self.depth),
            row_seeds=[seed_of(prompt) for prompt in prompts],
            do_sample=sampled,
            max_new_tokens=self.new_tokens,
            return_dict_in_generate=True,
            pad_token_id=self.pad,
            **FRESH,
            **how,
        )
        return output.report, output.sequences

    def _compare(
        self, sums: dict[str, float], target: Any, student: Any, prompts: Any, texts: Tensor, sampled: bool
    ) -> None:
        """Adds what both models say along the target's text: overlap where it was sampled, agreement where greedy."""
        if target.config.is_encoder_decoder:
            inputs = left_padded(prompts, self.pad, target.device) | {"decoder_input_ids": texts[:, :-1]}
            width = 1
        else:
            width = max(map(len, prompts))
            mask = torch.ones_like(texts)
            mask[:, :width] = left_padded(prompts, self.pad, texts.device)["attention_mask"]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": texts, "attention_mask": mask, "position_ids": positions}
        written = torch.zeros_like(texts[:, 1:], dtype=torch.bool)
        written[:, width - 1 :] = up_to_end(texts[:, width:], ends_of(target))
        drafted, wanted = (
            logits[:, : written.shape[1]].to(written.device)[written] for logits in _logits(student, target, inputs)
        )
        if not sampled:
            _add(sums, "compared_greedy", len(wanted))
            _add(sums, "agreed", greedy_agreement(drafted, wanted).sum().item())
            return
        overlap = expected_acceptance(drafted, wanted, self.temperature)
        places = written.cumsum(-1)[written]  # of each token in its text, the first new one is 1
        for first in _starts(self.new_tokens):
            here = (first <= places) & (places < 2 * first)
            _add(sums, f"overlap_from_{first}", overlap[here].sum().item())
            _add(sums, f"compared_from_{first}", here.sum().item())

    @staticmethod
    def _intervals(sums: dict[str, float]) -> dict[str, float]:
        """95 % intervals of block efficiency: prompts are drawn with replacement."""
        figures: dict[str, float] = {}
        for kind, name in (("greedy", "block_efficiency"), ("sampled", "block_efficiency_sampled")):
            emitted, rounds = (_of_prompts(sums, f"{kind}_{what}") for what in ("emitted", "rounds"))
            _, figures[f"{name}_low"], figures[f"{name}_high"] = bootstrap_ratio(emitted, rounds)
        return figures | {"prompts": len(_of_prompts(sums, "greedy_rounds"))}

    def grade(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures from sums.

        Returns:
            acceptance: mean of `csdraft.metrics.measures.expected_acceptance` along sampled texts;
            acceptance_from_<n>: the same of each text's new tokens n to 2 n - 1, the first is 1;
            agreement: share of equal greedy choices along greedy texts;
            block_efficiency, block_efficiency_sampled: tokens a call of the target, at temperature 0 and at
                `temperature`; with `_low` and `_high` behind their names, the 95 % intervals over prompts;
            prompts: how many there were;
            accepted_<n>: how often the n-th drafted token was kept, given that those before it were, greedy.
        """
        compared = {first: sums[f"compared_from_{first}"] for first in _starts(self.new_tokens)}
        ranges = {first: count for first, count in compared.items() if count}
        overlaps = {first: sums[f"overlap_from_{first}"] for first in ranges}
        figures = {
            "acceptance": sum(overlaps.values()) / sum(ranges.values()),
            "agreement": sums["agreed"] / sums["compared_greedy"],
            "block_efficiency": tokens_per_call([sums["greedy_emitted"]], [sums["greedy_rounds"]]),
            "block_efficiency_sampled": tokens_per_call([sums["sampled_emitted"]], [sums["sampled_rounds"]]),
        }
        figures |= self._intervals(sums)
        figures |= {f"acceptance_from_{first}": overlaps[first] / ranges[first] for first in ranges}
        for depth in range(1, self.depth + 1):
            if tried := sums.get(f"greedy_tried_{depth}"):
                figures[f"accepted_{depth}"] = sums[f"greedy_accepted_{depth}"] / tried
        return figures


def _logits(student: Any, target: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, length, vocab) what student and target say along texts; a head reads the target's features."""
    there = {key: value.to(target.device) for key, value in inputs.items()}
    head = base_model(student)
    if not isinstance(head, FeatureModel):
        here = {key: value.to(student.device) for key, value in inputs.items()}
        return student(**here, use_cache=False).logits, target(**there, use_cache=False).logits
    read = target(**there, use_cache=False, output_hidden_states=True)
    states = {tap: read.hidden_states[tap] for tap in head.taps}
    ids, mask, positions = (inputs[key].to(head.device) for key in ("input_ids", "attention_mask", "position_ids"))  # type: ignore[union-attr]
    return head.along(states, ids, positions, mask), read.logits


def _of_prompts(sums: dict[str, float], name: str) -> list[float]:
    """The sums of each prompt by its place."""
    return [value for key, value in sorted(sums.items()) if key.startswith(f"{name}_by_")]


def check_figure(name: str, depth: int, new_tokens: int) -> None:
    """Raises ValueError if no evaluation of this depth and length has such a figure; see `Evaluation.grade`."""
    known = ["block_efficiency", "block_efficiency_sampled", "acceptance", "agreement"]
    counted = [f"accepted_{n}" for n in range(1, depth + 1)] + [f"acceptance_from_{n}" for n in _starts(new_tokens)]
    if name not in [*known, *counted]:
        raise ValueError(
            f"metric_for_best_model={name!r} is no figure of the evaluation; give one of {', '.join(known)}, "
            f"{counted[0]} to {counted[depth - 1]}, or {', '.join(counted[depth:])}"
        )


def pad_of(tokenizer: Any) -> int:
    """The token that short rows are filled up with."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def left_padded(texts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (rows, longest)."""
    width = max(map(len, texts))
    ids = [[pad] * (width - len(text)) + list(text) for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def ends_of(model: Any) -> list[int]:
    """The ids at which the model's texts end."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def up_to_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """(..., length) whether a token stands before or at the first end of its text."""
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return ended.cumsum(-1) - ended.int() == 0


def seed_of(tokens: Sequence[int], *keys: int) -> int:
    """A seed that depends on the text and on some numbers, and on nothing else."""
    return zlib.crc32(repr((list(tokens), keys)).encode())


def _starts(new_tokens: int) -> list[int]:
    """1, 2, 4, ...: where ranges of places begin that are twice as long each."""
    return [1 << power for power in range(new_tokens.bit_length())]


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value
