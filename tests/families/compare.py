"""One class: plain `generate` beside drafted decoding, for every attention it has, batches and kinds of draft.

The result of a class is one word: `exact` (texts and logits equal in every case), `refused` (csdraft says why not),
`different`, `error`, or `skipped` (there is no plain text to compare with).
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.schedules.fixed import Fixed
from csdraft.trees.best_first import BestFirst
from tests import tiny
from tests.families.shrink import config_of, loud_model

__all__ = ["examine"]

NEW = 32
LENGTHS = (20, 5, 13)
DRAFTERS = {1: ("chain", "tree", "model", "cascade"), 3: ("chain", "tree", "cascade", "max_gram", "model tree")}
"""Rows of the batch -> what is drafted with."""
TRIES = [(0, 1.0), (1, 1.0), (0, 0.3), (1, 3.0)]
"""Seed of the weights, and factor on the output layer."""
VARIED = {"no_repeat_ngram_size": 2}
"""What makes a text of few tokens a varied one, where no seed does."""
NEAR = 2e-4
"""Two logits whose distance is this part of the largest one may change places by rounding."""
TOLERANCE = 2e-4
"""How far drafted logits may be from plain ones, as part of the largest one."""
ROUNDING = 1e-6
"""Weights moved by this part of themselves move logits about as far as another order of the same sums does."""


@dataclass
class Plain:
    """What plain `generate` wrote: the texts, and the logits of each step."""

    inputs: dict[str, Tensor]
    options: dict[str, Any]
    sequences: Tensor
    logits: list[Tensor]  # per step (rows, vocab), as the model gave them
    scores: list[Tensor]  # per step (rows, vocab), as the choice was made

    @property
    def new(self) -> Tensor:
        """(rows, steps) the generated tokens."""
        return self.sequences[:, self.sequences.shape[1] - len(self.logits) :]

    def margins(self) -> Tensor:
        """(rows, steps) distance of the two best scores, as part of the largest one."""
        stacked = torch.stack(self.scores, 1).float()
        best = stacked.topk(2, -1).values
        return (best[..., 0] - best[..., 1]) / stacked.masked_fill(stacked.isinf(), 0).abs().amax(-1)


def generate(model: nn.Module, inputs: dict[str, Tensor], options: dict[str, Any], **drafting: Any) -> Plain:
    """Greedy, with logits."""
    wanted = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    wanted |= {"output_logits": True, "output_scores": True}
    with torch.no_grad():
        output = model.generate(**inputs, **(wanted | options), **drafting)
    return Plain(inputs, options, output.sequences, list(output.logits), list(output.scores))


def examine(model_class: Any, config_class: type, **changes: Any) -> dict[str, Any]:
    """All cases of one class; `changes` go to its config."""
    found: dict[str, Any] = {"cases": {}, "notes": []}
    try:
        config = config_of(model_class, config_class, **changes)
        loud_model(model_class, config, "eager", *TRIES[0])
    except Exception as error:  # whatever a class cannot be built for is its row in the table
        return {"result": "skipped", "reason": f"cannot be built small: {_said(error)}", "where": _where(error)}
    for attention in ["sdpa", "eager"] if model_class._supports_sdpa else ["eager"]:
        notes: list[str] = []
        try:
            refused = refusals(loud_model(model_class, config, attention, *TRIES[0]))
            if refused:
                found["cases"] |= {f"{attention}, {name}": case for name, case in refused.items()}
                continue
            model, options = chosen_model(model_class, config, attention, notes)
        except Exception as error:  # as above
            reason = f"plain generate fails: {_said(error)}"
            found["cases"][attention] = {"result": "skipped", "reason": reason, "where": _where(error)}
            continue
        drafter = tiny.noisy(model)
        for rows, kinds in DRAFTERS.items():
            plain = plain_text(model, rows, options, notes)
            for kind in kinds:
                case = one_case(model, drafter, plain, kind)
                found["cases"][f"{attention}, {rows} row{'s' * (rows > 1)}, {kind}"] = case
        found["notes"] += [f"{attention}: {note}" for note in dict.fromkeys(notes)]
    return found | verdict(found["cases"])


def refusals(model: nn.Module) -> dict[str, dict]:
    """A chain for one row and for several, if both are refused: nothing else need be tried."""
    cases = {}
    for rows in DRAFTERS:
        plain = generate(model, inputs_of(model.config, rows), {})
        cases[f"{rows} row{'s' * (rows > 1)}, chain"] = one_case(model, model, plain, "chain")
    return cases if all(case["result"] == "refused" for case in cases.values()) else {}


def inputs_of(config: Any, rows: int) -> dict[str, Tensor]:
    """One row, or a ragged batch padded on the side that this kind of model pads."""
    if rows == 1:
        return tiny.prompt(LENGTHS[0])
    return tiny.ragged_batch(LENGTHS[:rows], side="right" if config.is_encoder_decoder else "left")


def chosen_model(model_class: Any, config: Any, attention: str, notes: list[str]) -> tuple[nn.Module, dict]:
    """The first seed whose plain texts are varied, without near ties, and depend on what was read long ago.

    Returns: the model, and the options its texts are to be made with.
    """
    complaint = ""
    for options in ({}, VARIED):
        for seed, sharp in TRIES:
            model = loud_model(model_class, config, attention, seed, sharp)
            complaint = dull(model, generate(model, inputs_of(config, 3), options))
            if not complaint:
                return model, options
    notes.append(complaint)
    return model, options


def dull(model: nn.Module, plain: Plain) -> str:
    """Why texts prove little; empty if they do not."""
    new = plain.new
    if min(len(set(row.tolist())) for row in new) < 6:
        return "greedy text repeats a few tokens"
    if float(plain.margins().min()) < NEAR:
        return "plain text has near ties"
    changed = {key: value.clone() for key, value in plain.inputs.items()}
    changed["input_ids"][:, -4] = 3 + (changed["input_ids"][:, -4] - 2) % (tiny.VOCAB - 3)
    if generate(model, changed, plain.options).new.tolist() == new.tolist():
        return "the text does not depend on the prompt"
    return ""


def plain_text(model: nn.Module, rows: int, options: dict[str, Any], notes: list[str]) -> Plain:
    """What is to be reproduced. In a batch one row ends early, so that its place is taken by the others."""
    inputs = inputs_of(model.config, rows)
    free = generate(model, inputs, options)
    if free.sequences.tolist() != generate(model, inputs, options).sequences.tolist():
        notes.append("plain generate does not repeat itself")
    if rows == 1:
        return free
    if not model.config.is_encoder_decoder:
        alone = generate(model, {key: value[1:2, -LENGTHS[1] :] for key, value in inputs.items()}, options)
        if alone.new[0].tolist() != free.new[1].tolist():
            notes.append("plain generate writes another text for a padded row than for that row alone")
    return generate(model, inputs, options | {"eos_token_id": int(free.new[1, 14])})


def drafter_of(kind: str, noisy: nn.Module, plain: Plain, encoder_decoder: bool) -> Any:
    """A new drafter of this kind."""
    if kind in ("chain", "tree"):
        texts = [row.tolist() for row in plain.sequences]
        if not encoder_decoder:
            pads = (plain.inputs["attention_mask"] == 0).sum(1).tolist()
            texts = [text[pad:] for text, pad in zip(texts, pads, strict=True)]
        return tiny.Scripted(texts, wrong=0.35, branches=1 if kind == "chain" else 3)
    if kind == "model":
        return ModelDrafter(noisy, depth=4)
    if kind == "model tree":
        return ModelDrafter(noisy, depth=3, tree=BestFirst(3, 12))
    if kind == "cascade":
        return CascadeDrafter([noisy, MaxGram()], k_matrix=[[3, 3], [0, 2]])
    return MaxGram()


def one_case(model: nn.Module, noisy: nn.Module, plain: Plain, kind: str) -> dict[str, Any]:
    """Drafted decoding beside the plain text."""
    assistant = drafter_of(kind, noisy, plain, model.config.is_encoder_decoder)
    try:
        ours = generate(model, plain.inputs, plain.options, assistant=assistant, schedule=Fixed(), strict=True)
    except ValueError as error:
        if "/csdraft/" in _frame(error).filename:
            return {"result": "refused", "reason": str(error)}
        return {"result": "error", "reason": _said(error), "where": _where(error)}
    except Exception as error:  # a class that breaks is its row in the table
        return {"result": "error", "reason": _said(error), "where": _where(error)}
    found = difference(ours, plain, TOLERANCE, NEAR)
    if found["result"] == "different" and found["off"] < 0.1:
        noise = 30 * rounding(model, plain)
        found = difference(ours, plain, max(TOLERANCE, noise), max(NEAR, noise)) | {"noise": noise}
    return found


def rounding(model: nn.Module, plain: Plain) -> float:
    """How far rounding moves the logits of this text, as part of the largest one."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + ROUNDING * torch.randn_like(parameter))
    again = generate(moved, plain.inputs, plain.options)
    worst = 0.0
    for step, (a, b) in enumerate(zip(again.logits, plain.logits, strict=False)):
        worst = max(worst, _off(a[:1], b[:1]))
        if again.new[0, step] != plain.new[0, step]:
            break
    return worst


