"""How a call decodes, as one object: `model.generate(**inputs, assistant=..., options=csdraft.Options(...))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from csdraft import spec
from csdraft.decoding.graphs import Mode
from csdraft.decoding.interfaces import Schedule, Verifier
from csdraft.stored import fit, kind_of, shown

__all__ = ["NAMES", "SCHEDULE", "VERIFIER", "Options", "split"]

VERIFIER, SCHEDULE = "match", "cost_model"
"""The defaults of a cascade."""


@dataclass(frozen=True)
class Options:
    """How a call decodes. Each field is also a keyword of `generate(..., assistant=...)` by the same name.

    None leaves a field open: then a cascade's own option counts, and after it the default. A field that is given here
    and as a keyword of the same call must have the same value in both places.

    Args:
        verifier: acceptance rule at the target, by name or as an object. Default: "match".
        schedule: how much to draft each round, by name or as an object. Default: "cost_model".
        graphs: how forwards of drafted tokens run. "auto" (the default) records them where the device has graphs
            (CUDA); "compile" also compiles each shape, which takes half a minute a shape; False runs them eagerly.
        reuse: True (the default) lets models continue from what they read of the same text in earlier calls, such as
            a chat's last turn, and keeps what they read now; `csdraft.release()` frees it.
        strict: True raises an error when a drafter fails; False (the default) continues without the drafter.
        diagnose: True counts expected rejections beside measured ones in the report; False is the default. It works
            with verifiers of independent draws, and costs one comparison of distributions a judged token.
        row_seeds: one whole number a row, which decides what is sampled. Default: drawn from torch's CPU generator.

    Raises:
        ValueError: for a value that a field does not take.
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
        if self.graphs is not None and not any(
            type(self.graphs) is type(mode) and self.graphs == mode for mode in MODES
        ):
            raise ValueError(f"graphs={self.graphs!r} must be 'auto', 'compile' or False")
        for name in SWITCHES:
            if (value := getattr(self, name)) is not None and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is {kind_of(value)}; give True or False")
        if self.row_seeds is not None:
            object.__setattr__(self, "row_seeds", _whole_numbers(self.row_seeds))

    @classmethod
    def of(cls, options: Any, **keywords: Any) -> Options:
        """The options of one call.

        Args:
            options: the call's `Options`, or None.
            keywords: fields that were given one by one; None means not given.

        Raises:
            ValueError: `options` is something else, or a field is given twice with two values.
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
        """These options, and where one is open, the other's."""
        return replace(other, **self.given())

    # Saved with a cascade.

    def to_json(self) -> dict[str, Any]:
        """The fields that cascade.json keeps under `options`; its verifier and schedule have keys of their own."""
        return {name: value for name, value in self.given().items() if name in SAVED}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], at: str) -> Options:
        """What `to_json` wrote; ValueError that names the place `at` and the key if it is something else."""
        if unknown := [name for name in values if name not in SAVED]:
            raise ValueError(f"{at} has the key {shown(unknown[0])}; it takes {', '.join(SAVED)}")
        return cls(**{name: fit(value, SAVED[name], f"{at}.{name}") for name, value in values.items()})


NAMES = tuple(field.name for field in fields(Options))
"""The fields, which are also keywords of `generate`."""
MODES = get_args(Mode)
SWITCHES = ("reuse", "strict", "diagnose")
SAVED: dict[str, Any] = {"graphs": Mode, "reuse": bool, "strict": bool, "diagnose": bool}
"""The fields that are saved with a cascade under `options`, and their types. Seeds belong to one call."""


def _whole_numbers(seeds: Any) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in seeds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row_seeds={shown(seeds)} is {kind_of(seeds)}; give one whole number a row") from error


def split(options: Any, verifier: Any, schedule: Any) -> tuple[Verifier, Schedule, Options]:
    """A cascade's verifier and schedule, which may stand in its options instead, and what else is in the options.

    Raises:
        ValueError: one of them is given in both places, and differs; or the options have seeds.
    """
    if getattr(options, "row_seeds", None) is not None:
        raise ValueError(
            f"options.row_seeds={options.row_seeds} in a cascade: seeds belong to one call, so give them to generate"
        )
    merged = Options.of(
        options,
        verifier=None if verifier == VERIFIER else verifier,
        schedule=None if schedule == SCHEDULE else schedule,
    )
    found = Options(verifier=merged.verifier or VERIFIER, schedule=merged.schedule or SCHEDULE)
    return found.verifier, found.schedule, replace(merged, verifier=None, schedule=None)  # type: ignore[return-value]
