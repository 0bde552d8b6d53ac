"""Ouroboros: extends another drafter's draft with phrases, learned from the target's choices along earlier drafts.

Ouroboros (Zhao et al., arXiv 2402.13720): a drafter model writes a few tokens, and the target checks several phrases
that may follow them in the same forward. Phrases come from the verified text, and from the tokens that the target
chose along rejected drafts. Use it around a model whose tokens are expensive. In the paper the drafter model itself
writes by Lookahead; for that, use `Vertical(model, ...)` around any drafter of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from csdraft.decoding.call import Call
from csdraft.decoding.draft import ROOT, Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round
from csdraft.decoding.limits import MOST_BRANCHES, check_range
from csdraft.drafters._check_parts import check_parts
from csdraft.drafters._lookup import Trie, until
from csdraft.tables.phrases import PhrasePool

__all__ = ["Ouroboros"]


@dataclass(frozen=True)
class Ouroboros(Drafter):
    """Adds the newest phrases after the draft's last token, as branches below it.

    Args:
        drafter: writes the drafts that are extended.
        phrases: the number of branches, the paper's K.
        ngram: tokens of an n-gram, the paper's N: a phrase is the N - 1 tokens after the first.
        pool: phrases kept for each token, the paper's G.
        remember: whether the pool outlives the call, one pool for each target. Drafts, but never the text, then depend
            on earlier calls.
    """

    drafter: Drafter
    phrases: int = 3
    ngram: int = 7
    pool: int = 20
    remember: bool = True

    def __post_init__(self) -> None:
        check_parts(self)
        check_range("an Ouroboros", self, phrases=MOST_BRANCHES, pool=None)
        check_range("an Ouroboros", self, 2, ngram=None)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.drafter.depth + self.ngram - 1

    def width(self, depth: int) -> int:
        inner = min(depth, self.drafter.depth)
        return self.drafter.width(inner) + self.phrases * min(depth - inner, self.ngram - 1)

    def parts(self) -> Sequence[Drafter]:
        return (self.drafter,)

    def evidence(self, context: Context) -> int:
        return self.drafter.evidence(context)

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        most = self.drafter.depth
        asked = [replace(budget, depth=min(budget.depth, most)) for budget in budgets]
        drafts = self.drafter.propose(contexts, asked)
        return [self._lengthen(c, d, min(b.depth, b.room)) for c, d, b in zip(contexts, drafts, budgets, strict=True)]

    def _lengthen(self, context: Context, draft: Draft, depth: int) -> Draft:
        ends = context.call.chooser.stopping.eos
        left = depth - (draft.depth(draft.tip) - context.draft.depth(context.tip))
        last = context.after(draft).path[-1:] or context.text.tail(1)
        if left <= 0 or not last or last[0] in ends:
            return draft
        trie = Trie()
        for phrase in self._pool(context.call).after(last[0], self.phrases):
            trie.add(until(ends, phrase[:left]))
        return draft.graft(trie.tokens, trie.parents, context.call.level(self))

    def _pool(self, call: Call) -> PhrasePool:
        length = self.ngram - 1
        if self.remember:
            return call.memo(self, lambda: PhrasePool.of(call.target, length, self.pool))
        return call.memo(self, lambda: PhrasePool(length, self.pool))

    def observe(self, rounds: Sequence[Round]) -> None:
        super().observe(rounds)
        pool = self._pool(rounds[0].context.call)
        for finished in rounds:
            _harvest(pool, finished)
            context = finished.context
            # The prompt is read once, at the first round.
            context.call.memo((self, context.row), lambda text=context.text: pool.read(text.tokens))
            pool.read([*context.text.tail(pool.length), *finished.tokens])


def _harvest(pool: PhrasePool, finished: Round) -> None:
    """Adds phrases to the pool: the target's choices after the nodes of each rejected branch."""
    draft, accepted, text = finished.draft, set(finished.verdict.accepted), finished.context.text.tokens
    if not len(draft) or not text:
        return
    likeliest = finished.scores.top(1)[:, 0].tolist()  # (nodes + 1,) first ROOT's
    inner, done = set(draft.parents), set()
    for leaf in range(len(draft)):
        if leaf in inner or leaf in accepted:
            continue
        path = [ROOT, *draft.path(leaf)]
        choices = [likeliest[node + 1] for node in path]
        for start in range(len(path) - pool.length + 1):
            end = path[start + pool.length - 1]
            if end in accepted or end == ROOT or end in done:  # part of the text, or added for another leaf
                continue
            done.add(end)
            token = draft.tokens[path[start]] if path[start] != ROOT else text[-1]
            pool.add(token, tuple(choices[start : start + pool.length]))
