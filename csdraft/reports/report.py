"""How a call went: rounds, block efficiency, acceptance by level and depth, tokens and seconds by model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdraft.decoding.ledger import ModelUse
from csdraft.reports.rejections import Rejections
from csdraft.reports.tally import Tally, counted
from csdraft.stored import fit, naming, read_object, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelUse", "Planned", "Report"]

FORMAT = 1
MOST_TOKENS, MOST_DEPTH = 1 << 31, 1 << 20
"""What a file may state: ids of tokens, and depths, are below."""
MOST_FAILURES = 16
"""Different messages that an accumulated report keeps."""


@dataclass(frozen=True)
class Planned:
    """What the planner expects of the cascade that it chose (`k_matrix="auto"`) if each round drafts all of it.

    Attributes:
        drafters: names of the drafters that it kept.
        k_matrix: for these drafters.
        tokens_per_round: block efficiency.
        speedup: over plain `generate`, one text at a time.
        plain_seconds: of a token of plain `generate`, timed during planning.
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
        target_calls: forwards of the target; the forward of a whole batch counts once.
        cut: draft tokens that the K matrix asks for, but the budget or the text's greatest length did not allow.
        seconds: of the decoding loop, from the first round to the last, without the streamer's.
        reviews: what each reviewer decided, by its name; "target" is the target.
        models: what each model did, by its name; "target" is the target.
        failures: how often a drafter failed and was left out, by message.
        rejections: the target's, expected and measured, in calls with `diagnose=True`.
        planned: what the planner expected of the last call's cascade, if it chose that cascade.
        why: the schedule's reasons in the last call, in one sentence.
        tokens: per row, the tokens that the last call emitted.
        levels: per row, the level of each emitted token, an index into `level_names`.
        lengths: per row, the tokens that each round emitted.
        level_names: "target", then the drafters.
        rejected: per row and round, how many tokens were drafted and not kept, as (level, tokens); empty if unknown.
        drafting: the part of `seconds` that was spent drafting.
        plain_seconds: what plain decoding would have taken for the same texts. It is known for calls with one row
            whose schedule measured a plain step; `compared_seconds` is what these calls took.
    """

    calls: int = 1
    target_calls: int = 0
    cut: int = 0
    seconds: float = 0.0
    reviews: dict[str, Tally] = field(default_factory=dict)
    models: dict[str, ModelUse] = field(default_factory=dict)
    failures: Counter = field(default_factory=Counter)
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
        """Rounds, counted for each row: a forward of the target for three rows is three rounds."""
        return self.target.rounds

    @property
    def plain_rounds(self) -> int:
        """Rounds without a draft."""
        return self.target.plain

    @property
    def emitted(self) -> int:
        """Tokens generated."""
        return self.target.emitted

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens per round: what one target call yields for a row; plain decoding has 1.

        First rounds count too: such a round reads the prompt and reviews a draft in one forward.
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
        """An estimate of how many times as fast as plain decoding it was; None if unknown. See `speedup_from`."""
        if self.compared_seconds:
            return self.plain_seconds / self.compared_seconds
        if self.planned is not None and len(self.tokens) == 1 and self.seconds:  # planned for one row
            return self.planned.plain_seconds * self.emitted / self.seconds
        return None

    @property
    def speedup_from(self) -> str:
        """What `speedup` is estimated from."""
        if self.compared_seconds:
            return (
                f"plain decoding would have taken about {self.plain_seconds:.2f} s instead of "
                f"{self.compared_seconds:.2f} s, by the cost of a plain step that the schedule measured"
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
        """The counts of both; the text is that of `other`, or this one's if `other` has no calls."""
        failures, own, others = self.failures + other.failures, self.rejections, other.rejections
        return replace(
            other if other.calls else self,
            **{name: getattr(self, name) + getattr(other, name) for name in ADDED},
            reviews=_merged(self.reviews, other.reviews),
            models=_merged(self.models, other.models),
            failures=Counter(dict(failures.most_common(MOST_FAILURES))),
            rejections=own.merged(others) if own and others else own or others,
        )

    __add__ = merged

    # Saving.

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries. `summary` is for people; `from_dict` skips it."""
        return {
            "csdraft_report": FORMAT,
            "summary": {name: getattr(self, name) for name in SUMMARY} | {"by_depth": self.target.by_depth},
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "reviews": {name: tally.to_dict() for name, tally in self.reviews.items()},
            "models": {name: asdict(use) for name, use in self.models.items()},
            "rejections": None if self.rejections is None else asdict(self.rejections),
            "planned": None if self.planned is None else asdict(self.planned),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; raises a ValueError that names the key for anything else."""
        found = data.get("csdraft_report") if isinstance(data, Mapping) else None
        if found is True or found != FORMAT:
            raise ValueError(f"csdraft_report={shown(found)}, expected {FORMAT}; is this a report that csdraft saved?")
        given = {key: value for key, value in data.items() if key not in ("csdraft_report", "summary")}
        report = fit(given, cls, "report", counted)
        report._check_texts()
        return report

    def _check_texts(self) -> None:
        """Raises ValueError unless every token has a level and belongs to a round, and counts are possible."""
        for name, tally in self.reviews.items():
            if not all(0 <= accepted <= tried <= MOST_DEPTH for accepted, tried in tally.outcomes):
                raise ValueError(f"reviews.{name}.outcomes: 0 <= accepted <= tried <= {MOST_DEPTH} does not hold")
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
        """Raises ValueError unless `rejected` is empty or has an entry for every round."""
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
        """The report in a file that `save` wrote; raises a ValueError that names any other file."""
        document = read_object(path)
        with naming(path):
            return cls.from_dict(document)

    # Showing.

    def __str__(self) -> str:
        from csdraft.reports.view import terminal

        return terminal(self)

    def _repr_html_(self) -> str:
        from csdraft.reports.page import page

        return page(self, notebook=True)

    def to_html(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Writes a web page: a sentence, the last call's text coloured by level, its rounds, and the tables.

        Without a tokenizer, the page shows the ids of tokens.
        """
        from csdraft.reports.page import page

        Path(path).write_text(page(self, tokenizer), encoding="utf-8")


SUMMARY = ("rounds", "emitted", "block_efficiency", "acceptance_rate", "tokens_per_second", "loop_seconds", "speedup")
ADDED = ("calls", "target_calls", "cut", "seconds", "drafting", "plain_seconds", "compared_seconds")
"""Counts and times that are added when reports are merged."""


def _merged(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The values of both; where both have a key, its two values are merged."""
    return own | {name: own[name].merged(value) if name in own else value for name, value in other.items()}
