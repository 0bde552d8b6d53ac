"""What csdraft itself costs: the time of a round outside model forwards, for models that cost next to nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.claims import Claim
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Round
from csdraft.decoding.output import RoundStreamer
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.model import ModelDrafter
from csdraft.schedules.fixed import Fixed

__all__ = ["Overhead", "cycle_model", "measure_overhead", "overhead_claims", "overhead_table"]

VOCABULARY, PERIOD, HIDDEN, SHARPNESS = 32_000, 16, 32, 12.0
CHAIN, SIBLINGS, ROUNDS, CALLS = 8, 8, 60, 3
LENGTHS = (256, 8192)
GREEDY_BASE_MS, MODEL_STEP_MS, SAMPLING_POSITION_MS, TREE_MS = 0.4, 0.05, 0.6, 1.0
GROWTH = 1.25
"""Of the median from the short to the long text: what counts as not growing, given the noise of a clock."""


@dataclass(frozen=True)
class Overhead:
    """One case.

    Attributes:
        milliseconds: of a round outside forwards, median over the rounds after the first, in the quickest of CALLS
            calls: other programs only ever add to it.
        cpu_milliseconds: the same by the processor time of this thread, which other programs disturb less.
        first_round: milliseconds of the first round, which also reads the prompt.
        drafted: tokens a round, mean; the case is only what it says if it is the chain's length.
    """

    drafter: str
    temperature: float
    length: int
    milliseconds: float
    cpu_milliseconds: float
    first_round: float
    drafted: float

    @property
    def name(self) -> str:
        return f"{self.drafter}, {'greedy' if self.temperature == 0 else f'T = {self.temperature:g}'}"


class Stub(LlamaForCausalLM):
    """Times its own calls; cheaper than hooks, whose microseconds would count as csdraft's."""

    clock = staticmethod(time.perf_counter)
    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = self.clock()
        output = super().__call__(*args, **kwargs)
        self.seconds += self.clock() - started
        return output


def cycle_model(vocab: int = VOCABULARY) -> Stub:
    """One layer that adds nothing to the residual: token t is followed by t + 1 modulo the period, nearly always."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2 * max(LENGTHS),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Stub(config).eval()
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        tokens = torch.arange(vocab)
        model.model.embed_tokens.weight.zero_()[tokens, tokens % PERIOD] = 1.0
        head = model.lm_head.weight.zero_()
        following = torch.arange(PERIOD)
        head[following, (following - 1) % PERIOD] = SHARPNESS / HIDDEN**0.5  # the last norm multiplies by it
    return model


@dataclass(frozen=True)
class Fan(Drafter):
    """A tree as wide as it is deep for next to nothing, so that its round is what verifying it costs.

    Of each level's siblings the last is right, and it alone has children.
    """

    depth: int = CHAIN  # type: ignore[assignment]

    def width(self, depth: int) -> int:
        return SIBLINGS * depth

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = []
        for context, budget in zip(contexts, budgets, strict=True):
            (last,), tokens, parents, lead = context.text.tail(1), [], [], context.tip
            for level in range(1, min(budget.depth, budget.room) + 1):
                tokens += [(last + level + other) % PERIOD for other in reversed(range(SIBLINGS))]
                parents += [lead] * SIBLINGS
                lead = len(tokens) - 1
            drafts.append(context.draft.attach(tokens, parents, context.call.level(self)))
        return drafts


TREE = f"tree of {CHAIN * SIBLINGS}"


class RoundClock(RoundStreamer):
    """Notes, after every round, the time and what of it was spent in forwards."""

    def __init__(self, models: Sequence[Stub], clock: Callable[[], float]):
        self.models, self.clock = models, clock
        self.marks: list[tuple[float, float]] = []
        self.drafted: list[int] = []
        for model in models:
            model.clock, model.seconds = clock, 0.0

    def put(self, value: Any) -> None:
        self.marks.append((self.clock(), 0.0))  # the prompt: the loop is about to start

    def put_round(self, finished: Round) -> None:
        self.marks.append((self.clock(), sum(model.seconds for model in self.models)))
        self.drafted.append(finished.drafted)

    def end(self) -> None:
        pass

    @property
    def outside(self) -> list[float]:
        """Milliseconds of each round outside forwards."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [1000 * ((now - then) - (spent - before)) for (then, before), (now, spent) in pairs]


