"""The interfaces `Drafter`, `Tree`, `Verifier` and `Schedule`, and the values that are passed between them.

In a round the schedule gives budgets, the drafter proposes, a session scores, the verifier decides. Drafters, trees,
verifiers and schedules are frozen dataclasses of options and weights. One call's state is in its `Call`; what outlives
a call is in a locked table.
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
    """Where a drafter starts: after a row's text and the draft that already follows it, at that draft's `tip`."""

    row: int
    text: Text
    call: Call
    draft: Draft = Draft()

    @property
    def tip(self) -> int:
        """The node to continue from: the draft's `tip`."""
        return self.draft.tip

    def after(self, draft: Draft) -> Context:
        """The same row, continuing from the end of `draft`."""
        return Context(self.row, self.text, self.call, draft)

    @property
    def path(self) -> list[int]:
        """Token ids of the draft from its root to the tip."""
        return [self.draft.tokens[node] for node in self.draft.path(self.tip)]


Stop = Callable[[float, Callable[[], float]], bool]
"""(confidence, entropy()) of a drafted token -> whether to stop drafting after it."""


@dataclass(frozen=True)
class Budget:
    """How much to draft for one row, in tokens beyond the context's tip.

    Attributes:
        depth: tokens to draft; 0 asks for nothing, and the round is a plain decoding step.
        room: the most tokens that the drafter may return (>= depth).
        skip: how many leading stages a horizontal cascade leaves out. Other drafters have one stage and ignore it.
        size: the most nodes of a tree, for drafters with `sizes`; None: the drafter decides.
        confidence: whether a reviewer above will read `Draft.confidence` (it costs one softmax per token).
        stop: called after each token that a model drafts, with the token's softmax probability and a function that
            computes the entropy, in nats, of that softmax. True stops this model. The token itself is kept either
            way: dropping a token because of which token it is would bias sampling.
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
        accepted: nodes kept, from the root downwards.
        next_token: correction or bonus token; None if the text ended on an accepted node.
        ended: whether the text ends with the last emitted token.
        emitted_probs: under independent draws, for each emitted token the (vocab,) distribution that it was actually
            drawn from, or None for a point mass. Under coupled or greedy draws it is None: no rule reads it.
    """

    accepted: list[int]
    next_token: int | None
    ended: bool = False
    emitted_probs: Sequence[Tensor | None] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """Asks for the logits after some nodes of a row's draft, in draft order; no `after`: after `ROOT` and all."""

    row: int
    text: Text
    draft: Draft
    after: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.after:
            object.__setattr__(self, "after", range(ROOT, len(self.draft)))


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round of one row.

    Attributes:
        context: where it started.
        draft: the draft that was reviewed (the context's own nodes first).
        verdict: what the verifier decided.
        level: the level of the reviewer (0 for the target).
        scores: the reviewer's scores; valid until its session's next forward.
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
        """Draft tokens kept; the reviewer's own token does not count."""
        return len(self.verdict.accepted)

    @property
    def drafted(self) -> int:
        """Draft tokens that were reviewed."""
        return len(self.draft) - len(self.context.draft)

    @property
    def depth(self) -> int:
        """Draft tokens on the longest branch that was reviewed; the same as `drafted` for a chain."""
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
        """(emitted,) the level of the model or table that chose each emitted token."""
        levels = [self.draft.levels[node] for node in self.verdict.accepted]
        return levels if self.verdict.next_token is None else [*levels, self.level]

    @cached_property
    def extended(self) -> Draft:
        """A chain of the context's path and the emitted tokens: what an inner level of a cascade passes on."""
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
    """What one forward of a reviewer says about one row; valid until that session's next `score`."""

    row: int

    def choice(self, node: int) -> int:
        """The reviewer's token after `node`: the argmax, under coupled draws with the position's noise added."""
        ...

    def probs(self, node: int) -> Tensor:
        """(vocab,) float32 distribution of the reviewer's token after `node`, after processors; one-hot if greedy."""
        ...

    def top(self, k: int) -> Tensor:
        """(scored, k) int64 on the host: the reviewer's likeliest tokens after every scored node, best first.

        They come from the raw logits, before any processor. Rows are in the order of `Request.after`. At the target
        row 0 belongs to `ROOT`, row i + 1 to node i.
        """
        ...

    def soft(self, node: int, token: int) -> float:
        """The reviewer's softmax probability of `token` after `node` at the call's temperature (1 when greedy)."""
        ...

    def entropy(self, node: int) -> float:
        """Entropy in nats of the softmax that `soft` reads."""
        ...

    def position(self, node: int) -> int:
        """Absolute position of the token that follows `node`; padding does not count."""
        ...

    def ends(self, node: int, token: int) -> bool:
        """Whether the text ends with `token` after `node`."""
        ...


class Drafter(Reported):
    """Anything that proposes drafts.

    Attributes:
        depth: tokens that it drafts by default.
    """

    depth: int = 5

    @cached_property
    def memory(self) -> Memory:
        """What schedules learned about it in earlier calls. It is not an option: each drafter has its own."""
        return Memory()

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        """One draft for each context: the context's own nodes, unchanged, then at most `budget.room` new ones."""
        raise NotImplementedError

    def parts(self) -> Sequence[Drafter]:
        """The drafters that it is made of. By default the methods below call each of them."""
        return ()

    def observe(self, rounds: Sequence[Round]) -> None:
        """Learns from finished rounds of the target; by default only its parts do."""
        for part in {id(part): part for part in self.parts()}.values():  # each part once, even if it is listed twice
            part.observe(rounds)

    def models(self) -> list[object]:
        """The models it runs, largest first (for reports, checks and cost tables)."""
        return [model for part in self.parts() for model in part.models()]

    def taps(self) -> frozenset[int]:
        """Which hidden states of the target it reads with `call.session(call.target).features`.

        0 is the embeddings, i the output of block i. Many models return the last block's output after the final norm.
        """
        return frozenset(tap for part in self.parts() for tap in part.taps())

    def stages(self) -> list[tuple[Drafter, int]]:
        """The drafters that write a draft in turn, each with the depth where it ends; several only in cascades."""
        return [(self, self.depth)]

    def width(self, depth: int) -> int:
        """The most tokens that a draft of this depth has on all branches together: what a reviewer must read."""
        return depth

    def sizes(self) -> Sequence[int]:
        """The numbers of nodes that a schedule may choose from (`Budget.size`), largest first; none by default."""
        return ()

    def evidence(self, context: Context) -> int:
        """A hint, before drafting, of how likely a draft is to be kept here: one of a few small numbers.

        Schedules keep separate statistics for each number. 0 is no hint; a drafter that copies text returns the length
        of its match. It must take microseconds.
        """
        return 0

    def expected(self, context: Context, depth: int, size: int) -> tuple[float, int] | None:
        """(tokens expected to be kept, nodes) of a tree of this depth and size; None if it cannot tell."""
        return None

    def check(self, call: Call) -> None:
        """Raises ValueError if it cannot draft for this call. Runs before any model runs."""
        for part in self.parts():
            part.check(call)


class Step(NamedTuple):
    """What a tree asks for next: the children of some nodes, which one forward finds.

    Attributes:
        nodes: the nodes to expand; `ROOT` is the place where the draft begins. A node is expanded once.
        width: the most children of each node.
        most: the most new nodes of the step, those with the likeliest paths; None keeps all. Only for trees with
            `draws` None: it drops tokens because of which tokens they are.
    """

    nodes: Sequence[int]
    width: int
    most: int | None = None


class Tree:
    """A way to grow a model's draft into a tree.

    Attributes:
        draws: how a node's children are drawn under independent draws; None: they are chosen, the likeliest first.
            Under greedy or coupled draws they are always chosen by probability, plus the position's noise if coupled.
            A tree may keep only the first few drawn children of a node, in the order of the draws: dropping one
            because of its token would bias sampling. `DraftProbs.kind` says what their number may depend on.
    """

    draws: ClassVar[Kind | None] = None

    def grow(self, growth: Growth, depth: int) -> Generator[Step, None, Sequence[int]]:
        """Grows one row's tree; the model runs once a step, for all rows.

        This is a generator: it yields a `Step`, and when it is resumed the children are in `growth`. Tokens that end
        the text get no children, so `growth.latest` may be empty.

        Args:
            growth: the candidates so far.
            depth: the most levels.

        Returns:
            The nodes of the draft, in any order. They must include the parent of each.
        """
        raise NotImplementedError

    def width(self, depth: int) -> int:
        """The most nodes of a tree of this depth."""
        raise NotImplementedError

    def sized(self, nodes: int) -> Tree:
        """The same tree limited to `nodes` nodes; the tree itself if it has no option `nodes`."""
        return replace(self, nodes=nodes) if getattr(self, "nodes", 0) > nodes else self  # type: ignore[type-var]


class Verifier:
    """An acceptance rule. It sees a draft and the reviewer's scores, never a model.

    Attributes:
        lossless: whether the output has the reviewer's distribution for every draft that it does not refuse.
        draws: "coupled" if drafters and reviewers add the same noise vector at a position, else "independent".
        kinds: the kinds of `DraftProbs` that it verifies exactly; if empty, drafters need not compute probabilities.
        chains_only: whether it refuses trees.
        looks_ahead: whether it asks for distributions off the accepted path, which no stateful processor allows.
        reads_confidence: whether it reads `Draft.confidence`, which drafters then compute.
    """

    lossless: bool = False
    draws: ClassVar[Literal["coupled", "independent"]] = "coupled"
    kinds: ClassVar[frozenset[str]] = frozenset()
    chains_only: bool = False
    looks_ahead: ClassVar[bool] = False
    reads_confidence: bool = False

    def refusal(self, draft: Draft) -> str | None:
        """Why it cannot verify `draft` exactly; None if it can. Coupled draws need no `DraftProbs`."""
        unknown = draft.probs is not None and draft.probs.kind not in self.kinds and self.draws == "independent"
        if unknown and draft.has_drawn_siblings:  # kinds differ only in how siblings are drawn
            return (
                f"the draft's siblings were drawn as {draft.probs.kind!r}, but {type(self).__name__} verifies only "  # type: ignore[union-attr]
                f"{sorted(self.kinds)} and point masses; use another verifier or tree, or declare point masses with "
                "Draft.probs=None"
            )
        if self.chains_only and not draft.is_chain:
            name = type(self).__name__
            return f"the draft is a tree, but {name} verifies only chains; draft chains, or use another verifier"
        return None

    def verify(self, draft: Draft, scores: ScoresView, sampler: Sampler, root: int = ROOT) -> Verdict:
        """Decides which nodes below `root` are kept, and which token follows them."""
        raise NotImplementedError


class Schedule:
    """Decides how much to draft in each round. `start` returns the object that does so for one call."""

    def start(self, call: Call, drafter: Drafter) -> Schedule:
        """The object for one call; a schedule without state returns itself."""
        return self

    def budgets(self, contexts: Sequence[Context], rooms: Sequence[int], drafter: Drafter) -> list[Budget]:
        """One budget per row. `rooms`: the most draft tokens that each row has room for: its tokens left, less one."""
        raise NotImplementedError

    def observe(self, rounds: Sequence[Round], draft_seconds: float, score_seconds: float) -> None:
        """Called after every round, with its results and the seconds that drafting and scoring took."""

    def finish(self) -> None:
        """Called once, after the last round."""

    def plain_seconds(self) -> float:
        """Seconds of a plain step by its latest measurements, for the report; 0 if it has none."""
        return 0.0

    def why(self) -> str:
        """One sentence for the report: why it drafts this much; empty if there is nothing to choose."""
        return ""