def _off(ours: Tensor, wanted: Tensor) -> float:
    """Largest distance of two rows of logits, as part of the largest logit."""
    finite = torch.isfinite(wanted)
    return float((ours - wanted)[finite].abs().max() / wanted[finite].abs().max())


def difference(ours: Plain, plain: Plain, tolerance: float, near: float) -> dict[str, Any]:
    """Where texts or logits part, if they do."""
    worst, margins = 0.0, plain.margins()
    for row, (mine, theirs) in enumerate(zip(ours.new.tolist(), plain.new.tolist(), strict=True)):
        for step, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            worst = max(worst, _off(ours.logits[step][row].float(), plain.logits[step][row].float()))
            if a != b:
                margin = float(margins[row, step])
                reason = f"row {row} differs at token {step}; logits off by {worst:.1e}, margin {margin:.1e}"
                return {"result": "tie" if margin < near else "different", "reason": reason, "off": worst}
            if b == plain.options.get("eos_token_id"):
                break
        if len(mine) != len(theirs):
            reason = f"row {row} has {len(mine)} tokens, plain {len(theirs)}"
            return {"result": "different", "reason": reason, "off": 1.0}
    if worst > tolerance:
        return {"result": "different", "reason": f"same text, but logits off by {worst:.1e}", "off": worst}
    return {"result": "exact", "off": worst}


def verdict(cases: dict[str, dict]) -> dict[str, Any]:
    """The one word for a class, from its cases; the worst counts."""
    done = {case["result"] for case in cases.values()} - {"skipped"}
    for word in ("error", "different", "tie", "refused") if done else ("skipped",):
        reasons = dict.fromkeys(case["reason"] for case in cases.values() if case["result"] == word)
        if reasons:
            partly = {case["result"] for case in cases.values()} - {word, "skipped"}
            return {"result": word, "reason": " | ".join(list(reasons)[:3]), "partly": sorted(partly)}
    return {"result": "exact", "reason": ""}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:300]


def _frame(error: BaseException) -> traceback.FrameSummary:
    return traceback.extract_tb(error.__traceback__)[-1]


def _where(error: BaseException) -> str:
    """The last frames in transformers' modelling files, and the very last."""
    frames = traceback.extract_tb(error.__traceback__)
    kept = [f for f in frames if "modeling_" in f.filename or "configuration_" in f.filename][-2:]
    kept.append(frames[-1])
    return " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in reversed(kept))
