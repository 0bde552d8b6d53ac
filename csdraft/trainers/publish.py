"""What lies beside a trained drafter's weights: a model card with its measured acceptance, and where it came from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import metadata_load
from transformers import TrainingArguments
from transformers.utils import cached_file
from yaml import YAMLError

from csdraft.data.packing import Packed, Padded
from csdraft.data.row_arrays import checksum
from csdraft.data.sources import revision_of, tally_of
from csdraft.heads.engines import ENGINES, ServedTarget, serve_command
from csdraft.heads.folder import config_at
from csdraft.heads.layers import embeddings
from csdraft.heads.stored_head import head_at
from csdraft.hub import command, public_name, without_folders
from csdraft.models import base_model
from csdraft.stored import is_hub_id
from csdraft.trainers.students import added_share

if TYPE_CHECKING:
    from csdraft.trainers.distill import DrafterTrainer

__all__ = ["describe", "identity"]

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "deepspeed")
LICENSE = ("license", "license_name", "license_link")
DRAFTED = 3
"""Tokens a round in the commands of engines, which have no schedule of their own."""
FIGURES = {
    "eval_block_efficiency": "block efficiency, greedy",
    "eval_block_efficiency_sampled": "block efficiency, sampled",
    "eval_acceptance": "expected acceptance, sum of min(p, q)",
    "eval_agreement": "greedy agreement",
}


def describe(trainer: DrafterTrainer, folder: Path) -> None:
    """Writes README.md and provenance.json into a drafter's folder."""
    origin = provenance(trainer)
    (folder / "provenance.json").write_text(json.dumps(origin, indent=2, default=str) + "\n", encoding="utf-8")
    name = trainer.args.hub_model_id or folder.name
    served = serving(name, folder, trainer.target)
    (folder / "README.md").write_text(card(name, origin, served), encoding="utf-8")


def serving(name: str, folder: Path, target: Any) -> dict[str, str]:
    """By serving engine that takes it, the command that drafts with the head in a folder; nothing for a model.

    Args:
        name: how the command calls it.
        target: the model that it drafts for.
    """
    if not (folder / "config.json").is_file() or (head := head_at(str(folder))) is None:
        return {}
    served = ServedTarget.of(public_name(target), target.config, lambda: embeddings(target)["input.weight"].detach())
    document, tensors = config_at(str(folder)) or {}, head.weights(str(folder))
    taken = [engine for engine in head.methods if not head.faults(engine, document, tensors, served)]
    tokens = DRAFTED if head.deepest is None else min(DRAFTED, head.deepest)
    return {ENGINES[e]: serve_command(e, head.methods[e], served.name, name, tokens) for e in taken}


def provenance(trainer: DrafterTrainer) -> dict[str, Any]:
    """Command, arguments, versions, revisions, and the figures before and after. No absolute paths."""
    args = trainer.args
    plain = {f.name for f in fields(TrainingArguments)}
    own = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in plain}
    if args.student and not is_hub_id(args.student):
        own["student"] = Path(args.student).name  # with folders before it, it would look like an id of the Hub
    chosen = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
              "learning_rate", "lr_scheduler_type", "weight_decay", "seed")  # fmt: skip
    target = trainer.target
    measured = [entry for entry in trainer.state.log_history if "eval_block_efficiency" in entry]
    start = measured[0] if measured and measured[0].get("step") == 0 else None
    if args.load_best_model_at_end and trainer.state.best_global_step is not None:
        measured = [entry for entry in measured if entry.get("step") == _kept_step(trainer)]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "versions": {"python": platform.python_version()} | _versions(),
        "target": {"name": public_name(target), "revision": getattr(target.config, "_commit_hash", None)},
        "license": {"license": args.license} if args.license else license_of(args.target, args.target_revision),
        "data": described_data(trainer),
        "arguments": {k: _named(v) for k, v in own.items()} | {k: getattr(args, k) for k in chosen},
        "added_parameters": None if trainer.is_fsdp_enabled else added_share(trainer.student, target),
        "tied_to_target": "tied_to" in vars(base_model(trainer.student)),
        "processes": args.world_size,
        "steps": trainer.state.global_step,
        "weights_of_step": _kept_step(trainer),
        "before": start,
        "measured": measured[-1] if measured else None,
    }


def _kept_step(trainer: DrafterTrainer) -> int:
    """The step whose weights are saved: the last, or that of the best evaluation."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return state.global_step if best is None else best


def license_of(target: str, revision: str | None = None) -> dict[str, str] | None:
    """What the card of a model's folder or Hub id says of its licence; None if it says nothing."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(target, "README.md", revision=revision, **quiet)
        card: dict[str, Any] = (metadata_load(file) if file else None) or {}
    except (OSError, ValueError, YAMLError):  # no such folder or id, or a card that cannot be read
        return None
    found = {key: str(card[key]) for key in LICENSE if card.get(key)}
    return found if "license" in found else None


