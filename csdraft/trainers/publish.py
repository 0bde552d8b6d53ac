"""The files beside a trained drafter's weights: a model card with measured figures, and `provenance.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import metadata_load
from huggingface_hub.utils import yaml_dump
from transformers import TrainingArguments
from transformers.utils import cached_file
from yaml import YAMLError

from csdraft.card import filled
from csdraft.data.packing import Texts
from csdraft.data.row_arrays import checksum
from csdraft.data.sources import revision_of, tally_of
from csdraft.heads.engines import ENGINES, ServedTarget, serve_command
from csdraft.heads.folder import config_at
from csdraft.heads.layers import embeddings
from csdraft.heads.self_draft import model_name
from csdraft.heads.stored_head import head_at
from csdraft.hub import run_record, without_folders
from csdraft.models import base_model
from csdraft.stored import is_hub_id
from csdraft.trainers.students import added_share

if TYPE_CHECKING:
    from csdraft.trainers.distill import DrafterTrainer

__all__ = ["describe", "identity"]

CARD = Path(__file__).with_name("drafter_card.md")
"""Template of the model card."""
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "deepspeed")
LICENSE = ("license", "license_name", "license_link")
DRAFTED = 3
"""Drafted tokens per round in the commands of engines, which have no schedules."""
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
    """Serving engine -> the command that drafts with the head in a folder. Empty if the folder holds a model."""
    if not (folder / "config.json").is_file() or (head := head_at(str(folder))) is None:
        return {}
    served = ServedTarget.of(model_name(target), target.config, lambda: embeddings(target)["input.weight"].detach())
    document, tensors = config_at(str(folder)) or {}, head.weights(str(folder))
    taken = [engine for engine in head.methods if not head.faults(engine, document, tensors, served)]
    tokens = DRAFTED if head.deepest is None else min(DRAFTED, head.deepest)
    more = head.asked_of_vllm
    return {ENGINES[e]: serve_command(e, head.methods[e], served.name, name, tokens, more) for e in taken}


def provenance(trainer: DrafterTrainer) -> dict[str, Any]:
    """Command, arguments, versions, revisions, and the figures before and after training. No absolute paths."""
    args = trainer.args
    plain = {f.name for f in fields(TrainingArguments)}
    own = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in plain}
    if args.student and not is_hub_id(args.student):
        own["student"] = Path(args.student).name  # a path with folders would look like a Hub id
    chosen = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
              "learning_rate", "lr_scheduler_type", "weight_decay", "seed")  # fmt: skip
    target = trainer.target
    measured = [  # without figures for which nothing could be compared: JSON has no nan
        {name: value for name, value in entry.items() if math.isfinite(value)}
        for entry in trainer.state.log_history
        if "eval_block_efficiency" in entry
    ]
    start = measured[0] if measured and measured[0].get("step") == 0 else None
    if args.load_best_model_at_end and trainer.state.best_global_step is not None:
        measured = [entry for entry in measured if entry.get("step") == _kept_step(trainer)]
    return {
        **run_record(filter(find_spec, PACKAGES)),
        "target": {"name": model_name(target), "revision": getattr(target.config, "_commit_hash", None)},
        "license": {"license": args.license} if args.license else license_of(args.target, args.target_revision),
        "data": described_data(trainer),
        "arguments": {k: without_folders(v) if isinstance(v, str) else v for k, v in own.items()}
        | {k: getattr(args, k) for k in chosen},
        "added_parameters": None if trainer.is_fsdp_enabled else added_share(trainer.student, target),
        "tied_to_target": "tied_to" in vars(base_model(trainer.student)),
        "processes": args.world_size,
        "steps": trainer.state.global_step,
        "weights_of_step": _kept_step(trainer),
        "before": start,
        "measured": measured[-1] if measured else None,
    }


def _kept_step(trainer: DrafterTrainer) -> int:
    """The step whose weights are saved: the last, or the one evaluated best."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return state.global_step if best is None else best


def license_of(target: str, revision: str | None = None) -> dict[str, str] | None:
    """The licence in the model card of a folder or Hub id; None if the card names none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(target, "README.md", revision=revision, **quiet)
        card: dict[str, Any] = (metadata_load(file) if file else None) or {}
    except (OSError, ValueError, YAMLError):  # no such folder or id, or a card that cannot be read
        return None
    found = {key: str(card[key]) for key in LICENSE if card.get(key)}
    return found if "license" in found else None


def described_data(trainer: DrafterTrainer) -> dict[str, Any] | None:
    """The training data: its source, its revision on the Hub if it has one, and its `identity`.

    `read`, `left_out` and `cut` count rows of the source: those read, left out by reason, and cut to `max_length`.
    """
    texts: Any = trainer.train_dataset and trainer.train_dataset.data  # type: ignore[union-attr]
    if not isinstance(texts, Texts):
        return None
    args: Any = trainer.args
    source = {"name": without_folders(args.dataset), "split": args.split, "revision": revision_of(texts.rows)}
    tally = tally_of(texts.rows)
    counts = {} if tally is None else tally.described()
    return source | (trainer.noted.get("data") or identity(texts)) | counts


def identity(texts: Texts) -> dict[str, Any]:
    """Numbers that tell one set of rows from another."""
    return {"rows": len(texts.rows), "tokens": texts.tokens, "checksum": checksum(texts.rows)}


def card(name: str, origin: dict[str, Any], served: Mapping[str, str] | None = None) -> str:
    """README.md of a drafter, from its `provenance` and the commands of `serving`."""
    target = origin["target"]["name"]
    metadata: dict[str, Any] = {"library_name": "transformers", **(origin["license"] or {})}
    if ids := [model for model in (target, origin["arguments"].get("student")) if model and "/" in model]:
        metadata["base_model"] = list(dict.fromkeys(ids))
    metadata["tags"] = ["csdraft", "speculative-decoding", "drafter"]
    return filled(
        CARD,
        **origin | {"target": target},
        name=name,
        losses=json.dumps(origin["arguments"]["losses"]),
        metadata=yaml_dump(metadata, sort_keys=False),
        served=served,
        figures=FIGURES,
    )
