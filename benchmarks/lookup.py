"""What a lookup costs: proposals of the drafters that need no model, after a long text, and their indexes.

python -m benchmarks lookup --source stdlib --history 32768
"""

from __future__ import annotations

import argparse
import math
import os
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks.claims import Claim
from csdraft.data.sources import read_rows
from csdraft.decoding.call import Call
from csdraft.decoding.interfaces import Budget, Context, Drafter
from csdraft.decoding.processing import Processing
from csdraft.decoding.sampling import Sampler
from csdraft.decoding.scores import TokenChooser
from csdraft.decoding.stopping import Stopping
from csdraft.decoding.text import Text
from csdraft.drafters.datastore import Datastore
from csdraft.drafters.lookahead import Lookahead
from csdraft.drafters.max_gram import MaxGram
from csdraft.drafters.n_grammys import NGrammys
from csdraft.drafters.prompt_lookup import PromptLookup
from csdraft.drafters.reference import Reference
from csdraft.drafters.suffix import Suffix
from csdraft.drafters.token_recycling import TokenRecycling
from csdraft.tables.adjacency import KEPT, AdjacencyTable
from csdraft.tables.corpus import CorpusIndex
from csdraft.tables.documents import DocumentTable
from csdraft.tables.outputs import OutputTable
from csdraft_command import COUNT

__all__ = ["Lookup", "lookup_claims", "lookup_table", "measure_lookups"]

HISTORY, PROPOSALS, OUTPUT, REPETITIONS = 32_768, 1_000, 512, 3
MICROSECONDS, TOKENS_A_SECOND = 50.0, 0.3e6


@dataclass(frozen=True)
class Lookup:
    """One drafter.

    Attributes:
        microseconds: of a proposal, wall time, median; each also reads one new token, and is the fastest of some
            passes over the same text, since other programs only ever add to it.
        cpu_microseconds, mean, slow: the same by the processor time of this thread, which other programs disturb less:
            median, mean and 95th percentile.
        drafted: tokens a proposal, mean.
        tokens: that its index was built from.
        rate: of these a second of processor time; nan where a target fills the table while it decodes.
        bytes: of memory a token while the index is used; on disk where it is mapped from there.
    """

    drafter: str
    microseconds: float
    cpu_microseconds: float
    mean: float
    slow: float
    drafted: float
    tokens: int
    rate: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """A drafter, and what makes its index: of the text itself, or of other texts; or it is a target that fills it."""

    name: str
    make: Callable[[Any], Drafter]
    build: Callable[[Sequence[int]], Any] | None = None
    reads: bool = True


def outputs_of(tokens: Sequence[int]) -> OutputTable:
    """A table of the default size that has taken in these tokens, as outputs of one length."""
    table = OutputTable()
    for start in range(0, len(tokens), OUTPUT):
        table.add(tokens[start : start + OUTPUT])
    return table


def documents_of(tokens: Sequence[int]) -> DocumentTable:
    """A table of the first of these tokens, as long a document as the text is by default."""
    table = DocumentTable([tokens[:HISTORY]])
    assert table.automaton.read
    return table


def adjacency_of(tokens: Sequence[int]) -> AdjacencyTable:
    """A table that knows the most frequent successors of each of these tokens, in the target's stead."""
    counts: dict[int, Counter[int]] = {}
    for token, following in pairwise(tokens):
        counts.setdefault(token, Counter())[following] += 1
    table = AdjacencyTable(max(tokens) + 1)
    for token, those in counts.items():
        best = [successor for successor, _ in those.most_common(KEPT)]
        table.update(np.array([token]), np.array([(best * KEPT)[:KEPT]]))
    return table


CASES = (
    Case("prompt_lookup", lambda _: PromptLookup()),
    Case("max_gram", lambda _: MaxGram()),
    Case("n_grammys, up to 100", lambda _: NGrammys()),
    Case("lookahead", lambda _: Lookahead()),
    Case("token_recycling, tree of 80", lambda table: TokenRecycling(table=table), adjacency_of, reads=False),
    Case("suffix", lambda _: Suffix()),
    Case("suffix, tree of 16", lambda _: Suffix(nodes=16)),
    Case("suffix with earlier outputs", lambda table: Suffix(outputs=table), outputs_of),
    Case("reference", lambda table: Reference(table), documents_of),
    Case("datastore, tree of 16", lambda index: Datastore(index, nodes=16), lambda ids: CorpusIndex.build([ids])),
    Case("datastore, tree of 64", lambda index: Datastore(index), lambda ids: CorpusIndex.build([ids])),
)


def measure_lookups(
    tokens: Sequence[int], vocab: int, history: int = HISTORY, proposals: int = PROPOSALS
) -> list[Lookup]:
    """All cases: the first tokens are the text, those that follow are committed one by one, the rest is looked up in.

    Raises:
        ValueError: there are too few tokens.
    """
    used = history + proposals
    if len(tokens) < used + history:
        raise ValueError(f"{len(tokens)} tokens are too few for a history of {history}; {used + history} are needed")
    return [_measured(case, tokens[:used], tokens[used:], vocab, history) for case in CASES]


