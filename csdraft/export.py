"""Exports drafters to serving engines: writes folders that vLLM, SGLang or speculators load as the same drafters.

A head is written in the engine's layout. A model is written whole: an adapter is merged into its base, and a tied
drafter gets the target's embedding. If the engine would refuse the result, nothing is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoTokenizer

from csdraft.heads.engines import (
    ENGINES,
    SIZED_ROTARY,
    WHOLE,
    ServedTarget,
    context_fault,
    serve_command,
    with_embedding,
)
from csdraft.heads.folder import config_at, file_at
from csdraft.heads.layers import embeddings
from csdraft.heads.on_target import OnTarget
from csdraft.heads.self_draft import SelfDraft, peft_package
from csdraft.heads.stored_head import StoredHead
from csdraft.heads.tied import TiedDraft
from csdraft.models import load_model
from csdraft.stored import check_config

__all__ = ["export_drafter", "served_target", "whole_faults"]


def export_drafter(drafter: str, folder: str | os.PathLike[str], engine: str, target: str, tokens: int = 3) -> str:
    """Writes a drafter as an engine loads it, and returns the command that serves the target with it.

    Args:
        drafter: folder or Hub id of a head, a model, an adapter, or a tied drafter.
        folder: where to write; new or empty.
        engine: vllm, sglang or speculators.
        target: folder or Hub id of the model that it is to draft for. For a head only its config.json is read.
        tokens: how many are drafted per round.

    Raises:
        ValueError: the engine cannot take it; nothing is written.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is none of {', '.join(ENGINES)}")
    if tokens < 1:
        raise ValueError(f"tokens={tokens}; an engine drafts 1 or more per round")
    out = Path(folder)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is there already; give a new folder")
    if Path(drafter, "cascade.json").is_file():
        raise ValueError(f"{drafter!r} is a cascade, which no engine runs; export one of {drafter}/models")
    served, loaded = served_target(target), load_model(drafter, dtype="auto")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as private:
        made = os.path.join(private, "made")  # the temporary folder itself is not readable to others
        os.mkdir(made)
        if isinstance(loaded, StoredHead):
            method, more = _write_head(loaded, made, engine, served, tokens), loaded.asked_of_vllm
        else:
            method, more = _write_whole(loaded, drafter, made, engine, served), {}
        shutil.copytree(made, out, dirs_exist_ok=True)
    return serve_command(engine, method, target, str(folder), tokens, more)


def served_target(path: str) -> ServedTarget:
    """A target's sizes, from its config.json."""
    check_config(config_at(path) or {}, f"{path}/config.json")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"--target {path}: {config.model_type!r} is an encoder-decoder, and no engine drafts for one")
    return ServedTarget.of(path, config, lambda: embeddings(load_model(path, dtype="auto"))["input.weight"].detach())


def _refuse(engine: str, drafter: str, faults: list[str]) -> None:
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(f"{ENGINES[engine]} cannot take {drafter!r}:{listed}")


# Heads.


def _write_head(head: StoredHead, folder: str, engine: str, target: ServedTarget, tokens: int) -> str:
    name = head.config._name_or_path
    if engine in head.methods and head.deepest is not None and tokens > head.deepest:
        raise ValueError(
            f"tokens={tokens}; {name!r} drafts at most {head.deepest} per round: use --tokens {head.deepest}"
        )
    if target.positions and head.config.rope_parameters.get("rope_type", "default") in SIZED_ROTARY:
        head.config.max_position_embeddings = max(head.config.max_position_embeddings, target.positions)
    document, tensors = head.exported(engine, target, tokens)
    head.write(folder, document, with_embedding(tensors, target, engine in head.embedding_for))
    _refuse(engine, name, head.faults(engine, config_at(folder) or {}, head.weights(folder), target))
    return head.methods[engine]


# Whole models.


def _write_whole(model: Any, drafter: str, folder: str, engine: str, target: ServedTarget) -> str:
    if engine not in WHOLE:
        raise ValueError(f"speculators has heads only, and {drafter!r} is a model; export it with --to vllm or sglang")
    if isinstance(model, SelfDraft):
        raise ValueError(
            f"{drafter!r} is an adapter for the target's own layers, which engines do not share with a drafter; train "
            "a student with layers of its own: init: {from_target: {layers: [...]}} without shared"
        )
    if isinstance(model, TiedDraft):
        model = model.bind(load_model(target.name, dtype="auto"))
    elif isinstance(model, OnTarget):
        raise ValueError(f"{drafter!r} is a {model.what}, which no engine has; decode with csdraft")
    elif vars(model).get("peft_config"):
        model = _merged(drafter, model)
    tokenizer = AutoTokenizer.from_pretrained(target.name, trust_remote_code=False)
    faults = [*whole_faults(engine, model.config, target), *_tokenizer_faults(drafter, tokenizer)]
    _refuse(engine, drafter, faults)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return WHOLE[engine]


def whole_faults(engine: str, config: Any, target: ServedTarget | None = None) -> Iterator[str]:
    """Why an engine would not draft with a model of this config.

    Args:
        engine: a key of `WHOLE`.
        target: the model that it is to draft for; without it, sizes are not compared.
    """
    if config.is_encoder_decoder:
        yield f"model_type={config.model_type!r} is an encoder-decoder, and it drafts with decoders only"
        return
    text = config.get_text_config(decoder=True)
    if not config.architectures:
        yield "architectures is missing; save the model with save_pretrained"
    if target is not None and text.vocab_size != target.vocab_size:
        out = "; or start it with use_heterogeneous_vocab" if engine == "vllm" else ""
        yield (
            f"vocab_size={text.vocab_size}, the target {target.name} has {target.vocab_size}, and it takes equal ones "
            f"only: resize the drafter's embedding (resize_token_embeddings){out}"
        )
    if engine == "sglang":
        yield from context_fault(getattr(text, "max_position_embeddings", None), target)


def _tokenizer_faults(drafter: str, tokenizer: Any) -> Iterator[str]:
    """How the drafter's tokenizer differs from the target's, which engines use for both."""
    if file_at(drafter, "tokenizer_config.json") is None:
        return
    own = AutoTokenizer.from_pretrained(drafter, trust_remote_code=False).get_vocab()
    theirs = tokenizer.get_vocab()
    if other := sorted(word for word in own.keys() | theirs.keys() if own.get(word) != theirs.get(word)):
        word = other[0]
        yield (
            f"the tokenizers differ in {len(other)} tokens, such as {word!r}: {own.get(word)} in the drafter, "
            f"{theirs.get(word)} in the target; train a drafter with the target's tokenizer"
        )


def _merged(drafter: str, model: Any) -> nn.Module:
    """An adapter's base with the adapter merged into its weights."""
    ((_, options),) = model.peft_config.items()
    base = load_model(options.base_model_name_or_path, dtype="auto", revision=options.revision)
    merged = peft_package().PeftModel.from_pretrained(base, drafter).merge_and_unload(safe_merge=True)
    vars(merged).pop("peft_config", None)
    return merged
