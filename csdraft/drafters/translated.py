"""Translated: uses a drafter with another tokenizer, by decoding its draft to text and encoding it again.

Universal assisted generation (Hugging Face, 2024; Timor et al., arXiv 2502.05202): the drafter reads the text in its
own tokens. Its draft is decoded, encoded with the target's tokenizer, and drafted as point masses. Use it only if no
small model shares the target's vocabulary: more of such a model's draft is accepted. For decoder-only targets.

Only the end of a text is translated each round. The rest is settled, up to a place where both tokenizers split the
text. If a text is not split as its tokenizer would split it, acceptance may fall, but the output stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.decoding.processing import Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.drafters._check_parts import check_parts
from csdraft.drafters._lookup import until
from csdraft.models import MOST_VOCABULARY_PADDING
from csdraft.stored import kind_of, shown

__all__ = ["Translated"]

OPEN, KEPT_OPEN, MOST_OPEN = 32, 8, 128
"""Open target tokens are translated again each round. With more than OPEN, all but about KEPT_OPEN are settled at a
place where both tokenizers split the text; with more than MOST_OPEN, at any place."""
PARTIAL = "\ufffd"
"""A character with missing bytes decodes to this."""
STAND_IN = "a"
"""Comes before open tokens instead of the settled text, because tokenizers may treat the start of a text specially."""


@dataclass(frozen=True, eq=False)
class Translated(Drafter):
    """Drafts with a drafter of another tokenizer, always greedily (see the module).

    Args:
        drafter: reads and writes tokens of its own tokenizer. It does not learn from the target's rounds.
        tokenizer: the drafter's tokenizer, or a path or Hub id to load it from (only these can be saved).
        target_tokenizer: the same for the target.
    """

    drafter: Drafter
    tokenizer: PreTrainedTokenizerBase | str | Path
    target_tokenizer: PreTrainedTokenizerBase | str | Path
    own: TokenizerView = field(init=False, repr=False)
    theirs: TokenizerView = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_parts(self, (self.drafter,))
        object.__setattr__(self, "own", TokenizerView(self.tokenizer))
        object.__setattr__(self, "theirs", TokenizerView(self.target_tokenizer, "target_tokenizer"))

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.drafter.depth

    def check(self, call: Call) -> None:
        if call.sources is not None:
            raise ValueError("Translated drafts for decoder-only targets; this one is an encoder-decoder")
        if self.theirs.size > call.vocab + MOST_VOCABULARY_PADDING:
            raise ValueError(
                f"target_tokenizer has {self.theirs.size} tokens, the target {call.vocab}; give the target's own"
            )
        if self.drafter.taps():
            raise ValueError(
                "a drafter that reads hidden states of the target cannot be translated: they belong to the target's "
                "own tokens; use it without Translated"
            )
        self.drafter.check(self._inner(call))

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        inner, drafts = self._inner(contexts[0].call), [context.draft for context in contexts]
        asked = {}
        for i, (context, budget) in enumerate(zip(contexts, budgets, strict=True)):
            reading = self._reading(context, inner)
            tokens = reading.translate(context)
            if tokens and min(budget.depth, budget.room) > 0:
                start = Context(context.row, reading.text, inner, Draft.chain(tokens))
                asked[i] = (start, replace(budget, skip=0, confidence=False))
        if not asked:
            return drafts
        starts, wanted = zip(*asked.values(), strict=True)
        for i, start, draft in zip(asked, starts, self.drafter.propose(starts, wanted), strict=True):
            context, budget = contexts[i], budgets[i]
            new = [draft.tokens[node] for node in draft.path(draft.tip)]
            tokens = self._reading(context, inner).translate_back(context, new, len(start.draft))
            tokens = list(takewhile(context.call.vocab.__gt__, tokens))  # the target's tokenizer may have a few more
            drafts[i] = context.draft.extend(tokens[: min(budget.depth, budget.room)], context.call.level(self))
        return drafts

    def _reading(self, context: Context, inner: Call) -> _Reading:
        return context.call.memo(
            (self, context.row), lambda: _Reading(self, inner.texts[context.row], context.text.tokens)
        )

    def _inner(self, call: Call) -> Call:
        """The call that the inner drafter sees, with texts in the drafter's tokens."""
        return call.memo((self, Call), lambda: self._open(call))

    def _open(self, call: Call) -> Call:
        models: list[Any] = self.drafter.models()
        known = models[0].config.get_text_config(decoder=True).vocab_size if models else self.own.size
        if self.own.size > known + MOST_VOCABULARY_PADDING:
            raise ValueError(f"tokenizer has {self.own.size} tokens, the drafter {known}; give the drafter's own")
        vocab = max(known, self.own.size)  # tokens that were added to the tokenizer alone are clamped
        sampler = Sampler(True, [0] * call.rows, vocab)
        chooser = TokenChooser(Processing([], call.rows), Stopping([], self.own.eos), sampler)
        texts = [Text(torch.tensor(self.own.opening, dtype=torch.long, device="cpu")) for _ in range(call.rows)]
        return Call(models[0] if models else call.target, chooser, texts, call.capacity, None)


