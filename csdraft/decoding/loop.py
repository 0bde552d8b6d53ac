"""The decoding loop, written once: `generate` calls `run` when an assistant is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import NOTHING, Context, Drafter, Schedule, Verifier
from csdraft.decoding.ledger import Ledger
from csdraft.decoding.output import Output
from csdraft.decoding.processing import Processing
from csdraft.decoding.reader import Sources
from csdraft.decoding.readers import ALONE, ReadingOptions
from csdraft.decoding.rounds import run_round
from csdraft.decoding.safe_drafter import SafeDrafter
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.decoding.together import Together, check_rule, names_of_custom_code

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["open_call", "run"]

CAPACITY_AHEAD = 8192
BUCKET = 64


def run(
    call: Call, drafter: Drafter | None, verifier: Verifier, schedule: Schedule, output: Output, strict: bool = False
) -> None:
    """Generates all rows of a call to their ends; costs and results go into the call's ledger.

    Every round is the same: the schedule says how much to draft, the drafter drafts it, the target scores it in one
    forward, the verifier decides, and what it emits is committed. With nothing drafted a round is plain decoding.

    Args:
        call: target, texts and randomness.
        drafter: the source of drafts; None decodes plainly.
        verifier: the acceptance rule at the target.
        schedule: how much to draft each round.
        output: takes the emitted tokens (streamer, scores).
        strict: raise when a drafter fails instead of continuing without it.
    """
    target, ledger, stopping = call.session(call.target), call.ledger, call.chooser.stopping
    safe = drafter if isinstance(drafter, SafeDrafter) else SafeDrafter(drafter, verifier, strict)
    live = list(range(call.rows))
    ledger.start(target.reader.device)
    while live:
        ledger.begin()
        contexts = [Context(row, call.texts[row], call) for row in live]
        unpadded = [context for context in contexts if context.row not in call.rows_of_padding]
        # One drafted token less than may follow, since the target adds one itself.
        rooms = [min(stopping.remaining(c.text) - 1, target.room(c.row, c.text)) for c in unpadded]
        allowed = dict(zip(unpadded, safe.budgets(schedule, unpadded, rooms), strict=True))
        budgets = [allowed.get(context, NOTHING) for context in contexts]
        rounds = run_round(contexts, target, safe, verifier, budgets)
        with ledger.paused():  # a streamer may take its time
            output.take(rounds)
        of_text = [finished for finished in rounds if finished.context in allowed]
        safe.observe(of_text)
        for context, finished in zip(contexts, rounds, strict=True):
            context.text.append(finished.tokens)
            call.sampler.forget(context.row, len(context.text))
        safe.learn(schedule, of_text, *ledger.latest)
        ended = {r.context.row for r in rounds if r.verdict.ended}
        if ended:
            live = [row for row in live if row not in ended]
            if live:
                call.retire(live)
        # Scores are large, and the next forward needs as much room.
        del contexts, unpadded, allowed, rounds, of_text, context, finished
    call.note_memory()
    safe.attempt(lambda _: schedule.finish(), None)
    ledger.stop()
    ledger.plain_step = safe.attempt(lambda _: schedule.plain_seconds(), 0.0)
    ledger.why, ledger.failure = safe.attempt(lambda _: schedule.why(), ""), safe.failure


def open_call(
    model: nn.Module,
    input_ids: Tensor,
    processors: Sequence,
    criteria: Sequence,
    config: GenerationConfig,
    verifier: Verifier,
    row_seeds: Sequence[int] | None,
    sources: Sources | None,
    mask: Tensor | None,
    past: Any,
    reading: ReadingOptions = ALONE,
    ledger: Ledger | None = None,
) -> Call:
    """The call that `generate` has prepared: texts without padding, its token chooser, the cache if the user gave one.

    Args:
        input_ids: (rows, length) prompts, or decoder starts.
        mask: (rows, length) 1 where a token counts; None if all do.
        past: the user's own filled cache, or None.
        reading: how the models read.
        ledger: records the call's costs and results.
    """
    rows = input_ids.shape[0]
    texts = [Text(ids, None if mask is None else mask[row]) for row, ids in enumerate(input_ids)]
    vocab = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
    if not row_seeds:  # from torch's global generator, so that `torch.manual_seed` governs sampling
        row_seeds = torch.randint(0, 2**62, (rows,), device="cpu").tolist() if config.do_sample else [0] * rows
    sampler = Sampler(not config.do_sample, row_seeds, vocab, verifier.draws)
    stopping = Stopping(criteria)
    longest = max(len(text) for text in texts)
    ahead = min(max(stopping.remaining(text) for text in texts), CAPACITY_AHEAD)
    capacity = -(-(longest + ahead + BUCKET) // BUCKET) * BUCKET
    chooser = TokenChooser(Processing(processors, rows), stopping, sampler, drawn=not sampler.greedy)
    together = None
    if rows > 1 and (custom := names_of_custom_code(chooser.processing, stopping)):
        check_rule(verifier, sampler.greedy, custom)
        together = Together(chooser, input_ids, config)
    if past is not None:
        reading = replace(reading, reuse=False)
    call = Call(model, chooser, texts, capacity, sources, together, reading, ledger)
    if past is not None:
        kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        call.session(model).preload(past, texts, kept[:, : int(past.get_seq_length())])
    return call
