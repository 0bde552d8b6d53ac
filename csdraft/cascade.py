"""CascadeDrafter: turns a K matrix and a lenience into nested drafters, saves and loads them."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from csdraft import hub, loading, spec
from csdraft.automatic import auto_for
from csdraft.decoding.call import Call
from csdraft.decoding.draft import Draft
from csdraft.decoding.interfaces import Budget, Context, Drafter, Schedule, Verifier
from csdraft.decoding.names import name_of
from csdraft.decoding.states import home
from csdraft.drafters._check_parts import as_list
from csdraft.drafters.horizontal import Horizontal
from csdraft.drafters.model import ModelDrafter, bound
from csdraft.heads.self_draft import MTP
from csdraft.hub import upload
from csdraft.kmatrix import AUTO, build, check_k_matrix, first_guess, spread_lenience
from csdraft.models import HUB_OPTIONS, load_model
from csdraft.options import DEFAULTS, SCHEDULE, VERIFIER, Options, split
from csdraft.planner.search import plan_on
from csdraft.reports.report import Planned
from csdraft.saved_costs import load_costs
from csdraft.schedules.fixed import Fixed
from csdraft.stored import kind_of, naming, shown
from csdraft.verifiers.lenient import check_lenience

__all__ = ["CascadeDrafter", "as_drafter", "drafter_model", "options_of"]

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False, repr=False)
class CascadeDrafter(Drafter):
    """Cascade Speculative Drafting (arXiv 2312.11462) as one drafter.

    Args:
        drafters: largest first: models, paths, Hub ids, or drafters (objects, types or JSON).
        k_matrix: (n, n) upper triangular increments. Row i is the cascade that reviewer i reviews (0: the target,
            i: `drafters[i-1]`). Entry j says how many tokens stage j (`drafters[j]`) adds to it. A list is row 0 alone
            (all models draft token by token). A number is that many tokens for every drafter of row 0. "auto" lets
            the planner choose at the first call with a target (`planned`).
        lenience: >= 1, for inner reviewers only; one number, or one for each drafter that reviews, largest first.
        verifier: the acceptance rule at the target, by name or as an object.
        schedule: how much of the cascade to use each round, by name or as an object.
        options: `csdraft.Options` for calls that draft with it; options given to the call take precedence.

    Attributes:
        root: the nested drafters.
        forecast: what the planner expects, if it chose this cascade.
    """

    drafters: Sequence[Any]
    k_matrix: Sequence[Sequence[int]] | Sequence[int] | int | str = 5
    lenience: float | Sequence[float] = 1.0
    verifier: Verifier | str | Mapping[str, Any] = VERIFIER
    schedule: Schedule | str | Mapping[str, Any] = SCHEDULE
    options: Options = field(default_factory=Options)
    root: Horizontal = field(init=False)
    forecast: Planned | None = field(init=False, default=None)
    _target: list[hub.Target] = field(init=False, default_factory=list)  # the last call's; empty before it
    _plans: MutableMapping[nn.Module, CascadeDrafter] = field(init=False, default_factory=lambda: _Plans())

    def __post_init__(self) -> None:
        if isinstance(self.drafters, str | Path | nn.Module | Drafter):
            raise ValueError(f"drafters={_short(self.drafters)} is one drafter; give a list, largest first: [...]")
        given = as_list("drafters", self.drafters, "largest first: ")
        verifier, schedule, options = split(self.options, self.verifier, self.schedule)
        for i, drafter in enumerate(given):
            if drafter is None:
                raise ValueError(f"drafters[{i}] is None; give a model, a path, a Hub id or a csdraft.Drafter")
        made = map(as_drafter, given)  # of a cascade in it, verifier, schedule and report are the outer one's
        drafters = tuple(drafter.root if isinstance(drafter, CascadeDrafter) else drafter for drafter in made)
        auto = isinstance(self.k_matrix, str) and self.k_matrix == AUTO
        matrix = first_guess(drafters) if auto and drafters else check_k_matrix(self.k_matrix, drafters)
        check_lenience(self.lenience)
        one = isinstance(self.lenience, Real)
        lenience: Any = float(self.lenience) if one else tuple(map(float, self.lenience))  # type: ignore[arg-type]
        if auto and not one:
            raise ValueError(f"lenience={self.lenience!r} with k_matrix='auto': give one number, for all reviewers")
        root = build(drafters, matrix, spread_lenience(1.0 if auto else lenience, drafters, matrix))
        self._set(drafters=drafters, k_matrix=AUTO if auto else matrix, lenience=lenience, root=root)
        self._set(verifier=verifier, schedule=schedule, options=options)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        drafters = ", ".join(map(_short, self.drafters))
        rows = AUTO if self.k_matrix == AUTO else [list(row) for row in self.k_matrix]  # type: ignore[union-attr]
        return f"CascadeDrafter([{drafters}], {rows!r}, {self.lenience}, {self.verifier!r}, {self.schedule!r})"

    # Drafting.

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.root.depth

    def parts(self) -> Sequence[Drafter]:
        return self.drafters

    def evidence(self, context: Context) -> int:
        return self.root.evidence(context)

    def stages(self) -> list[tuple[Drafter, int]]:
        return self.root.stages()

    def models(self) -> list[object]:
        return list(dict.fromkeys(self.root.models()))

    def check(self, call: Call) -> None:
        for drafter in self.drafters:  # numbers the levels in the user's order
            if isinstance(drafter, ModelDrafter):
                call.level(drafter.network, drafter.name)
            else:
                call.level(drafter)
        self.root.check(call)
        self._target[:] = [hub.Target.of(call.target)]

    def propose(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[Draft]:
        return self.root.propose(contexts, budgets)

    # Planning.

    def planned(self, target: nn.Module, input_ids: torch.Tensor, options: Mapping[str, Any]) -> CascadeDrafter:
        """The cascade that the planner chooses for `target` with `k_matrix="auto"`; otherwise the cascade itself.

        The first call with a target takes a few seconds: the target writes a short text on the prompt, and every
        drafter model reads it. A line on stderr reports the plan, which is kept as long as the target lives.
        `csdraft tune` plans on many prompts and times the best plans.

        Args:
            target: the model.
            input_ids: (1, length) token ids of one prompt, without padding; for an encoder-decoder, the encoder's.
            options: options of `generate`: sampling, and the ids of padding and end.
        """
        if self.k_matrix != AUTO:
            return self
        with _LOCK:
            known = self._plans.get(target)
        if known is None:
            best, expected = plan_on(target, self.drafters, [*map(_short, self.drafters)], input_ids, options)
            kept = [self.drafters[j] for j in best.kept]
            own = (self.lenience, self.verifier, self.schedule, self.options)
            known = CascadeDrafter(kept, best.trimmed(), *own)
            known._set(forecast=expected, _target=self._target, memory=self.memory)
            with _LOCK:
                self._plans[target] = known
        return known

    @property
    def plan(self) -> CascadeDrafter | None:
        """The cascade that was planned last with `k_matrix="auto"`, which can be saved; None before the first call."""
        return next(reversed([*self._plans.values()]), None)

    # Saving.

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        target: nn.Module | None = None,
        copy_models: bool = True,
    ) -> None:
        """Writes cascade.json, the models and tables, a model card, and the shim for `custom_generate`.

        Args:
            path: a new folder, or one that holds a saved cascade, which is replaced.
            tokenizer: its fingerprint is saved, and compared when the cascade is loaded.
            target: the model that the cascade drafts for; the last call's if None. Its weights are never saved.
            copy_models: False saves only the id and cached revision of models from the Hub, not their weights.
        """
        self._save(Path(path), tokenizer, target, copy_models)

    def push_to_hub(
        self,
        repo_id: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target: nn.Module | None = None,
        copy_models: bool = True,
        **options: Any,
    ) -> str:
        """Uploads what `save_pretrained` would write, in one commit, and returns the commit's address.

        Args:
            repo_id: "user/name"; created if needed.
            tokenizer, target, copy_models: see `save_pretrained`.
            options: token, private, revision, commit_message; see `csdraft.hub.upload`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, repo_id.split("/")[-1])
            self._save(folder, tokenizer, target, copy_models, repo_id)
            return upload(folder, repo_id, **options)

    def _save(self, path: Path, tokenizer: Any, target: nn.Module | None, *options: Any) -> None:
        hub.save(self, path, tokenizer, hub.Target.of(target) if target else next(iter(self._target), None), *options)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        target: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        local_bases: bool = False,
        **options: Any,
    ) -> CascadeDrafter:
        """Loads what `save_pretrained` wrote.

        Args:
            path: folder or Hub id.
            target: the model to draft for. Its vocabulary is checked, and drafter models are put on its device.
            tokenizer: the target's; compared with the one that the cascade was saved with.
            local_bases: whether an adapter's base may be a path on this machine. By default it must be a Hub id,
                because a shared cascade could name any path.
            options: options of transformers' `from_pretrained`, such as dtype or device_map. `revision` is the
                cascade's; trust_remote_code is False by default.

        Raises:
            ValueError: `path` has no cascade, or the cascade does not fit the target.
        """
        folder = loading.find_cascade(os.fspath(path), **{k: v for k, v in options.items() if k in HUB_OPTIONS})
        if folder is None:
            raise ValueError(
                f"{os.fspath(path)!r} has no {hub.DOCUMENT}: give a folder that save_pretrained wrote or the Hub id "
                "of one; a model's folder goes into CascadeDrafter([...]) or ModelDrafter(...)"
            )
        return _opened(folder, target, tokenizer, local_bases, **options)


