"""The options of a call in one object: `model.generate(**inputs, assistant=..., options=csdraft.Options(...))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any, Literal

from csdraft import spec
from csdraft.decoding.graphs import Mode
from csdraft.decoding.interfaces import Schedule, Verifier
from csdraft.stored import check_keys, fit, kind_of, shown

__all__ = ["DEFAULTS", "NAMES", "SCHEDULE", "VERIFIER", "Options", "split"]

VERIFIER, SCHEDULE = "match", "cost_model"
"""The defaults of a cascade."""


@dataclass(frozen=True)
class Options:
    """How a call decodes. Each field is also a keyword of `generate(..., assistant=...)` with the same name.

    A field that is None takes the cascade's own option, or else the default. A field that is given both here and as a
    keyword of the same call must have the same value.

    Args:
        verifier: acceptance rule at the target, by name or as an object. Default: "match".
        schedule: how much to draft each round, by name or as an object. Default: "cost_model".
        graphs: how forwards run. "auto" (default) records those of drafted tokens on devices with graphs (CUDA). On a
            CPU it makes a second copy of large weights, in the layout that the kernels read; `csdraft.release()`
            frees it. "compile" compiles each shape, which takes half a minute. False: the model's own forward.
        reuse: True (default) lets models continue from text that they read in earlier calls, such as a chat's last
            turn, and keeps what they read now; `csdraft.release()` frees it.
        strict: True raises an error when a drafter fails; False (default) continues without the drafter.
        diagnose: True compares expected with measured rejections in the report; False is the default. It works with
            verifiers of independent draws, and compares two distributions at each verified token.
        row_seeds: one whole number per row, which decides what is sampled. Default: drawn from torch's CPU generator.

    Raises:
        ValueError: a field does not take this value.
    """

    verifier: Verifier | str | Mapping[str, Any] | None = None
    schedule: Schedule | str | Mapping[str, Any] | None = None
    graphs: Mode | None = None
    reuse: bool | None = None
    strict: bool | None = None
    diagnose: bool | None = None
    row_seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("verifier", "schedule"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, spec.resolve(f"{name}s", value))
        for name, kind in SAVED.items():
            if (value := getattr(self, name)) is not None:
                fit(value, kind, name)
        if self.row_seeds is not None:
            try:
                seeds = tuple(index(seed) for seed in self.row_seeds)  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                given = f"row_seeds={shown(self.row_seeds)} is {kind_of(self.row_seeds)}"
                raise ValueError(f"{given}; give one whole number per row") from error
            object.__setattr__(self, "row_seeds", seeds)

    @classmethod
    def of(cls, options: Any, **keywords: Any) -> Options:
        """The options of one call.

        Args:
            options: the call's `Options`, or None.
            keywords: fields given one by one; None means not given.

        Raises:
            ValueError: `options` is something else, or a field is given twice with different values.
        """
        if options is not None and not isinstance(options, Options):
            raise ValueError(f"options={options!r} is {kind_of(options)}; give csdraft.Options(...)")
        single = cls(**keywords)
        for name, value in single.given().items():
            other = getattr(options, name, None)
            if other is not None and other is not value and other != value:
                raise ValueError(
                    f"{name}={value!r} and options.{name}={other!r} are two values for one option; give one of them"
                )
        return single if options is None else single.or_else(options)

    def given(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}

    def or_else(self, other: Options) -> Options:
        """These options, with fields that are None taken from `other`."""
        return replace(other, **self.given())

    # Saved with a cascade.

    def to_json(self) -> dict[str, Any]:
        """The fields that cascade.json has under `options`; verifier and schedule have their own keys there."""
        return {name: value for name, value in self.given().items() if name in SAVED}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], at: str) -> Options:
        """The inverse of `to_json`; errors are ValueErrors that name the place `at` and the key."""
        check_keys(values, SAVED, at)
        return cls(**{name: fit(value, SAVED[name], f"{at}.{name}") for name, value in values.items()})


NAMES = tuple(field.name for field in fields(Options))
"""All fields, which are also keywords of `generate`."""
Switch = Literal[True, False]
SAVED: dict[str, Any] = {"graphs": Mode, "reuse": Switch, "strict": Switch, "diagnose": Switch}
"""The fields that are saved with a cascade under `options`, and their types. Seeds belong to one call."""
DEFAULTS = Options(verifier=VERIFIER, schedule=SCHEDULE)
"""What a call decodes with that names neither. It is made once, since making it takes longer than a call's options."""


def split(options: Any, verifier: Any, schedule: Any) -> tuple[Verifier, Schedule, Options]:
    """A cascade's verifier and schedule, which may also be given in its options, and the options without them.

    Raises:
        ValueError: a verifier or schedule is given in both places with different values, or the options have seeds.
    """
    if getattr(options, "row_seeds", None) is not None:
        raise ValueError(
            f"options.row_seeds={options.row_seeds} in a cascade: seeds belong to one call, so give them to generate"
        )
    verifier, schedule = None if verifier == VERIFIER else verifier, None if schedule == SCHEDULE else schedule
    given = Options.of(options, verifier=verifier, schedule=schedule)
    found: Any = given.or_else(DEFAULTS)
    return found.verifier, found.schedule, replace(given, verifier=None, schedule=None)
