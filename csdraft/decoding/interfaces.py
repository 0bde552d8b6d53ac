"""The five nouns as interfaces: what a drafter, a verifier and a schedule are asked, and the values between them.

Drafters, verifiers and schedules are frozen dataclasses: their fields are their options (and weights), no more.
State of one `generate` call lives in the `Call`; what outlives a call lives in a locked table.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from csdraft.decoding.draft import ROOT, Draft, Kind
from csdraft.decoding.memory import Memory
from csdraft.decoding.reported import Reported
from csdraft.decoding.text import Text

if TYPE_CHECKING:
    from csdraft.decoding.call import Call
    from csdraft.decoding.sampling import Sampler
    from csdraft.decoding.tree import Growth

__all__ = ["NOTHING", "Budget", "Context", "Drafter", "Request", "Round", "Schedule", "ScoresView", "Step"]
__all__ += ["Stop", "Tree", "Verdict", "Verifier"]


@dataclass(frozen=True, eq=False)
class Context:
    """Where a drafter stands: a row's text, and a draft that already follows it, whose last node it continues from."""

    row: int
    text: Text
    call: Call
    draft: Draft = Draft()

    @property
    def tip(self) -> int:
        """The node to continue from: the draft's last, or `ROOT`."""
        return self.draft.tip

    def after(self, draft: Draft) -> Context:
        """The same row, continuing from the end of `draft`."""
        return Context(self.row, self.text, self.call, draft)

    @property
    def path(self) -> list[int]:
        """Token ids between the text and the place to continue from."""
        return [self.draft.tokens[node] for node in self.draft.path(self.tip)]


Stop = Callable[[float, Callable[[], float]], bool]


@dataclass(frozen=True)
class Budget:
    """How much to draft for one row, in tokens beyond the context's tip.

    Attributes:
        depth: tokens wanted; 0 asks for nothing, and the round is a plain decoding step.
        room: the most that may be handed up (>= depth).
        skip: how many leading stages a horizontal cascade leaves out. Other drafters have one stage and ignore it.
        size: the most nodes of a tree, for drafters with `sizes`; None: the drafter decides.
        confidence: whether a reviewer above will read `Draft.confidence` (it costs a softmax a token).
        stop: called with the confidence of each token that a model kept, and with a function that computes the
            entropy, in nats, of the softmax that this is a probability of; True ends what this model drafts.
            The token is kept in any case: dropping a token because of what it is would bias sampling.
    """

    depth: int
    room: int
    skip: int = 0
    size: int | None = None
    confidence: bool = False
    stop: Stop | None = None