class _Plans(WeakKeyDictionary):
    """The cascades that were planned, by target."""

    def __reduce__(self) -> tuple[type, tuple]:
        return _Plans, ()  # a pickled cascade starts without plans


def options_of(drafter: Drafter | None, call: Options) -> Options:
    """The options of a call, completed with those of its cascade, then with the default verifier and schedule.

    Without a drafter, the schedule is one that drafts nothing.
    """
    if isinstance(drafter, CascadeDrafter):
        call = call.or_else(replace(drafter.options, verifier=drafter.verifier, schedule=drafter.schedule))
    call = call.or_else(DEFAULTS)
    return call if drafter is not None else replace(call, schedule=Fixed(0))


def _short(drafter: Any) -> str:
    if isinstance(drafter, ModelDrafter):
        return drafter.name or name_of(drafter.network)
    return name_of(drafter) if isinstance(drafter, nn.Module | str) else f"{type(drafter).__name__}()"


def as_drafter(assistant: Any, target: nn.Module | None = None) -> Any:
    """The drafter that a user's `assistant` stands for.

    Args:
        assistant: a drafter, a model, the path or Hub id of a saved cascade or model, a drafter's type, or its JSON.
            A folder wins over a type of the same name. "auto" is always the target's `Auto` (write "./auto" for a
            folder of that name). None is returned unchanged.
        target: the model to draft for. What is loaded is checked against it and put on its device. Drafters that use
            the target's layers are bound to it; without a target they stay unbound.

    Raises:
        ValueError: `assistant` is something else.
        OSError: there is no model at this path or Hub id.
    """
    if assistant is None or isinstance(assistant, Drafter):
        drafter = assistant
    elif isinstance(assistant, nn.Module):
        drafter = ModelDrafter(assistant)
    elif isinstance(assistant, Mapping):
        drafter = spec.resolve("drafters", assistant)
    elif not isinstance(assistant, str | os.PathLike):
        raise ValueError(
            f"assistant={shown(assistant)} is {kind_of(assistant)}; pass a csdraft.Drafter, a model, the path or Hub "
            "id of a saved cascade or model, or a drafter's type"
        )
    elif assistant == AUTO:
        drafter = auto_for(target, _load)
    elif not os.path.exists(assistant) and assistant in (MTP, *spec.types("drafters")):
        drafter = ModelDrafter(MTP) if assistant == MTP else spec.resolve("drafters", assistant)
    else:
        drafter = _stored(os.fspath(assistant), target)
    return drafter if target is None else bound(drafter, target)


