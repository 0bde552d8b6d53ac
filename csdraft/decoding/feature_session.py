"""The session of a drafting head: a small model that reads the target's hidden states beside the tokens.

How it works. The head's entry i is the pair (token i + 1, feature of token i), from which it predicts token i + 2. So
it reads a view of the text without its first token, and slot i of its cache holds entry i. For committed text the
feature comes from the target's session, which stores it beside keys and values. The target has not read drafted
tokens yet: for them the feature is the head's own output at the token before, stored as a feature layer of the head's
cache. So entries of a draft are never reused for the text, and a draft is read level by level, since each token needs
the output at its parent.
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
    """What a model must have to be read by a `FeatureSession`: a mixin for drafting heads.

    Its forward takes `features`, (rows, queries, width), beside `input_ids`, and returns its own output, of the same
    width, as `hidden_states[0]`: the feature of the next token.

    Attributes:
        deepest: the most tokens that it can draft after a text; None: no limit.
        before: how many earlier tokens a feature also depends on.
    """

    deepest: int | None = None
    before: int = 0

    @property
    def feature_width(self) -> int:
        """Width of its features and of its own output."""
        config: Any = self.config  # type: ignore[attr-defined]
        return config.hidden_size

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's hidden states that it reads; see `Drafter.taps`."""
        raise NotImplementedError

    def fuse(self, states: Mapping[int, Tensor]) -> Tensor:
        """(..., tokens, width) features from the target's hidden states, (..., tokens, target's width) by tap.

        If the states do not begin with the text, the first `before` features may be wrong; they are not used.
        """
        raise NotImplementedError

    def resumed(self, features: Tensor, before: Tensor) -> Tensor:
        """(queries, width) features of tokens of the text, if it also reads its own output at the token before.

        Args:
            features: (queries, width) from `fuse`.
            before: (width,) its own output at the token before the first of them, which was read earlier.
        """
        return features

    def along(self, states: Mapping[int, Tensor], input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        """(rows, length, vocab) logits of every next token of texts that the target has read, without drafting.

        Args:
            states: (rows, length, target's width) the target's hidden states by tap.
            input_ids, position_ids: (rows, length) the texts.
            mask: (rows, length) 1 where a token counts; padding is on the left.

        Returns:
            Entry i: the logits of token i + 1. Entry 0 is meaningless, since a head begins at the second token.
        """
        raise NotImplementedError


def taps_of(model: object) -> frozenset[int]:
    """The target's hidden states that a model reads; empty unless it is a head."""
    return frozenset(model.taps) if isinstance(model, FeatureModel) else frozenset()


class View:
    """A text without its first token: those parts of `Text` that a `Session` uses."""

    def __init__(self, text: Text):
        self.text, self.tokens, self.padding = text, text.tokens[1:], text.padding

    def __len__(self) -> int:
        return len(self.tokens)

    def follow(self) -> None:
        """Appends the tokens that the text got since last time."""
        self.tokens += self.text.tokens[len(self.tokens) + 1 :]


class FeatureSession(Session):
    """A drafting head that reads a batch of texts; see the module.

    Args:
        model: a `FeatureModel`.
        target: the target's session, which stores the features that the model reads.
        others: the other arguments of `Session`, without `texts` and `reading`.
        graphs: how forwards of fixed shape run.
    """

    def __init__(self, model: Any, target: Session, *others: Any, graphs: Mode = False, use: ModelUse | None = None):
        graphs = graphs and "auto"  # recorded, but never compiled: that takes half a minute for one layer
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
        """0 in the first round: there are no features before the target has read the prompt."""
        if len(context.text) <= max(context.text.prompt_length, 1):
            return 0
        left, deepest = super().left(context), self.model.deepest
        return left if deepest is None else min(left, deepest - len(context.path))  # type: ignore[operator]

    def plan(self, request: Request) -> tuple[Plan, list[int]]:
        if len(request.text) < 2:
            raise ValueError("a drafting head needs a text of two tokens or more: it never reads the first")
        return super().plan(replace(request, text=self._view(request.row, request.text)))

    def _keep(self, row: int, reading: Reading, draft: Draft) -> set[int]:
        """Drops the cached draft, whose entries were read with the head's own features."""
        self.use.rolled_back += len(reading.draft)
        reading.draft = Draft()
        return set()

    def _restart(self, reading: Reading, text: Any) -> None:
        """Also reads the last entry of the text again, since drafting starts from it."""
        super()._restart(reading, text)
        if 0 < reading.read == len(text):
            self.use.rolled_back += 1
            reading.read -= 1

    # Reading.

    def _read(self, plans: dict[int, Plan], keep: int, reach: int = 0) -> Tensor:
        """Reads the text, then the draft level by level; one forward of all rows for each."""
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
                behind = keep - len(plans[row].tokens)  # rows end together
                wanted = [i for i, query in enumerate(queries) if query + behind >= 0]
                if wanted:
                    places = [queries[i] + behind for i in wanted]
                    logits[self.place(row), places] = found[self.place(row), width - len(queries) :][wanted]
        assert logits is not None
        return logits

    def _stage(self, plans: dict[int, Plan], keep: int) -> Tensor:
        """(batch, keep, vocab) logits of queries that are all of the text, or all of one level of the draft."""
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
        """(queries, width) the feature beside each token of a plan."""
        start = plan.slots[0]
        if plan.positions[0] < plan.length:
            features = self._of_target(row, start, plan.slots[-1] + 1)
            if not start:
                return features
            model: Any = self.model
            return model.resumed(features, self.reader.cache.features[OWN][self.place(row), start - 1])
        own = self.reader.cache.features[OWN][self.place(row)]  # (capacity, width)
        return own[torch.tensor(_parents(plan), device=own.device)]

    def _of_target(self, row: int, start: int, stop: int) -> Tensor:
        """(stop - start, width) features of tokens that the target has read."""
        states = self.target.features(row, self._views[row].text, stop)
        model: Any = self.model
        first = max(start - model.before, 0)
        return model.fuse({tap: states[tap][first:stop] for tap in model.taps})[start - first :]

    def _features(self, inputs: Inputs) -> Tensor:
        """(batch, queries, width) the features of a forward; in a chain, the head's last output."""
        if self._given is not None:
            return self._given
        own = self.reader.cache.features[OWN][: inputs.slots.shape[0]]  # (batch, capacity, width)
        before = (inputs.slots - 1).clamp(min=0)[..., None]  # (batch, 1, 1); idle rows may be in slot 0
        return own.gather(1, before.expand(-1, -1, own.shape[-1]))


def _levels(plan: Plan) -> dict[int, list[int]]:
    """Level -> queries of a plan; level 0 is the text, then the depth in the draft."""
    levels: dict[int, list[int]] = {}
    for query, position in enumerate(plan.positions):
        levels.setdefault(max(position - plan.length + 1, 0), []).append(query)
    return levels


def _parents(plan: Plan) -> Sequence[int]:
    """(queries,) the slot of the token before each query, on its branch."""
    if plan.paths is None:
        return [slot - 1 for slot in plan.slots]
    return [path[-2] if len(path) > 1 else plan.length - 1 for path in plan.paths]