NOTHING = Budget(0, 0)
"""Asks for nothing."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier decided.

    Attributes:
        accepted: nodes kept, root outwards.
        next_token: correction or bonus token; None if the text ended on an accepted node.
        ended: whether the text ends with the last of these.
        emitted_probs: under independent draws, the (vocab,) distribution that each emitted token really has, None for
            a point mass; None as a whole under coupled or greedy draws, where no rule reads it.
    """

    accepted: list[int]
    next_token: int | None
    ended: bool = False
    emitted_probs: Sequence[Tensor | None] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """Ask a session for the logits after some nodes of a draft.

    `after` is in draft order and ends with the draft's last node; None means the text itself and every node.
    """

    row: int
    text: Text
    draft: Draft
    after: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round of one row.

    Attributes:
        context: where it started.
        draft: what was put under review (the context's own nodes first).
        verdict: what was decided.
        level: the reviewer's level.
        scores: the reviewer's view; valid until its session's next forward.
        confidence: (emitted,) confidence of each emitted token, if it was asked for.
    """

    context: Context
    draft: Draft
    verdict: Verdict
    level: int
    scores: ScoresView = field(repr=False)
    confidence: Sequence[float] | None = None

    @property
    def accepted(self) -> int:
        """Draft tokens kept, the reviewer's own token not counted."""
        return len(self.verdict.accepted)

    @property
    def drafted(self) -> int:
        """Draft tokens that were put under review."""
        return len(self.draft) - len(self.context.draft)

    @property
    def depth(self) -> int:
        """Draft tokens on the longest branch that was put under review; `drafted` of a chain."""
        if self.draft.is_chain or not self.drafted:
            return self.drafted
        return max(self.draft.depths[len(self.context.draft) :]) + 1 - self.draft.depth(self.context.tip)

    @cached_property
    def tokens(self) -> list[int]:
        """The emitted tokens: the accepted ones, then the correction or bonus."""
        tokens = [self.draft.tokens[node] for node in self.verdict.accepted]
        return tokens if self.verdict.next_token is None else [*tokens, self.verdict.next_token]

    @cached_property
    def levels(self) -> list[int]:
        """(emitted,) the level that each emitted token came from."""
        levels = [self.draft.levels[node] for node in self.verdict.accepted]
        return levels if self.verdict.next_token is None else [*levels, self.level]

    @cached_property
    def extended(self) -> Draft:
        """The context's path followed by the emitted tokens: what an inner level hands up."""
        verdict, tip = self.verdict, self.context.tip
        if verdict.accepted:
            tip = verdict.accepted[-1]
        start = len(self.draft.path(self.context.tip))
        chain = self.draft.only(self.draft.path(tip))
        if verdict.next_token is not None:
            chain = chain.extend((verdict.next_token,), self.level)
        if verdict.emitted_probs is None and self.confidence is None:
            return chain
        return chain.relabelled(start, verdict.emitted_probs, self.confidence)


class ScoresView(Protocol):
    """One row's view of one forward of a reviewer; valid until that session's next score."""

    row: int

    def choice(self, node: int) -> int:
        """The reviewer's token after `node`: the argmax, or the argmax with the position's noise."""
        ...

    def probs(self, node: int) -> Tensor:
        """(vocab,) float32 distribution of the reviewer's token after `node`, processed; one-hot if greedy."""
        ...

    def top(self, k: int) -> Tensor:
        """(scored, k) int64 on the host: the reviewer's likeliest tokens after every scored node, best first.

        Of the raw logits, which processors have not seen. Rows are in the order of `Request.after`: at the target the
        first is `ROOT`'s, row i + 1 that of node i.
        """
        ...

    def soft(self, node: int, token: int) -> float:
        """The reviewer's softmax probability of `token` after `node` at the call's temperature (1 when greedy)."""
        ...

    def entropy(self, node: int) -> float:
        """Entropy in nats of the softmax that `soft` is a probability of."""
        ...

    def position(self, node: int) -> int:
        """Absolute position, padding not counted, of the token that follows `node`."""
        ...

    def ends(self, node: int, token: int) -> bool:
        """Whether the text ends with `token` after `node`."""
        ...


class Drafter(Reported):
    """Anything that proposes drafts.

    Attributes:
        depth: the number of tokens that it drafts by default.
    """

    depth: int = 5

    @cached_property
    def memory(self) -> Memory:
        """What schedules have learned about it in earlier calls. Not an option: equal drafters have one each."""
        return Memory()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        """One draft a context: the context's own nodes first, unchanged, then at most `budget.room` new ones."""
        raise NotImplementedError

    def parts(self) -> Sequence[Drafter]:
        """The drafters that it is made of. The methods below reach each of them."""
        return ()

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learns from finished rounds of the target; does nothing by default."""
        for part in {id(part): part for part in self.parts()}.values():  # once each, however often they draft
            part.observe(rounds)

    def models(self) -> list[object]:
        """The models it runs, largest first (for reports, checks and cost tables)."""
        return [model for part in self.parts() for model in part.models()]

    def taps(self) -> frozenset[int]:
        """Hidden states of the target that it reads, by `call.session(call.target).features`.

        0 is the embeddings, i the output of block i; of the last block many models give it after their last norm.
        """
        return frozenset(tap for part in self.parts() for tap in part.taps())

    def stages(self) -> list[tuple[Drafter, int]]:
        """Who writes the draft, in order, and the depth at which each ends. Only cascades have several stages."""
        return [(self, self.depth)]

    def width(self, depth: int) -> int:
        """The most tokens of a draft of this depth, all branches counted: what a reviewer must read."""
        return depth

    def sizes(self) -> Sequence[int]:
        """The numbers of nodes that a schedule may choose from (`Budget.size`), largest first; none by default."""
        return ()

    def evidence(self, context: Context) -> int:
        """Before drafting, a hint of how well a draft would do here: one of a few small numbers.

        Schedules keep statistics for each number. 0 says nothing; a statistical drafter returns the length of its
        match. It must take microseconds.
        """
        return 0

    def expected(self, context: Context, depth: int, size: int) -> tuple[float, int] | None:
        """For a tree of this depth and size: the tokens expected to be kept, and its nodes; None if it cannot tell."""
        return None

    def check(self, call: Call) -> None:
        """Raises ValueError if it cannot draft for this call; runs before any model does."""
        for part in self.parts():
            part.check(call)


class Step(NamedTuple):
    """What a tree wants next: the children of some nodes, from one forward.

    Attributes:
        nodes: to expand, `ROOT` for the place where the draft begins. A node is expanded once.
        width: the most children of each.
        most: the most new nodes of the step, those with the likeliest paths; None keeps all. Only for trees that draw
            nothing, since it drops tokens because of what they are.
    """

    nodes: Sequence[int]
    width: int
    most: int | None = None


class Tree:
    """A way to grow a model's draft into a tree.

    Attributes:
        draws: how a node's children are drawn where draws are independent; None: they are chosen, the likeliest first.
            Under greedy or coupled draws they are always chosen: by probability, with the position's noise if any.
            Of drawn children a tree must keep the first few of each node, in the order of the draws: dropping one
            because of its token would bias sampling. `DraftProbs.kind` says what their number may depend on.
    """

    draws: ClassVar[Kind | None] = None

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        """Grows one row's tree; the model runs once a step, for all rows.

        A generator: it yields what it wants next, and finds the children in `growth` when it is resumed. Tokens that
        end the text have no children, so `growth.latest` may be empty.

        Args:
            growth: the candidates so far.
            depth: the most levels.

        Returns:
            The nodes to draft, each with its parent, in any order.
        """
        raise NotImplementedError

    def width(self, depth: int) -> int:
        """The most nodes of a tree of this depth."""
        raise NotImplementedError

    def sized(self, nodes: int) -> Tree:
        """The same tree with at most `nodes` nodes; itself if it has no such option."""
        return replace(self, nodes=nodes) if getattr(self, "nodes", 0) > nodes else self  # type: ignore[type-var]


class Verifier:
    """An acceptance rule. It sees a draft and numbers, never a model.

    Attributes:
        lossless: whether the output has the reviewer's distribution for every draft that it does not refuse.
        draws: "coupled" if all levels share one noise vector a position, "independent" otherwise.
        kinds: the kinds of `DraftProbs` that it judges exactly; if empty, drafters need not compute probabilities.
        chains_only: whether a tree must be refused.
        looks_ahead: whether it asks for distributions beyond the accepted path, which stateful processors must not
            see.
        reads_confidence: whether it reads `Draft.confidence`, which drafters then compute.
    """

    lossless: bool = False
    draws: ClassVar[Literal["coupled", "independent"]] = "coupled"
    kinds: ClassVar[frozenset[str]] = frozenset()
    chains_only: bool = False
    looks_ahead: ClassVar[bool] = False
    reads_confidence: bool = False

    def refusal(self, draft: Draft) -> str | None:
        """Why it cannot judge `draft` exactly; None if it can. Coupled draws need no `DraftProbs`."""
        unknown = draft.probs is not None and draft.probs.kind not in self.kinds and self.draws == "independent"
        if unknown and draft.has_drawn_siblings:  # a lone draw is of every kind
            return (
                f"the draft's siblings were drawn as {draft.probs.kind!r}, {type(self).__name__} judges "  # type: ignore[union-attr]
                f"{sorted(self.kinds)} and point masses; use another verifier or tree, or declare point masses with "
                "Draft.probs=None"
            )
        if self.chains_only and not draft.is_chain:
            return f"the draft is a tree, {type(self).__name__} judges chains; draft chains, or use another verifier"
        return None

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        """Decides which nodes below `root` are kept, and the token that follows."""
        raise NotImplementedError


class Schedule:
    """Decides how much to draft in each round. `start` makes the object that serves one call."""

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        """The object that serves one call; a stateless schedule returns itself."""
        return self

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        """One budget a row. `rooms`: the most drafted tokens that each row has room for (one less than remain)."""
        raise NotImplementedError

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        """Called after every round with its results and its seconds."""

    def finish(self) -> None:
        """Called once, after the last round."""

    def plain_seconds(self) -> float:
        """What a plain step takes by its latest measurements, for the report; 0 if it knows of none."""
        return 0.0

    def why(self) -> str:
        """One sentence for the report: why it drafts as it does; empty if it has no choice."""
        return ""