_LAST: list[tuple[Hashable, Drafter]] = []
"""The drafter that a call loaded last, so that `generate(assistant="path")` in a loop does not load it each time."""
DOCUMENTS = (hub.DOCUMENT, "drafter.json", "config.json", "adapter_config.json")
"""Files of which every drafter's folder has one."""


def _stored(path: str, target: nn.Module | None) -> Drafter:
    """Loads a drafter from a folder or Hub id, or returns the last one if its files have not changed."""
    if target is None:
        return _load(path, None)
    changed = [file.stat().st_mtime_ns for name in DOCUMENTS if (file := Path(path, name)).is_file()]
    key = (path, *changed, hub.Target.of(target), home(target)[0])
    with _LOCK:
        kept = dict(_LAST).get(key)
    if kept is None:
        kept = _load(path, target)
        if target not in kept.models():  # a kept drafter must not keep the target alive
            with _LOCK:
                _LAST[:] = [(key, kept)]
    return kept


def _load(path: str, target: nn.Module | None) -> Drafter:
    if (folder := loading.find_cascade(path)) is not None:
        return _opened(folder, target, None)
    model = drafter_model(path)
    return ModelDrafter(model if target is None else model.to(home(target)[0]))


def _opened(folder: Path, target: nn.Module | None, tokenizer: Any, *bases: bool, **options: Any) -> CascadeDrafter:
    """Loads a cascade from a folder; the arguments are those of `loading.load`."""
    arguments = loading.load(folder, target, tokenizer, *bases, **options)
    with naming(hub.DOCUMENT):
        cascade = CascadeDrafter(**arguments)
    cascade.memory.saved.update(load_costs(folder))
    return cascade


def drafter_model(path: str, **options: Any) -> nn.Module:
    """Loads a drafter's model; raises OSError, which lists the types of drafters, if there is none at `path`."""
    if Path(path).is_dir() and not any(Path(path, name).is_file() for name in DOCUMENTS):
        raise OSError(f"the folder {path!r} has no drafter: no {hub.DOCUMENT} and no config.json")
    try:
        return load_model(path, **options)
    except OSError as error:
        if path in spec.types("drafters"):  # only `assistant=` takes a type
            raise OSError(f"{path!r} is a drafter's type; give the path or Hub id of a saved drafter") from error
        types = spec.nearest(path, spec.types("drafters"))
        raise OSError(f"{path!r} is not a model's folder, a reachable Hub id, or a drafter's type; {types}") from error