def _measured(case: Case, text: Sequence[int], others: Sequence[int], vocab: int, history: int) -> Lookup:
    build = case.build
    if build is None:
        table, size, read = None, history, text[:history]
        seconds, held = _cost(lambda: _opened(case.make(None), read, vocab))
    else:
        table = build(others)
        size = len(table)
        seconds, held = _cost(lambda: build(others))
        held = table.nbytes if isinstance(table, CorpusIndex) else held
    passes = [_proposed(case.make(table), text, vocab, history) for _ in range(REPETITIONS)]
    wall, cpu, drafted = (np.min(times, axis=0) for times in zip(*passes, strict=True))
    taken = len(others) if isinstance(table, OutputTable) else size  # of which it may have forgotten some
    rate = taken / seconds if case.reads else math.nan
    times = float(np.median(wall)), float(np.median(cpu)), float(cpu.mean()), float(np.quantile(cpu, 0.95))
    return Lookup(case.name, *times, float(drafted.mean()), size, rate, held / size)


def _proposed(
    drafter: Drafter, text: Sequence[int], vocab: int, history: int
) -> tuple[list[float], list[float], list[int]]:
    """Wall and processor time of each proposal in microseconds, and how many tokens it had."""
    context, budget = _opened(drafter, text[:history], vocab), Budget(drafter.depth, drafter.depth)
    wall, cpu, drafted = [], [], []
    for token in text[history:]:
        context.text.append([token])
        started, busy = time.perf_counter(), time.thread_time()
        (draft,) = drafter.propose([context], [budget])
        cpu.append(1e6 * (time.thread_time() - busy))
        wall.append(1e6 * (time.perf_counter() - started))
        drafted.append(len(draft))
    return wall, cpu, drafted


def _opened(drafter: Drafter, tokens: Sequence[int], vocab: int) -> Context:
    """A call's only row, after a first proposal, which reads the text."""
    chooser = TokenChooser(Processing([], 1), Stopping([]), Sampler(True, [0], vocab))
    text = Text(torch.tensor(tokens))
    context = Context(0, text, Call(nn.Identity(), chooser, [text], len(tokens), None))
    drafter.propose([context], [Budget(1, 1)])
    return context


def _cost(make: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of processor time, least of some, and bytes that are held afterwards."""
    seconds = []
    for _ in range(REPETITIONS):
        started = time.thread_time()
        made = make()
        seconds.append(time.thread_time() - started)
        del made
    tracemalloc.start()
    made = make()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return min(seconds), held


def lookup_claims(found: Sequence[Lookup]) -> list[Claim]:
    """What a proposal may cost, and how fast an index must be built."""
    claims = []
    for one in found:
        words = f"{one.drafter}: a proposal takes at most {MICROSECONDS:.0f} microseconds"
        figure = f"{one.cpu_microseconds:.1f}"
        claims.append(Claim(words, figure, one.cpu_microseconds, MICROSECONDS, most=True))
    for one in (one for one in found if not math.isnan(one.rate)):
        words = f"{one.drafter}: its index reads at least {TOKENS_A_SECOND / 1e6:g} M tokens/s"
        claims.append(Claim(words, f"{one.rate / 1e6:.2f} M", one.rate, TOKENS_A_SECOND))
    return claims


def lookup_table(found: Sequence[Lookup]) -> str:
    """Markdown, one line a drafter."""
    heads = ("drafter", "us a proposal", "CPU us", "mean", "95 %", "drafted", "indexed", "M tokens/s", "bytes a token")
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for one in found:
        times = [f"{value:.1f}" for value in (one.microseconds, one.cpu_microseconds, one.mean, one.slow, one.drafted)]
        cells = [
            one.drafter,
            *times,
            f"{one.tokens:,}",
            "" if math.isnan(one.rate) else f"{one.rate / 1e6:.2f}",
            f"{one.bytes:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit status is 0 if every claim passed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks lookup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="models/smol-target", help="default: %(default)s")
    parser.add_argument("--source", default="stdlib", help="texts, as training reads them (default: %(default)s)")
    parser.add_argument("--limit", type=COUNT, default=150, help="examples read (default: %(default)s)")
    parser.add_argument("--history", type=COUNT, default=HISTORY, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--proposals", type=COUNT, default=PROPOSALS, help="timed (default: %(default)s)")
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    rows = read_rows(options.source, tokenizer, 1 << 20, limit=options.limit)
    tokens = [token for row in rows for token in row["input_ids"]]
    found = measure_lookups(tokens, len(tokenizer), options.history, options.proposals)
    claims = lookup_claims(found)
    print(f"{options.history:,} tokens of text, {os.cpu_count()} CPU cores\n\n{lookup_table(found)}\n")
    print("\n".join(map(str, claims)))
    return 0 if all(claim.passed for claim in claims) else 1
