"""A session of a drafting head: a small model that reads hidden states of the target beside the tokens.

How it works. The head's entry i is the pair (token i + 1, feature of token i), from which it predicts token i + 2. So
it reads a view of the text without its first token, and slot i of its cache holds entry i. Of the committed text the
feature is the target's, taken from the target's own session, where it lies beside keys and values. Of a drafted token
the target has read nothing yet: its feature is what the head itself computed at the token before, kept as a feature
layer of the head's cache. Entries that were read for a draft are therefore never reused for the text, and tokens of a
draft are read level by level, since each needs the output at its parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csdraft.decoding.draft import Draft
from csdraft.decoding.graphs import Mode
from csdraft.decoding.inputs import Inputs, Plan
from csdraft.decoding.interfaces import Context, Request
from csdraft.decoding.ledger import ModelUse
from csdraft.decoding.plans import Reading
from csdraft.decoding.readers import ReadingOptions
from csdraft.decoding.session import Session
from csdraft.decoding.text import Text

__all__ = ["OWN", "FeatureModel", "FeatureSession", "taps_of"]

OWN = 0
"""The tap of a head's own output among its hidden states."""


class FeatureModel:
    """What a model must have that is read by a `FeatureSession`: a mixin of drafting heads.

    Its forward takes `features`, (rows, queries, width), beside `input_ids`, and returns its own output, of the same
    width, as `hidden_states[0]`: the feature of the next token.

    Attributes:
        deepest: how many tokens it can draft after a text; None: any number.
        before: how many tokens before its own a feature is made of.
    """

    deepest: int | None = None
    before: int = 0

    @property
    def feature_width(self) -> int:
        """Width of features, and of its own output."""
        config: Any = self.config  # type: ignore[attr-defined]
        return config.hidden_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads; see `Drafter.taps`."""
        raise NotImplementedError

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., tokens, width) features from the target's hidden states, (..., tokens, target's width) by tap.

        The first `before` features may be wrong if the states do not begin with the text: they are not used.
        """
        raise NotImplementedError

    def along(self, states: Mapping[int, Tensor], input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        """(rows, length, vocab) logits of each next token along texts that the target has read, without a draft.

        Args:
            states: (rows, length, target's width) the target's hidden states by tap.
            input_ids, position_ids: (rows, length) the texts.
            mask: (rows, length) 1 where a token counts; the others are on the left.

        Returns:
            At i logits of token i + 1. Those of the token after the first say nothing: a head begins at the second.
        """
        raise NotImplementedError


def taps_of(model: object) -> frozenset[int]:
    """The hidden states of the target that a model reads; none unless it is a head."""
    return frozenset(model.taps) if isinstance(model, FeatureModel) else frozenset()


class View:
    """A text without its first token, as far as a `Session` looks at texts."""

    def __init__(self, text: Text):
        self.text, self.tokens, self.padding = text, text.tokens[1:], text.padding

    def __len__(self) -> int:
        return len(self.tokens)

    def follow(self) -> None:
        """Takes in what the text has grown by."""
        self.tokens += self.text.tokens[len(self.tokens) + 1 :]


class FeatureSession(Session):
    """A drafting head reading a batch of texts; see the file's docstring.

    Args:
        model: a `FeatureModel`.
        target: the session of the target, which keeps the features that the model reads.
        others: as of `Session`, without `texts` and `reading`.
        graphs: how its forwards of fixed shape run.
    """

    def __init__(self, model: Any, target: Session, *others: Any, graphs: Mode = False, use: ModelUse | None = None):
        graphs = graphs and "auto"  # recorded, never compiled: half a minute for a layer
        super().__init__(model, *others, reading=ReadingOptions(False, graphs, frozenset({OWN})), use=use)
        self.target = target
        self.reader.features = self._features
        self._views: dict[int, View] = {}
        self._given: Tensor | None = None

    def close(self) -> None:
        self.reader.features = None  # the reader may outlive this session
        super().close()

    # The view.

    def _view(self, row: int, text: Text) -> Any:
        view = self._views.get(row)
        if view is None or view.text is not text:
            view = self._views[row] = View(text)
        view.follow()
        return view

    def unread(self, row: int, text: Text) -> int:
        return super().unread(row, self._view(row, text))

    def left(self, context: Context) -> int:
        """None in the first round, in which the target reads the prompt: before it there are no features."""
        if len(context.text) <= max(context.text.prompt_length, 1):
            return 0
        left, deepest = super().left(context), self.model.deepest
        return left if deepest is None else min(left, deepest - len(context.path))  # type: ignore[operator]

    def plan(self, request: Request) -> tuple[Plan, list[int]]:
        if len(request.text) < 2:
            raise ValueError("a drafting head needs a text of two tokens: the first is known by its feature alone")
        return super().plan(replace(request, text=self._view(request.row, request.text)))

    def _keep(self, row: int, reading: Reading, draft: Draft) -> set[int]:
        """Gives up the cached draft: its entries were read with the head's own features."""
        self.use.rolled_back += len(reading.draft)
        reading.draft = Draft()
        return set()

    def _restart(self, reading: Reading, text: Any) -> None:
        """The last entry of a text is read again: only there must a head keep all that drafting starts from."""
        super()._restart(reading, text)
        if 0 < reading.read == len(text):
            self.use.rolled_back += 1
            reading.read -= 1

    # Reading.

    def _read(self, plans: dict[int, Plan], keep: int, reach: int = 0) -> Tensor:
        """Text first, then a draft level by level: one forward each, of all rows."""
        levels = {row: _levels(plan) for row, plan in plans.items()}
        stages = sorted(set().union(*levels.values()))
        if len(stages) == 1:
            return self._stage(plans, keep)
        logits: Tensor | None = None
        for stage in stages:
            chosen = {row: own[stage] for row, own in levels.items() if stage in own}
            part = {row: plans[row].only(queries) for row, queries in chosen.items()}
            width = max(map(len, chosen.values()))
            found = self._stage(part, width)
            if logits is None:
                logits = found.new_zeros(len(self._batch), keep, self.vocab)
            for row, queries in chosen.items():
                behind = keep - len(plans[row].tokens)  # a row is aligned at its end
                wanted = [i for i, query in enumerate(queries) if query + behind >= 0]
                if wanted:
                    places = [queries[i] + behind for i in wanted]
                    logits[self.place(row), places] = found[self.place(row), width - len(queries) :][wanted]
        assert logits is not None
        return logits

    def _stage(self, plans: dict[int, Plan], keep: int) -> Tensor:
        """(batch, keep, vocab) logits of queries of the text alone, or of one level of the draft, in each row."""
        queries = self.reader.queries(max(len(plan.tokens) for plan in plans.values()))
        shape: Any = len(self._batch), queries, self.model.feature_width
        self._given = torch.zeros(shape, dtype=self.reader.dtype, device=self.reader.device)
        for row, plan in plans.items():
            self._given[self.place(row), -len(plan.tokens) :] = self._features_of(row, plan)
        try:
            return super()._read(plans, keep)
        finally:
            self._given = None

    def _features_of(self, row: int, plan: Plan) -> Tensor:
        """(queries, width) what stands beside each token of a plan."""
        if plan.positions[0] < plan.length:
            return self._of_target(row, plan.slots[0], plan.slots[-1] + 1)
        own = self.reader.cache.features[OWN][self.place(row)]  # (capacity, width)
        return own[torch.tensor(_parents(plan), device=own.device)]

    def _of_target(self, row: int, start: int, stop: int) -> Tensor:
        """(stop - start, width) features of tokens that the target has read."""
        states = self.target.features(row, self._views[row].text, stop)
        model: Any = self.model
        first = max(start - model.before, 0)
        return model.fuse({tap: states[tap][first:stop] for tap in model.taps})[start - first :]

    def _features(self, inputs: Inputs) -> Tensor:
        """(batch, queries, width) what the forward reads beside its tokens; in a chain, the output just before."""
        if self._given is not None:
            return self._given
        own = self.reader.cache.features[OWN][: inputs.slots.shape[0]]  # (batch, capacity, width)
        before = (inputs.slots - 1).clamp(min=0)[..., None]  # (batch, 1, 1); rows that are idle may stand in slot 0
        return own.gather(1, before.expand(-1, -1, own.shape[-1]))


def _levels(plan: Plan) -> dict[int, list[int]]:
    """By level, the queries of a plan: 0 for the text, then how deep in the draft."""
    levels: dict[int, list[int]] = {}
    for query, position in enumerate(plan.positions):
        levels.setdefault(max(position - plan.length + 1, 0), []).append(query)
    return levels


def _parents(plan: Plan) -> Sequence[int]:
    """(queries,) the slot of the token before each query, on its branch."""
    if plan.paths is None:
        return [slot - 1 for slot in plan.slots]
    return [path[-2] if len(path) > 1 else plan.length - 1 for path in plan.paths]
