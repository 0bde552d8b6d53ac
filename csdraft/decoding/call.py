"""One `generate` call: its target, its randomness, its rows, and one session per model."""

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
    """What all parts of one call share.

    Args:
        target: the model whose output must be reproduced.
        chooser: the target's processors and stopping criteria.
        texts: one for each row.
        capacity: slots that a session reserves for each row.
        sources: the encoder's inputs of an encoder-decoder target; None for other targets.
        together: chooses for all rows at once if custom code must see all of them; else None.
        reading: how the models read; its `taps` are those of the target.
        ledger: counts and times the call.

    Attributes:
        drafting: how drafting models turn logits into tokens. Processors and criteria of the user may keep state, so
            they are left out: none of them ever sees a drafted token.
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
        """Rows that have ended and are padded while others continue, in a batch that is decoded in step."""
        if self.together is None or self.together.pad is None:
            return set()
        return set(self.together.ended.nonzero()[:, 0].tolist())

    @property
    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def memo(self, owner: Hashable, make: Callable[[], Any]) -> Any:
        """State of `owner` for this call, such as an n-gram index; made at its first use."""
        if owner not in self._memos:
            self._memos[owner] = make()
        return self._memos[owner]

    def level(self, owner: Hashable, name: str = "") -> int:
        """The number that says in drafts and reports who chose a token; 0 is the target.

        Args:
            owner: a model, or a drafter without models.
            name: its name in reports; by default its own name.
        """
        if name:
            self._names[owner] = name
        return self._levels.setdefault(owner, len(self._levels))

    @property
    def level_owners(self) -> list[Hashable]:
        """The model or drafter of each level number."""
        return list(self._levels)

    @property
    def level_names(self) -> list[str]:
        """A distinct name for each level number, in order."""
        return distinct(self._names.get(owner) or name_of(owner) for owner in self._levels)

    def note_memory(self) -> None:
        """Updates the memory figures of every model."""
        for session in self._sessions.values():
            session.use.note_memory(session.reader)

    def close(self, failed: bool = False) -> None:
        """Called when a call ends without an error: models keep their caches and recordings for the next call.

        Args:
            failed: whether a drafter has failed. Its models may have stopped in the middle of a forward, so only the
                target's cache is kept.
        """
        for session in sorted(self._sessions.values(), key=lambda session: session.model is self.target):
            if not failed or session.model is self.target:  # comes last, since the oldest is dropped first
                session.close()

    def retire(self, live: Sequence[int]) -> None:
        """Tells every session which rows continue."""
        self.note_memory()  # before caches shrink
        for session in self._sessions.values():
            session.retire(live)
