"""How a call went: rounds, block efficiency, acceptance by level and depth, tokens and seconds by model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdraft.decoding.ledger import ModelUse
from csdraft.reports.rejections import Rejections
from csdraft.reports.tally import Tally
from csdraft.stored import check_keys, fit, naming, read_object, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelUse", "Planned", "Report"]

FORMAT = 1
MOST_TOKENS = 1 << 31
MOST_FAILURES = 16
"""Different messages that an accumulated report keeps."""


@dataclass(frozen=True)
class Planned:
    """What the planner expected of the cascade that it chose (`k_matrix="auto"`), its whole matrix every round.

    Attributes:
        drafters: the names of those it kept.
        k_matrix: of these.
        tokens_per_round: block efficiency.
        speedup: over plain `generate`, one text at a time.
        plain_seconds: a token of plain `generate`, as timed while planning.
    """

    drafters: list[str]
    k_matrix: list[list[int]]
    tokens_per_round: float
    speedup: float
    plain_seconds: float


@dataclass
class Report:
    """Counts of one call, or of several merged; the text itself is that of the last call.

    Attributes:
        calls: calls to `generate`.
        target_calls: forwards of the target, whatever the batch.
        cut: draft tokens that a K matrix asks for and that the budget, or the room in the text, did not allow.
        seconds: in the decoding loop, from the first round to the last, without what a streamer took.
        reviews: what each reviewer decided, by its name; "target" is the target.
        models: what each model did, by its name; "target" is the target.
        failures: how often a drafter failed and was left out, by message.
        rejections: the target's, expected and measured, of the calls that asked for them (`diagnose=True`).
        planned: what was expected of the last call's cascade, if a planner chose it.
        why: of the last call, the schedule's reasons in a sentence.
        tokens: of the last call, per row, the emitted tokens.
        levels: per row, the level of each emitted token, an index into `level_names`.
        lengths: per row, the tokens that each round emitted.
        level_names: "target", then the drafters.
        rejected: per row, of each round the (level, tokens) that were drafted and not kept; empty if it was not noted.
        drafting: of `seconds`, those that went into drafting.
        plain_seconds: that plain decoding would have taken for the texts of the calls of one row whose schedule had
            measured a plain step, and `compared_seconds` that these calls took.
    """

    calls: int = 1
    target_calls: int = 0
    cut: int = 0
    seconds: float = 0.0
    reviews: dict[str, Tally] = field(default_factory=dict)
    models: dict[str, ModelUse] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    rejections: Rejections | None = None
    planned: Planned | None = None
    why: str = ""
    tokens: list[list[int]] = field(default_factory=list, repr=False)
    levels: list[list[int]] = field(default_factory=list, repr=False)
    lengths: list[list[int]] = field(default_factory=list, repr=False)
    level_names: list[str] = field(default_factory=list, repr=False)
    rejected: list[list[list[tuple[int, int]]]] = field(default_factory=list, repr=False)
    drafting: float = 0.0
    plain_seconds: float = 0.0
    compared_seconds: float = 0.0

    # Reading.

    @property
    def target(self) -> Tally:
        """What the target decided."""
        return self.reviews.get("target", Tally())

    @property
    def rounds(self) -> int:
        """Rounds, counted per row: how often the target was called for some row's text."""
        return self.target.rounds

    @property
    def plain_rounds(self) -> int:
        """Rounds for which nothing was drafted."""
        return self.target.plain

    @property
    def emitted(self) -> int:
        """Tokens generated."""
        return self.target.emitted

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens a round: what one target call yields for a row; plain decoding has 1.

        Nothing is left out: a row's first round reads the prompt and reviews a draft in one forward, so it counts as
        a call like any other, and what it emits counts too.
        """
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tried draft tokens under the target."""
        tried = self.target.tried.total()
        return self.target.accepted.total() / tried if tried else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens of all rows / seconds in the loop."""
        return self.emitted / self.seconds if self.seconds else 0.0

    @property
    def speedup(self) -> float | None:
        """About how many times as fast as plain decoding it was, as `speedup_from` says; None if it is not known."""
        if self.compared_seconds:
            return self.plain_seconds / self.compared_seconds
        if self.planned is not None and len(self.tokens) == 1 and self.seconds:  # a batch is another matter
            return self.planned.plain_seconds * self.emitted / self.seconds
        return None

    @property
    def speedup_from(self) -> str:
        """What the speedup is an estimate from."""
        if self.compared_seconds:
            return (
                f"plain decoding would have taken about {self.plain_seconds:.2f} s instead of "
                f"{self.compared_seconds:.2f} s, by the price of a plain step that the schedule measured"
            )
        if self.speedup is not None:
            return "compared with plain decoding as it was timed when the cascade was planned"
        return "how much faster than plain decoding is not known, since no plain step was measured"

    @property
    def loop_seconds(self) -> float:
        """Seconds outside the models' forwards: comparing, choosing, bookkeeping, and drafters without a model."""
        return max(self.seconds - sum(use.seconds for use in self.models.values()), 0.0)

    # Accumulating.

    def merged(self, other: Report) -> Report:
        """The counts of both; the text of `other`, or this one's if that has none."""
        last = other if other.calls else self
        failures, own, others = self.failures + other.failures, self.rejections, other.rejections
        rejections = own.merged(others) if own and others else own or others
        return Report(
            self.calls + other.calls,
            self.target_calls + other.target_calls,
            self.cut + other.cut,
            self.seconds + other.seconds,
            _merged(self.reviews, other.reviews),
            _merged(self.models, other.models),
            Counter(dict(failures.most_common(MOST_FAILURES))),
            rejections,
            last.planned,
            last.why,
            last.tokens,
            last.levels,
            last.lengths,
            last.level_names,
            last.rejected,
            self.drafting + other.drafting,
            self.plain_seconds + other.plain_seconds,
            self.compared_seconds + other.compared_seconds,
        )

    __add__ = merged

    # Saving.

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries; `summary` is for readers, `from_dict` skips it."""
        derived = ("rounds", "emitted", "block_efficiency", "acceptance_rate", "tokens_per_second", "loop_seconds")
        plain = ("calls", "target_calls", "cut", "seconds", "why", "tokens", "levels", "lengths", "level_names")
        return {
            "csdraft_report": FORMAT,
            "summary": {
                **{name: getattr(self, name) for name in (*derived, "speedup")},
                "by_depth": self.target.by_depth,
            },
            **{name: getattr(self, name) for name in (*plain, *NEWER)},
            "reviews": {name: tally.to_dict() for name, tally in self.reviews.items()},
            "models": {name: asdict(use) for name, use in self.models.items()},
            "failures": dict(self.failures),
            "rejections": None if self.rejections is None else asdict(self.rejections),
            "planned": None if self.planned is None else asdict(self.planned),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; ValueError for anything else, which names the key."""
        found = data.get("csdraft_report") if isinstance(data, Mapping) else None
        if found is True or found != FORMAT:
            raise ValueError(f"csdraft_report={shown(found)}, expected {FORMAT}; is this a report that csdraft saved?")
        given = {"rejections": None, "planned": None, "why": "", **NEWER, **data}
        check_keys(given, (*STORED, "csdraft_report", "summary"), "the report")
        if missing := [key for key in STORED if key not in given]:
            raise ValueError(f"the report lacks {', '.join(missing)}")
        values = {key: fit(given[key], kind, key) for key, kind in STORED.items()}
        values["reviews"] = {
            name: Tally.from_dict(tally, f"reviews.{name}") for name, tally in values["reviews"].items()
        }
        report = cls(**{**values, "failures": Counter(values["failures"])})
        report._check_texts()
        return report

    def _check_texts(self) -> None:
        """Raises ValueError unless every token has a level and belongs to a round."""
        if not len(self.tokens) == len(self.levels) == len(self.lengths):
            raise ValueError("tokens, levels and lengths of a report must have equally many rows")
        for row, (tokens, levels, lengths) in enumerate(zip(self.tokens, self.levels, self.lengths, strict=True)):
            if not len(tokens) == len(levels) == sum(lengths) or min(lengths, default=0) < 0:
                raise ValueError(
                    f"tokens[{row}] must have as many entries as levels[{row}] and as lengths[{row}] add up to"
                )
            if tokens and not 0 <= min(tokens) <= max(tokens) < MOST_TOKENS:
                raise ValueError(f"tokens[{row}] must be ids from 0 to {MOST_TOKENS - 1}")
            if levels and not 0 <= min(levels) <= max(levels) < len(self.level_names):
                raise ValueError(
                    f"levels[{row}] must be places in level_names, of which there are {len(self.level_names)}"
                )
        self._check_rejected()

    def _check_rejected(self) -> None:
        """Raises ValueError unless each round says what of its draft was not kept, or none does."""
        if self.rejected and list(map(len, self.rejected)) != list(map(len, self.lengths)):
            raise ValueError("rejected must have the rows and rounds of lengths, or be empty")
        pairs = [pair for row in self.rejected for found in row for pair in found]
        if not all(0 <= level < len(self.level_names) and 0 < tokens < MOST_TOKENS for level, tokens in pairs):
            raise ValueError("rejected must hold places in level_names, each with a number of tokens")

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, which `load` and `csdraft report` read."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """A report from the JSON that `save` wrote; ValueError that names the file for any other."""
        with naming(path):
            return cls.from_dict(read_object(path))

    # Showing.

    def __str__(self) -> str:
        from csdraft.reports.view import terminal

        return terminal(self)

    def _repr_html_(self) -> str:
        from csdraft.reports.page import fragment

        return fragment(self)

    def to_html(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes a page of its own: a sentence, the last call's text coloured by level, its rounds, and the tables.

        Args:
            tokenizer: turns tokens into text; None shows their ids.
        """
        from csdraft.reports.page import page

        Path(path).write_text(page(self, tokenizer), encoding="utf-8")


NEWER: dict[str, Any] = {"rejected": [], "drafting": 0.0, "plain_seconds": 0.0, "compared_seconds": 0.0}
"""What reports of earlier versions lack, and what it is then."""

STORED: dict[str, Any] = {
    **dict.fromkeys(("calls", "target_calls", "cut"), int),
    "seconds": float,
    "why": str,
    **dict.fromkeys(("tokens", "levels", "lengths"), list[list[int]]),
    "level_names": list[str],
    "reviews": dict[str, dict[str, Any]],
    "models": dict[str, ModelUse],
    "failures": dict[str, int],
    "rejections": Rejections | None,
    "planned": Planned | None,
    "rejected": list[list[list[tuple[int, int]]]],
    **dict.fromkeys(("drafting", "plain_seconds", "compared_seconds"), float),
}
"""What `Report.to_dict` writes."""


def _merged(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Key by key."""
    merged = dict(own)
    for name, value in other.items():
        merged[name] = merged[name].merged(value) if name in merged else value
    return merged
