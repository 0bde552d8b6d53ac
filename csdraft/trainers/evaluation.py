"""Evaluates a drafter by decoding held-out prompts with its target: acceptance and block efficiency."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad as padded

from csdraft.data.packing import ends_of, padded_prompts
from csdraft.decoding.feature_session import FeatureModel
from csdraft.decoding.traits import tapped
from csdraft.drafters.model import ModelDrafter
from csdraft.metrics.intervals import bootstrap_ratio
from csdraft.metrics.measures import expected_acceptance, greedy_agreement
from csdraft.models import base_model
from csdraft.reports.report import Report
from csdraft.schedules.fixed import Fixed

__all__ = ["FRESH", "Evaluation", "check_figure", "seed_of", "up_to_end"]

FRESH: dict[str, Any] = {"reuse": False, "graphs": False}
"""Options of `generate` for models in training: nothing about them is kept between calls."""


@dataclass
class Evaluation:
    """Decodes prompts with target and drafter together, at temperature 0 and at `temperature`.

    The texts do not depend on the drafter. The first run writes them; later runs compare the two models'
    distributions along the same texts.

    Args:
        prompts: token ids of each.
        pad: padding token id.
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
    def run(self, target: Any, student: nn.Module, part: slice = slice(None)) -> Counter[str]:
        """Sums over the prompts of `part`, which can be added over several processes; see `grade`."""
        sums: Any = Counter()
        places, mine = range(len(self.prompts))[part], self.prompts[part]
        for number in range(0, len(mine), self.rows):
            prompts = mine[number : number + self.rows]
            for sampled in (False, True):
                report, texts = self._decode(target, student, prompts, sampled)
                kind = "sampled" if sampled else "greedy"
                for place, lengths in zip(places[number:], report.lengths, strict=False):
                    sums[f"{kind}_emitted_by_{place}"] += sum(lengths)
                    sums[f"{kind}_rounds_by_{place}"] += len(lengths)
                for depth, (tried, accepted) in enumerate(report.target.by_depth[: self.depth], 1):
                    sums[f"{kind}_accepted_{depth}"] += accepted
                    sums[f"{kind}_tried_{depth}"] += tried
                texts = self._written.setdefault((sampled, number), texts)
                self._compare(sums, target, student, prompts, texts, sampled)
        return sums

    def block_efficiencies(self, sums: Mapping[str, float], kind: str) -> list[float]:
        """(prompts,) tokens per call of the target for each prompt, from sums; `kind` is 'greedy' or 'sampled'."""
        places = range(len(self.prompts))
        return [sums[f"{kind}_emitted_by_{place}"] / sums[f"{kind}_rounds_by_{place}"] for place in places]

    def _decode(self, target: Any, student: nn.Module, prompts: Any, sampled: bool) -> tuple[Report, Tensor]:
        """The report of the decoding, and the texts, (rows, prompt + new)."""
        output = target.generate(
            **padded_prompts(prompts, self.pad, target.device),
            assistant=ModelDrafter(student),  # type: ignore[arg-type]
            schedule=Fixed(self.depth),
            row_seeds=[seed_of(prompt) for prompt in prompts],
            do_sample=sampled,
            max_new_tokens=self.new_tokens,
            return_dict_in_generate=True,
            pad_token_id=self.pad,
            **FRESH,
            **({"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        )
        return output.report, output.sequences

    def _compare(
        self, sums: Counter[str], target: Any, student: Any, prompts: Any, texts: Tensor, sampled: bool
    ) -> None:
        """Compares both models along the target's texts: their overlap if sampled, their agreement if greedy."""
        if target.config.is_encoder_decoder:
            inputs = padded_prompts(prompts, self.pad, target.device) | {"decoder_input_ids": texts[:, :-1]}
            width, fits = 1, True
        else:
            width = max(map(len, prompts))
            mask = torch.ones_like(texts)  # (rows, prompt + new)
            mask[:, :width] = padded_prompts(prompts, self.pad, texts.device)["attention_mask"]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            context = getattr(student.config, "max_position_embeddings", None) or texts.shape[1]
            fits = positions[:, :-1] < context  # where the student can read
            inputs = {"input_ids": texts, "attention_mask": mask, "position_ids": positions.clamp(max=context - 1)}
        written = torch.zeros_like(texts[:, 1:], dtype=torch.bool)  # (rows, prompt + new - 1), True at new tokens
        written[:, width - 1 :] = up_to_end(texts[:, width:], ends_of(target.generation_config))
        written &= fits
        drafted, wanted = (  # (tokens, vocab) each
            logits[:, : written.shape[1]].to(written.device)[written] for logits in _logits(student, target, inputs)
        )
        # As in decoding: a token that the student lacks is never drafted, and one that the target lacks neither.
        drafted = padded(drafted, (0, wanted.shape[-1] - drafted.shape[-1]), value=-torch.inf)
        if not sampled:
            sums["compared_greedy"] += len(wanted)
            sums["agreed"] += int(greedy_agreement(drafted, wanted).sum())
            return
        overlap = expected_acceptance(drafted, wanted, self.temperature)  # (tokens,)
        places = written.cumsum(-1)[written]  # (tokens,) the place of each in its text, from 1
        for first in _starts(self.new_tokens):
            here = (first <= places) & (places < 2 * first)
            sums[f"overlap_from_{first}"] += overlap[here].sum().item()
            sums[f"compared_from_{first}"] += int(here.sum())

    def grade(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures from sums.

        Returns:
            acceptance: mean of `csdraft.metrics.measures.expected_acceptance` along sampled texts; like `agreement`,
                nan if nothing could be compared, since all prompts are longer than the student's context;
            acceptance_from_<n>: the same over each text's new tokens n to 2 n - 1, counted from 1;
            agreement: share of equal greedy choices along greedy texts;
            block_efficiency, block_efficiency_sampled: tokens per call of the target, at temperature 0 and at
                `temperature`; with `_low` and `_high` appended, the 95 % bootstrap intervals over prompts;
            prompts: how many there were;
            accepted_<n>: how often the n-th drafted token was kept when those before it were, greedy.
        """
        starts = [first for first in _starts(self.new_tokens) if sums[f"compared_from_{first}"]]
        overlap, compared = (sum(sums[f"{what}_from_{first}"] for first in starts) for what in ("overlap", "compared"))
        figures = {"acceptance": overlap / compared if compared else math.nan}
        figures["agreement"] = sums["agreed"] / sums["compared_greedy"] if sums["compared_greedy"] else math.nan
        for kind, name in (("greedy", "block_efficiency"), ("sampled", "block_efficiency_sampled")):
            measured = [place for place in range(len(self.prompts)) if sums[f"{kind}_rounds_by_{place}"]]
            emitted = [sums[f"{kind}_emitted_by_{place}"] for place in measured]
            rounds = [sums[f"{kind}_rounds_by_{place}"] for place in measured]
            figures[name], figures[f"{name}_low"], figures[f"{name}_high"] = bootstrap_ratio(emitted, rounds)
            figures["prompts"] = len(rounds)
        for first in starts:
            figures[f"acceptance_from_{first}"] = sums[f"overlap_from_{first}"] / sums[f"compared_from_{first}"]
        for depth in range(1, self.depth + 1):
            if tried := sums.get(f"greedy_tried_{depth}"):
                figures[f"accepted_{depth}"] = sums[f"greedy_accepted_{depth}"] / tried
        return figures


def _logits(student: Any, target: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, length, vocab) logits of student and target along texts; a head reads the target's features."""
    there = {key: value.to(target.device) for key, value in inputs.items()}
    head = base_model(student)
    if not isinstance(head, FeatureModel):
        here = {key: value.to(student.device) for key, value in inputs.items()}
        # A token that the student lacks is read as its last one, as in decoding.
        most = student.config.get_text_config(decoder=True).vocab_size - 1
        here |= {key: ids.clamp(max=most) for key, ids in here.items() if key.endswith("input_ids")}
        return student(**here, use_cache=False).logits, target(**there, use_cache=False).logits
    read = target(**there, use_cache=False, output_hidden_states=True)
    states = tapped(target, read.hidden_states, head.taps)
    ids, mask, positions = (inputs[key].to(head.device) for key in ("input_ids", "attention_mask", "position_ids"))  # type: ignore[union-attr]
    return head.along(states, ids, positions, mask), read.logits


def check_figure(name: str, depth: int, new_tokens: int) -> None:
    """Raises ValueError if an evaluation of this depth and length has no such figure; see `Evaluation.grade`."""
    known = ["block_efficiency", "block_efficiency_sampled", "acceptance", "agreement"]
    counted = [f"accepted_{n}" for n in range(1, depth + 1)] + [f"acceptance_from_{n}" for n in _starts(new_tokens)]
    if name not in [*known, *counted]:
        raise ValueError(
            f"metric_for_best_model={name!r} is not a figure of the evaluation; give one of {', '.join(known)}, "
            f"{counted[0]} to {counted[depth - 1]}, or {', '.join(counted[depth:])}"
        )


def up_to_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """(..., length) True up to the first end token of each text, that token included."""
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return ended.cumsum(-1) - ended.int() == 0


def seed_of(tokens: Sequence[int], *keys: int) -> int:
    """A seed that depends on the text and these numbers only."""
    return zlib.crc32(repr((list(tokens), keys)).encode())


def _starts(new_tokens: int) -> list[int]:
    """1, 2, 4, ...: the first places of ranges, each twice as long as the one before."""
    return [1 << power for power in range(new_tokens.bit_length())]