class TokenizerView:
    """A copy of a tokenizer that does not pad or truncate, and adds no special tokens.

    Args:
        name: the option that gave it, for messages.

    Attributes:
        size: number of tokens.
        opening: tokens that the tokenizer puts before a text.
        eos: tokens that end a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | str | Path, name: str = "tokenizer"):
        if not isinstance(tokenizer, str | Path | PreTrainedTokenizerBase):
            kind = kind_of(tokenizer)
            raise ValueError(f"{name}={shown(tokenizer)} is {kind}; give a tokenizer, its path or Hub id")
        loaded: Any = tokenizer
        if isinstance(tokenizer, str | Path):
            loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        if not loaded.is_fast:
            raise ValueError(f"{type(loaded).__name__} is written in Python; Translated needs a tokenizer.json")
        self.backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = len(loaded)
        opening = self.backend.encode(STAND_IN).ids[:1]
        self.opening = opening if opening == [loaded.bos_token_id] else []
        self.bos = loaded.bos_token_id
        self.eos = frozenset() if loaded.eos_token_id is None else frozenset({loaded.eos_token_id})
        self.before = self.backend.encode(STAND_IN, add_special_tokens=False).ids
        self.skipped = len(self.backend.decode(self.before, skip_special_tokens=False))

    def encode(self, text: str, opens: bool) -> list[int]:
        """Token ids of a piece of text; `opens` says whether the text begins with it."""
        if not opens:
            tokens = self.backend.encode(STAND_IN + text, add_special_tokens=False).ids
            if tokens[: len(self.before)] == self.before:
                return tokens[len(self.before) :]
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int], opens: bool) -> str:
        """The text of these tokens; `opens` says whether the text begins with them."""
        if opens:
            return self.backend.decode(tokens, skip_special_tokens=False)
        return self.backend.decode([*self.before, *tokens], skip_special_tokens=False)[self.skipped :]


class _Reading:
    """A row's text in the drafter's tokens: settled ones, and open ones, which are encoded again each round.

    Args:
        drafter: has the tokenizers.
        text: the settled tokens.
        tokens: the row's text in the target's tokens.
    """

    def __init__(self, drafter: Translated, text: Text, tokens: Sequence[int]):
        self.own, self.theirs, self.text = drafter.own, drafter.theirs, text
        self.settled = int(tokens[:1] == [drafter.theirs.bos])  # number of target tokens that are settled
        self.opens = True  # whether the text begins with the open tokens
        self.end = ""
        """The text of the open tokens, without an incomplete last character."""

    def translate(self, context: Context) -> list[int]:
        """The open part of the text in the drafter's tokens."""
        if len(context.text) - self.settled > OPEN:
            self._settle(context.text.tokens[self.settled :])
        self.end = self.theirs.decode(self._open(context), self.opens).rstrip(PARTIAL)
        return self.own.encode(self.end, self.opens)

    def _open(self, context: Context) -> list[int]:
        return [*context.text.tokens[self.settled :], *(context.path if len(context.draft) else ())]

    def _settle(self, tokens: list[int]) -> None:
        """Settles all but the last of `tokens`, if possible up to a space, where the rest encodes the same alone."""
        whole = self.theirs.decode(tokens, self.opens)
        written = self.own.encode(whole, self.opens)
        last = len(tokens) - KEPT_OPEN
        for spaced in (True, False):
            for cut in range(last, max(last - OPEN, 0), -1):
                rest = self.theirs.decode(tokens[cut:], False)
                if PARTIAL in rest or not whole.endswith(rest) or (spaced and not rest[:1].isspace()):
                    continue
                remaining = self.own.encode(rest, False)
                if written[len(written) - len(remaining) :] == remaining:
                    return self._close(written[: len(written) - len(remaining)], cut)
        if len(tokens) > MOST_OPEN:
            self._close(self.own.encode(self.theirs.decode(tokens[:last], self.opens), self.opens), last)

    def _close(self, written: list[int], number: int) -> None:
        self.text.append(written)
        self.settled += number
        self.opens = False

    def translate_back(self, context: Context, tokens: list[int], known: int) -> list[int]:
        """The drafter's new tokens, those after the first `known`, in the target's tokens."""
        new = until(self.own.eos, tokens[known:])
        ended = not self.own.eos.isdisjoint(new[-1:])
        before = self.own.decode(tokens[:known], self.opens)
        after = self.own.decode(tokens[: known + len(new) - ended], self.opens)
        written = after[len(before) :].rstrip(PARTIAL)
        old = self._open(context)
        translated = self.theirs.encode(self.end + written, self.opens)
        if translated[: len(old)] == old:
            found = translated[len(old) :]
        elif self.theirs.decode(old, self.opens) == self.end:  # the tokenizer would split the text differently
            found = self.theirs.encode(written, False)
        else:
            return []
        return [*found, *(self.theirs.eos if ended else ())]
