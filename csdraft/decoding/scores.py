"""Turns the logits of one forward into what a verifier asks for: choices, distributions, and ends of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from csdraft.decoding.awaited import Choices
from csdraft.decoding.draft import ROOT
from csdraft.decoding.interfaces import Request
from csdraft.decoding.processing import Before, Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text

__all__ = ["Scores", "TokenChooser", "argmax", "entropy"]


NAN = (
    "the logits are nan. Either the model's own are (check its dtype: fp16 overflows where bf16 does not), or the "
    "logits processors forbid every token and renormalize_logits divides by 0"
)
NOTHING_LEFT = "no token can be drawn: the logits processors forbid every one of them; let them allow some"
MAX_SCORE_BYTES = 1 << 28
"""The most bytes for the processed float32 scores of one step; the processors' own copies are not counted."""


def argmax(logits: Tensor, along: Sequence[Choices] = (), drawn: bool = False) -> list[int]:
    """(n,) indices of the first maximum of (n, vocab) logits, in one copy to the host; on a CPU with NumPy (faster).

    Logits are compared in float32, as in plain `generate`: in float64 others may be the first of equals.

    Args:
        along: choices of earlier steps that the same copy also brings to the host.
        drawn: whether a row that is -inf everywhere is an error, since nothing can be drawn from it.

    Raises:
        ValueError: a row holds nan, or nothing can be drawn from it.
    """
    values = logits.float()
    if values.device.type == "cpu" and not along:
        table = values.numpy()
        if len(table) == 1:  # a short cut for every step of a drafter
            index = int(table[0].argmax())
            _check_best((table[0, index],), drawn)
            return [index]
        indices = table.argmax(-1).tolist()
        best = [table[row, index] for row, index in enumerate(indices)]
    else:
        top = values.max(-1)
        packed = [top.indices.double(), top.values.double(), *(choices.table.flatten() for choices in along)]
        numbers = iter(torch.cat([part.to(values.device) for part in packed]).tolist())
        indices = [int(index) for index in islice(numbers, len(values))]
        best = list(islice(numbers, len(values)))
        for choices in along:
            choices.receive(list(islice(numbers, choices.table.numel())))
    _check_best(best, drawn)
    return indices


def _check_best(best: Iterable[float], drawn: bool) -> None:
    for value in best:
        if value != value or (drawn and value == -math.inf):
            raise ValueError(NAN if value != value else NOTHING_LEFT)


def entropy(probs: Tensor) -> float:
    """Entropy of (vocab,) probabilities, in nats."""
    return float(torch.special.entr(probs).sum())


