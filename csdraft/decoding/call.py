"""One `generate` call: its target, its randomness, its rows, and one session a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from csdraft.decoding.feature_session import FeatureModel, FeatureSession
from csdraft.decoding.names import distinct, name_of
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ALONE, ReadingOptions
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import Head
from csdraft.decoding.session import Session
from csdraft.decoding.tally import Tally
from csdraft.decoding.text import Text
from csdraft.decoding.together import Together

__all__ = ["Call"]


class Call:
    """What all parts of one call share; it dies with the call.

    Args:
        target: the model whose output is reproduced.
        head: the target's processors and stopping criteria.
        texts: one a row.
        capacity: slots that a session reserves a row.
        sources: the encoder's inputs as the target reads them, if it is an encoder-decoder.
        together: chooses for all rows at once, if something must see all of them.
        reading: how the models read; `taps` are the target's.

    Attributes:
        drafting: how models that draft turn logits into tokens, the target among them where it drafts for itself: no
            processor or criterion of the user's, which may keep state, is ever shown a drafted token.
    """

    def __init__(
        self,
        target: nn.Module,
        head: Head,
        texts: Sequence[Text],
        capacity: int,
        sources: Sources | None,
        together: Together | None = None,
        reading: ReadingOptions = ALONE,
    ):
        self.target, self.head, self.texts, self.capacity, self.sources = target, head, texts, capacity, sources
        self.together, self.reading = together, reading
        self.rows = len(texts)
        self.vocab = head.sampler.vocab
        self.drafting = Head(head.processing.for_drafters(), head.stopping.for_drafters(), head.sampler)
        self._sessions: dict[int, Session] = {}
        self._memos: dict[Hashable, Any] = {}
        self._levels: dict[Hashable, int] = {"target": 0}
        self._names: dict[Hashable, str] = {}
        self.tallies: defaultdict[int, Tally] = defaultdict(Tally)  # what each reviewer decided, by its level
        self.cut = 0  # draft tokens that a K matrix asks for and nobody had room for
        self.charges: dict[int, tuple[float, float]] = {}  # seconds and tokens a row, by the id of a stage's drafter

    @property
    def sampler(self) -> Sampler:
        return self.head.sampler

    def session(self, model: nn.Module) -> Session:
        """The model's session; the same model anywhere in a cascade is one session."""
        if id(model) not in self._sessions:
            is_target = model is self.target
            sources = self.sources
            if sources is not None and not is_target:
                sources = Sources(sources.input_ids, sources.attention_mask)
            reading = self.reading if is_target else replace(self.reading, taps=frozenset())
            shape = self.drafting, self.rows, self.capacity, sources, self.vocab
            if isinstance(model, FeatureModel):
                made: Session = FeatureSession(model, self.session(self.target), *shape)
            else:
                made = Session(model, *shape, self.texts, reading)
            self._sessions[id(model)] = made
        return self._sessions[id(model)]

    @property
    def rows_of_padding(self) -> set[int]:
        """Rows that have ended and are filled up while others go on, of a batch that goes in step."""
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

    def charge(self, drafter: object, seconds: float, tokens: float) -> None:
        """Adds to what a stage of the outermost cascade has cost, and drafted a row, so far.

        Inner ones charge nothing: their time is in the stage above them, and their drafters may be stages there too.
        """
        spent, drafted = self.charges.get(id(drafter), (0.0, 0.0))
        self.charges[id(drafter)] = (spent + seconds, drafted + tokens)

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

    def close(self, failed: bool = False) -> None:
        """The end of a call that went well: models keep what they have read, and recorded, for the next one.

        Args:
            failed: whether a drafter has: its models may have stopped in the midst of a forward.
        """
        for session in self._sessions.values():
            if not failed or session.model is self.target:
                session.close()

    def retire(self, live: Sequence[int]) -> None:
        """Tells every session which rows go on."""
        for session in self._sessions.values():
            session.retire(live)
