"""Decodes a batch with all rows in step: processors and criteria see all rows once a step, as in plain `generate`.

Custom code may treat rows differently, look across them, or count its calls, and so may some of transformers' own
processors. If a batch has such code, its rows emit their tokens together: in a round all rows take the same number of
steps, and the first row to leave its draft ends the round for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Context, Verdict, Verifier
from csdraft.decoding.processing import Processing
from csdraft.decoding.scores import Scores, TokenChooser
from csdraft.decoding.stopping import Stopping

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Together", "check_rule", "names_of_custom_code"]


def names_of_custom_code(processing: Processing, stopping: Stopping) -> list[str]:
    """The class names of a batch's processors and criteria that must see all rows at once."""
    criteria = stopping.custom if stopping.pads else [*stopping.custom, *stopping.known]
    return [type(code).__name__ for code in (*processing.stateful, *criteria)]


class Together:
    """Chooses the tokens of all rows step by step.

    Args:
        chooser: the target's processors, criteria and randomness.
        ids: (rows, length) the prompts, with the user's padding.
        config: the call's generation config: the padding token of ended rows, and whether criteria get the scores.

    Attributes:
        ids: (rows, length) the texts so far.
        ended: (rows,) bool, on the host. Without a criterion for end-of-text tokens, an ended row continues until all
            rows have ended, as in plain `generate`.
    """

    def __init__(self, chooser: TokenChooser, ids: Tensor, config: GenerationConfig):
        self.chooser, self.ids = chooser, ids
        self.pad = int(config._pad_token_tensor.view(-1)[0]) if chooser.stopping.pads else None  # type: ignore
        self.ended = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        self._scores: tuple[Tensor, ...] | None = None
        if config.return_dict_in_generate and config.output_scores:
            self._scores = ()

    def drafts(self, contexts: Sequence[Context], drafts: Sequence[Draft]) -> list[Draft]:
        """The same drafts, but padding for ended rows, so that they do not end the round early for the others."""
        longest = max(len(draft) and max(draft.depths) + 1 for draft in drafts)
        filler = Draft() if self.pad is None else Draft.chain([self.pad] * longest)
        return [
            filler if self.pad is not None and self.ended[context.row] else draft
            for context, draft in zip(contexts, drafts, strict=True)
        ]

    def verify(self, drafts: Sequence[Draft], views: Sequence[Scores]) -> list[Verdict]:
        """One verdict for each row, in order; every row emits the same number of tokens."""
        nodes, paths = [ROOT] * len(drafts), [[] for _ in drafts]
        below: list[int | None]
        while True:
            tokens = self._step(views, nodes)
            below = [draft.child(node, token) for draft, node, token in zip(drafts, nodes, tokens, strict=True)]
            done = bool(self.ended.all())
            if done or None in below:
                return [Verdict(path, token, done) for path, token in zip(paths, tokens, strict=True)]
            nodes = [node for node in below if node is not None]
            for path, node in zip(paths, nodes, strict=True):
                path.append(node)

    def _step(self, views: Sequence[Scores], nodes: Sequence[int]) -> list[int]:
        """(rows,) the token after each row's node; also updates `ids` and applies the criteria."""
        logits = torch.stack([view.raw(node) for view, node in zip(views, nodes, strict=True)])  # (rows, vocab)
        scores = logits.to(torch.float32, copy=True)  # (rows, vocab)
        for processor in self.chooser.processing.processors:
            scores = processor(self.ids, scores)
        tokens = []
        for view, node, row in zip(views, nodes, scores, strict=True):
            view.note(node, row)
            ended = self.pad is not None and bool(self.ended[view.row])
            tokens.append(self.pad if ended else self.chooser.choose(view.row, view.position(node), row))
        self.ids = torch.cat([self.ids, self.ids.new_tensor(tokens)[:, None]], 1)  # (rows, length + 1)
        if self._scores is not None:
            self._scores += (scores,)
        self.ended |= self.chooser.stopping.ended(self.ids, self._scores)
        return tokens  # type: ignore[return-value]


def check_rule(verifier: Verifier, greedy: bool, custom: Sequence[str]) -> None:
    """Raises ValueError if a rule may emit tokens that the target did not choose: it cannot decode rows in step."""
    if verifier.lossless and (greedy or verifier.draws == "coupled"):
        return
    raise ValueError(
        f"verifier {type(verifier).__name__} handles the rows of a batch one after another, but "
        f"{', '.join(custom)} may treat rows differently and must see all of them at once; use verifier='match', or "
        "generate row by row"
    )
