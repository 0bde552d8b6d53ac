"""One `generate` call: its target, its randomness, its rows, and one session a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from csdraft.decoding.feature_session import FeatureModel, FeatureSession
from csdraft.decoding.ledger import Ledger
from csdraft.decoding.names import distinct, name_of
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ALONE, ReadingOptions
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.session import Session
from csdraft.decoding.text import Text
from csdraft.decoding.together import Together

__all__ = ["Call"]


class Call:
    """What all parts of one call share; it dies with the call.

    Args:
        target: the model whose output is reproduced.
        chooser: the target's processors and stopping criteria.
        texts: one a row.
        capacity: slots that a session reserves a row.
        sources: the encoder's inputs as the target reads them, if it is an encoder-decoder.
        together: chooses for all rows at once, if something must see all of them.
        reading: how the models read; `taps` are the target's.
        ledger: takes down what the call costs and comes to.

    Attributes:
        drafting: how models that draft turn logits into tokens, the target among them where it drafts for itself: no
            processor or criterion of the user's, which may keep state, is ever shown a drafted token.
    """

    def __init__(
        self,
        target: nn.Module,
        chooser: TokenChooser,
        texts: Sequence[Text],
        capacity: int,
        sources: Sources | None,
        together: Together | None = None,
        reading: ReadingOptions = ALONE,
        ledger: Ledger | None = None,
    ):
        self.target, self.chooser, self.texts, self.capacity, self.sources = target, chooser, texts, capacity, sources
        self.together, self.reading, self.ledger = together, reading, ledger or Ledger()
        self.rows = len(texts)
        self.vocab = chooser.sampler.vocab
        self.drafting = TokenChooser(
            chooser.processing.for_drafters(), chooser.stopping.for_drafters(), chooser.sampler
        )
        self._sessions: dict[int, Session] = {}
        self._memos: dict[Hashable, Any] = {}
        self._levels: dict[Hashable, int] = {"target": 0}
        self._names: dict[Hashable, str] = {}

    @property
    def sampler(self) -> Sampler:
        return self.chooser.sampler

    def session(self, model: nn.Module) -> Session:
        """The model's session; the same model anywhere in a cascade is one session."""
        if id(model) not in self._sessions:
            is_target = model is self.target
            sources = self.sources
            if sources is not None and not is_target:
                sources = Sources(sources.input_ids, sources.attention_mask)
            reading = self.reading if is_target else replace(self.reading, taps=frozenset())
            use = self.ledger.model(model, name_of(model))
            shape = self.drafting, self.rows, self.capacity, sources, self.vocab
            if isinstance(model, FeatureModel):
                of = model, self.session(self.target)
                self._sessions[id(model)] = FeatureSession(*of, *shape, graphs=reading.graphs, use=use)
            else:
                self._sessions[id(model)] = Session(model, *shape, self.texts, reading, use)
        return self._sessions[id(model)]

    @property
    def rows_of_padding(self) -> set[int]:
        """Rows that have ended and are filled up while others continue, of a batch that advances in step."""
        if self.together is None or self.together.pad is None:
            return set()
        return set(self.together.ended.nonzero()[:, 0].tolist())

    @property
    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def memo(self, owner: Hashable, make: Callable[[], Any]) -> Any:
        """Per-call state of `owner` (an n-gram index, say), made at its first use."""
        if owner not in self._memos:
            self._memos[owner] = make()
        return self._memos[owner]

    def level(self, owner: Hashable, name: str = "") -> int:
        """The number by which reports and drafts name whose choice a token was; the target is 0.

        Args:
            owner: a model, or a drafter that has none.
            name: how reports call it; its own name if empty.
        """
        if name:
            self._names[owner] = name
        return self._levels.setdefault(owner, len(self._levels))

    @property
    def level_owners(self) -> list[Hashable]:
        """What stands behind each level number."""
        return list(self._levels)

    @property
    def level_names(self) -> list[str]:
        """A distinct name for each level number, in order."""
        return distinct(self._names.get(owner) or name_of(owner) for owner in self._levels)

    def note_memory(self) -> None:
        """Writes down what every model's cache takes."""
        for session in self._sessions.values():
            session.use.note_memory(session.reader)

    def close(self, failed: bool = False) -> None:
        """The end of a call that went well: models keep what they have read, and recorded, for the next one.

        Args:
            failed: whether a drafter has: its models may have stopped in the midst of a forward.
        """
        for session in sorted(self._sessions.values(), key=lambda session: session.model is self.target):
            if not failed or session.model is self.target:  # which comes last: who waits longest is dropped first
                session.close()

    def retire(self, live: Sequence[int]) -> None:
        """Tells every session which rows continue."""
        self.note_memory()  # the last moment before caches may shrink
        for session in self._sessions.values():
            session.retire(live)