def described_data(trainer: DrafterTrainer) -> dict[str, Any] | None:
    """What was trained on: its source, the Hub's revision of it if it is from there, and what tells rows apart.

    `read`, `left_out` and `cut` count the source's rows: those looked at, left out by reason, and cut to `max_length`.
    """
    texts: Any = trainer.train_dataset and trainer.train_dataset.data  # type: ignore[union-attr]
    if not isinstance(texts, Packed | Padded):
        return None
    args: Any = trainer.args
    source = {"name": without_folders(args.dataset), "split": args.split, "revision": revision_of(texts.rows)}
    tally = tally_of(texts.rows)
    counts = {} if tally is None else tally.described()
    return source | (trainer.noted.get("data") or identity(texts)) | counts


def identity(texts: Packed | Padded) -> dict[str, Any]:
    """What tells one set of rows from another."""
    return {"rows": len(texts.rows), "tokens": texts.tokens, "checksum": checksum(texts.rows)}


def card(name: str, origin: dict[str, Any], served: Mapping[str, str] | None = None) -> str:
    """README.md of a drafter.

    Args:
        served: see `serving`.
    """
    target = origin["target"]["name"]
    arguments = origin["arguments"]
    return f"""---
library_name: transformers
{_metadata(origin)}tags:
- csdraft
- speculative-decoding
- drafter
---

# {name}

A drafter for speculative decoding of {target}, trained with csdraft. The target checks what it drafts: `generate`
writes what it would have written without it, in fewer calls of the target.

```python
import csdraft  # pip install csdraft

output = model.generate(**inputs, assistant="{name}")  # this folder's path or Hub id; model is {target}
```
{_engines(served or {})}
{_table(origin)}

{_added(origin["added_parameters"])}{_tied(origin)}

Trained for {origin["steps"]} steps on `{arguments["dataset"]}` with losses `{json.dumps(arguments["losses"])}`; the
share of the texts that the drafter wrote itself was {arguments["on_policy"]}.{_kept(origin)} All
arguments, versions and revisions are in `provenance.json`.

{_licence(origin)}
"""


def _engines(served: Mapping[str, str]) -> str:
    """How serving engines that take it are started."""
    if not served:
        return ""
    commands = "\n".join(f"# {engine}\n{line}" for engine, line in served.items())
    return f"""
{" and ".join(served)} load{"s" * (len(served) == 1)} this folder as it is (`csdraft export` writes other layouts):

```bash
{commands}
```
"""


def _metadata(origin: dict[str, Any]) -> str:
    """Lines of YAML: licence and models that it is made from, as far as they are known."""
    lines = [f"{key}: {value}" for key, value in (origin["license"] or {}).items()]
    ids = [name for name in (origin["target"]["name"], origin["arguments"].get("student")) if name and "/" in name]
    if ids:
        lines += ["base_model:", *(f"- {name}" for name in dict.fromkeys(ids))]
    return "".join(f"{line}\n" for line in lines)


def _kept(origin: dict[str, Any]) -> str:
    """Which weights these are, where they are not those of the last step."""
    step = origin["weights_of_step"]
    if step == origin["steps"]:
        return ""
    if step == 0:
        return " No evaluation was better than the one at the start, so these are the weights of the start."
    return f" These are the weights of step {step}, which was evaluated best."


def _licence(origin: dict[str, Any]) -> str:
    target, found = origin["target"]["name"], origin["license"]
    if found is None:
        return f"Licence: not known. It is made from what {target} has learned: see that model's licence."
    given = "as given by its author" if origin["arguments"].get("license") else f"that of {target}"
    return f"Licence: {found.get('license_name') or found['license']}, {given}."


def _added(share: float | None) -> str:
    """What the drafter needs beside the target, which is in memory anyway."""
    if share is None:
        return "What it adds to the target's parameters was not counted: they were kept in parts."
    return f"It adds {100 * share:.2f} % of the target's parameters to those in memory."


def _tied(origin: dict[str, Any]) -> str:
    if not origin["tied_to_target"]:
        return ""
    return " Its embedding and output layer are the target's and are not in this folder: load it with csdraft."


def _table(origin: dict[str, Any]) -> str:
    before, after = origin["before"], origin["measured"]
    if after is None:
        return "No figures: it was trained without evaluation."
    depth = origin["arguments"]["eval_depth"]
    head = "| | before | after |\n|---|---|---|" if before else "| | measured |\n|---|---|"
    lines = [
        f"| {words} | " + " | ".join(_figure(figures, key) for figures in (before, after) if figures) + " |"
        for key, words in FIGURES.items()
        if key in after
    ]
    note = (
        f"On {after['eval_prompts']:.0f} held-out prompts, chains of {depth}; block efficiency is tokens a call of "
        "the target, 1 without drafts. In brackets the 95 % interval of a bootstrap over prompts."
    )
    return "\n".join([head, *lines, "", note])


def _figure(figures: dict[str, float], key: str) -> str:
    """A figure and its interval, if it has one."""
    interval = [f"{figures[f'{key}_{end}']:.2f}" for end in ("low", "high") if f"{key}_{end}" in figures]
    return f"{figures[key]:.2f}" + (f" [{', '.join(interval)}]" if interval else "")


def _versions() -> dict[str, str]:
    found = {"csdraft": _version("csdraft")} | {package: _version(package) for package in PACKAGES}
    return {package: number for package, number in found.items() if number}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _named(value: Any) -> Any:
    return without_folders(value) if isinstance(value, str) else value