def measure_overhead(
    lengths: Sequence[int] = LENGTHS, rounds: int = ROUNDS, vocab: int = VOCABULARY
) -> list[Overhead]:
    """All cases: both kinds of drafter, greedy and sampling, and a greedy tree, at each length of text."""
    models = cycle_model(vocab), cycle_model(vocab)
    drafters: dict[str, Drafter] = {"MaxGram": MaxGram(), "model drafter": ModelDrafter(models[1])}
    cases = []
    for temperature, some in ((0.0, drafters | {TREE: Fan()}), (1.0, drafters)):
        for name, drafter in some.items():
            for length in lengths:
                one_case(models, drafter, temperature, length, 8)  # warm-up
                wall, cpu = (
                    min((one_case(models, drafter, temperature, length, rounds, c) for _ in range(CALLS)), key=usual)
                    for c in (time.perf_counter, time.thread_time)
                )
                found = usual(wall), usual(cpu), wall.outside[0], statistics.mean(wall.drafted[:-1])
                cases.append(Overhead(name, temperature, length, *found))
    return cases


def usual(clock: RoundClock) -> float:
    """Milliseconds of a round outside forwards, the first and the last left out."""
    return statistics.median(clock.outside[1:-1])


def one_case(
    models: Sequence[Stub],
    drafter: Drafter,
    temperature: float,
    length: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> RoundClock:
    """One call of about so many rounds."""
    target = models[0]
    ids = (torch.arange(length) % PERIOD)[None]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(0)
    streamer = RoundClock(models, clock)
    target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant=drafter,
        schedule=Fixed(CHAIN),
        max_new_tokens=rounds * (CHAIN + 1),
        streamer=streamer,
        reuse=False,
        **sampling,
    )
    return streamer


def bar(case: Overhead) -> float:
    """Milliseconds a round that a case may take."""
    if case.drafter == TREE:
        return TREE_MS
    if case.temperature:
        return SAMPLING_POSITION_MS * case.drafted
    return GREEDY_BASE_MS + (MODEL_STEP_MS * CHAIN if case.drafter != "MaxGram" else 0.0)


def overhead_claims(cases: Sequence[Overhead]) -> list[Claim]:
    """Each case's limit, and that the long text costs what the short one does."""
    claims = []
    for case in cases:
        words = f"a round outside forwards, {case.name}, {case.length} tokens, at most {bar(case):.2f} ms"
        claims.append(Claim(words, f"{case.milliseconds:.2f} ms", case.milliseconds, bar(case), most=True))
    for case in cases:
        if case.length == min(c.length for c in cases):
            longest = max((c for c in cases if c.name == case.name), key=lambda c: c.length)
            growth = longest.milliseconds / case.milliseconds
            words = f"{case.name}: no growth from {case.length} to {longest.length} tokens (at most {GROWTH:g} x)"
            claims.append(Claim(words, f"{growth:.2f} x", growth, GROWTH, most=True))
    return claims


def overhead_table(cases: Sequence[Overhead]) -> str:
    """One line a case."""
    head = ("case", "text", "ms a round", "limit", "CPU ms", "first round ms", "drafted a round")
    rows = [head] + [
        (
            case.name,
            str(case.length),
            f"{case.milliseconds:.3f}",
            f"{bar(case):.2f}",
            f"{case.cpu_milliseconds:.3f}",
            f"{case.first_round:.2f}",
            f"{case.drafted:.1f}",
        )
        for case in cases
    ]
    widths = (26, 6, 12, 7, 8, 16, 17)
    return "\n".join(
        "".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