class TokenChooser:
    """How one level of a cascade turns logits into tokens: processors, noise, and where its texts end.

    Args:
        processing: the level's logits processors.
        stopping: the level's stopping rules.
        sampler: the call's randomness.
        drawn: whether it is an error if no token can be drawn; drafters may choose any token there.
    """

    def __init__(self, processing: Processing, stopping: Stopping, sampler: Sampler, drawn: bool = False):
        self.processing, self.stopping, self.sampler, self.drawn = processing, stopping, sampler, drawn

    def scaled(self, logits: Tensor) -> Tensor:
        """(..., vocab) float32 logits divided by the call's temperature (1 when greedy)."""
        return logits.float() / (1.0 if self.sampler.greedy else self.processing.temperature)

    def soft(self, logits: Tensor) -> Tensor:
        """(..., vocab) softmax of the logits at the call's temperature (1 when greedy)."""
        return self.scaled(logits).softmax(-1)

    def processed(self, row: int, text: Text, path: Sequence[int], logits: Tensor) -> Tensor:
        """(vocab,) float32 processed scores of (vocab,) raw logits after `text` and `path`."""
        if self.processing.text_blind:
            return self.processing.all_at_once(logits[None])[0]
        if self.processing.at_once and not self.processing.reads_tokens:
            return self.processing.all_at_once(logits[None], Before([len(text) + text.padding + len(path)]))[0]
        return self.processing.one(row, text.padded(path), logits)

    def choose_all(
        self, requests: Sequence[Request], views: Sequence[Tensor], along: Sequence[Choices] = ()
    ) -> list[list[int]]:
        """The choices after the nodes of each request; only if `Processing.at_once`, and greedy or coupled.

        One copy to the host; if the scores would take more than MAX_SCORE_BYTES, several copies of fewer rows.

        Args:
            views: for each request, (nodes, vocab) raw logits after its nodes.
            along: choices of earlier steps that the one copy also brings to the host.
        """
        most = max(MAX_SCORE_BYTES // (4 * views[0].shape[-1]), 1)
        if sum(map(len, views)) > most:
            found: list[list[int]] = [[] for _ in requests]
            for request, view, tokens in zip(requests, views, found, strict=True):
                for part in (slice(first, first + most) for first in range(0, len(view), most)):
                    tokens += self._best([replace(request, after=request.after[part])], view[part])
            return found
        chosen = iter(self._best(requests, torch.cat(list(views)) if len(views) > 1 else views[0], along))
        return [list(islice(chosen, len(view))) for view in views]

    def _best(self, requests: Sequence[Request], logits: Tensor, along: Sequence[Choices] = ()) -> list[int]:
        """The choices from the (n, vocab) raw logits after the n nodes of some requests."""
        scores = self.processing.all_at_once(logits, self.processing.before(requests, logits))
        if not self.sampler.greedy:
            at = [(r.row, len(r.text) + r.draft.depth(node)) for r in requests for node in r.after]
            scores = scores.float() - self.sampler.noise(at, scores.device)
        return argmax(scores, along, self.drawn)

    def choose(self, row: int, position: int, scores: Tensor) -> int:
        """The token at `position` from (vocab,) processed scores: the argmax, with the position's noise if any."""
        if self.sampler.greedy:
            return argmax(scores[None])[0]
        noise = self.sampler.log_exponential(row, position, scores.device)  # (vocab,)
        return argmax((scores.float() - noise)[None], drawn=self.drawn)[0]


class Scores:
    """What one forward says about one row; valid until its session's next forward.

    Args:
        chooser: turns the level's logits into tokens.
        request: what was scored.
        logits: (scored, vocab) raw logits after the nodes of the request.
        choices: (scored,) the token after each, if all choices of the batch were made at once.
    """

    def __init__(self, chooser: TokenChooser, request: Request, logits: Tensor, choices: Sequence[int] | None = None):
        self.chooser, self.request, self.logits, self.choices = chooser, request, logits, choices
        self.row, self.text, self.draft, after = request.row, request.text, request.draft, request.after
        self._first = after[0] if isinstance(after, range) else None
        self._row_of = {} if isinstance(after, range) else {node: i for i, node in enumerate(after)}
        self._soft: dict[tuple[int, int], float] | None = None  # by node and token; None: not on the host yet
        self._processed: dict[int, Tensor] = {}
        self._chosen: dict[int, int] = {}

    def _index(self, node: int) -> int:
        return self._row_of[node] if self._first is None else node - self._first

    def raw(self, node: int) -> Tensor:
        """(vocab,) raw logits after `node`, in the model's dtype."""
        return self.logits[self._index(node)]

    def path(self, node: int) -> list[int]:
        """Token ids from the text's end to `node`."""
        return [self.draft.tokens[i] for i in self.draft.path(node)]

    def position(self, node: int) -> int:
        return len(self.text) + self.draft.depth(node)

    def processed(self, node: int) -> Tensor:
        """(vocab,) scores after `node`, after the level's processors, which run only once."""
        if node not in self._processed:
            path = () if self.chooser.processing.text_blind else self.path(node)
            self._processed[node] = self.chooser.processed(self.row, self.text, path, self.raw(node))
        return self._processed[node]

    def note(self, node: int, scores: Tensor) -> None:
        """Stores (vocab,) processed scores after `node` that were computed elsewhere."""
        self._processed[node] = scores

    def choice(self, node: int) -> int:
        if self.choices is not None:
            return self.choices[self._index(node)]
        if node not in self._chosen:
            self._chosen[node] = self.chooser.choose(self.row, self.position(node), self.processed(node))
        return self._chosen[node]

    def probs(self, node: int) -> Tensor:
        if self.chooser.sampler.greedy:
            one_hot = torch.zeros(self.logits.shape[-1], device=self.logits.device)  # (vocab,)
            one_hot[self.choice(node)] = 1.0
            return one_hot
        return self.processed(node).float().softmax(-1)

    def top(self, k: int) -> Tensor:
        values = self.logits.float() if self.logits.device.type == "cpu" else self.logits  # (scored, vocab)
        if k == 1 and values.device.type == "cpu":  # as in `argmax`
            return torch.from_numpy(values.numpy().argmax(-1))[:, None]
        return values.topk(k, -1).indices.cpu()

    def soft(self, node: int, token: int) -> float:
        if self._soft is None:
            self._soft = {} if self.logits.device.type == "cpu" else self._soft_of_all()
        if (node, token) not in self._soft:
            self._soft[node, token] = float(self.chooser.scaled(self.raw(node)).log_softmax(-1)[token].exp())
        return self._soft[node, token]

    def _soft_of_all(self) -> dict[tuple[int, int], float]:
        """`soft` of every drafted token and every choice, in one copy from the device."""
        scored, drafted = self.request.after, zip(self.draft.parents, self.draft.tokens, strict=True)
        asked = [*(pair for pair in drafted if pair[0] in scored), *zip(scored, self.choices or (), strict=False)]
        if not asked:
            return {}
        places = [(self._index(node), token) for node, token in asked]
        at = torch.tensor(places, device=self.logits.device)  # (asked, 2)
        log_probs = self.chooser.scaled(self.logits).log_softmax(-1)  # (scored, vocab)
        return dict(zip(asked, log_probs[at[:, 0], at[:, 1]].exp().tolist(), strict=True))

    def entropy(self, node: int) -> float:
        return entropy(self.chooser.soft(self.raw(node)))

    def ends(self, node: int, token: int) -> bool:
        stopping = self.chooser.stopping
        if not stopping.reads_text:
            return stopping.is_last(self.text, self.draft.depth(node), token)
        chosen_from = lambda: [self.processed(above) for above in (ROOT, *self.draft.path(node))]  # noqa: E731
        return stopping.ends(self.row, self.text, self.path(node), token, chosen_from)
