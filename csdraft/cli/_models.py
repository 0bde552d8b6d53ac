"""Shared parts of commands that run models: they load the models and prompts that the arguments name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csdraft import spec
from csdraft.cascade import CascadeDrafter, drafter_model
from csdraft.data.chat import ChatFormat, chat_prompt, check_template
from csdraft.data.messages import is_broken
from csdraft.data.packing import pad_of
from csdraft.data.sources import read_prompts
from csdraft.decoding.interfaces import Drafter
from csdraft.decoding.names import name_of
from csdraft.decoding.traits import traits_of
from csdraft.drafters.model import ModelDrafter, bound
from csdraft.heads.folder import check_place
from csdraft.heads.on_target import OnTarget
from csdraft.models import load_model

__all__ = ["Opened", "as_inputs", "chat_of_text", "encode", "label", "open_models", "open_tokenizer",
           "prompts_of_file", "sampling", "use_machine"]  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """The models of a command.

    Attributes:
        assistant: the named drafter, or a cascade of several; None if no drafter was named.
        options: further keywords of `generate`: verifier and schedule, if they were named.
    """

    target: Any
    tokenizer: PreTrainedTokenizerBase
    assistant: Drafter | None
    options: dict[str, Any]

    def longest(self, new: int) -> int | None:
        """The most tokens that a prompt may have if `new` ones follow; None if the target has no such limit."""
        positions = traits_of(self.target).positions
        return None if positions is None else max(positions - new, 0)


def open_models(args: argparse.Namespace) -> Opened:
    """Loads the models that the arguments name. If the target has no padding token, it gets the tokenizer's."""
    cascade_options = _cascade_options(args)  # checked first, since loading takes long
    use_machine(args)
    torch.manual_seed(args.seed)
    target: Any = load_model(args.target, dtype=args.dtype)
    if isinstance(target, OnTarget):
        raise ValueError(
            f"--target {args.target}: {target.what} of a model, which {target.use} and cannot run alone; name that "
            "model as --target, and this folder as --drafter"
        )
    target = target.to(args.device)
    tokenizer = open_tokenizer(args.tokenizer or args.target)
    if target.generation_config.pad_token_id is None:
        target.generation_config.pad_token_id = pad_of(tokenizer, target.config)
    options = _given(args, "verifier", "schedule")
    return Opened(target, tokenizer, bound(_assistant(args, target, cascade_options), target), options)


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    check_place(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def use_machine(args: argparse.Namespace) -> None:
    """Sets the number of threads. Raises ValueError if there is no such device."""
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        torch.zeros((), device=args.device).item()  # "meta" holds no numbers
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; try --device cpu") from error


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments among `names` that the command has and the user gave."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _cascade_options(args: argparse.Namespace) -> dict[str, Any]:
    """K matrix and lenience, if given. Raises ValueError if there are no drafters to build a cascade from."""
    given = _given(args, "k_matrix", "lenience")
    if given and not args.drafter:
        flags = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        why = "a saved cascade has its own: drop --cascade, and" if args.cascade else "nothing drafts:"
        raise ValueError(f"{flags}: {why} name the drafters with --drafter, largest first")
    return given


def _assistant(args: argparse.Namespace, target: nn.Module, options: dict[str, Any]) -> Drafter | None:
    if args.cascade:
        return CascadeDrafter.from_pretrained(args.cascade, target=target, dtype=args.dtype)
    if not args.drafter:
        return None
    drafters = [_drafter(name, args.dtype, args.device) for name in args.drafter]
    return CascadeDrafter(drafters, **options) if options or len(drafters) > 1 else drafters[0]


def _drafter(name: str, dtype: str, device: str) -> Drafter:
    """The drafter of type `name` if there is such a type, and no folder of that name; else a model."""
    if name in spec.types("drafters") and not Path(name).exists():
        return spec.resolve("drafters", name)
    return ModelDrafter(drafter_model(name, dtype=dtype).to(device))


def label(drafter: Drafter) -> str:
    if not isinstance(drafter, ModelDrafter):
        return type(drafter).__name__
    name = drafter.name or name_of(drafter.network)
    return name if drafter.tree is None else f"{name} {drafter.tree}"


def sampling(temperature: float, **warpers: float | None) -> dict[str, Any]:
    """Keywords of `generate`: greedy search for temperature 0, else sampling with those warpers that are not None."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, **{k: v for k, v in warpers.items() if v is not None}}


def chat_of_text(args: argparse.Namespace) -> ChatFormat | None:
    """The chat format for prompts that are plain text; None without --chat."""
    if not args.chat and (args.chat_template is not None or args.chat_template_options is not None):
        raise ValueError("--chat-template and --chat-template-options have no effect on text without --chat: add it")
    return ChatFormat.read(args.chat_template, args.chat_template_options) if args.chat else None


def encode(opened: Opened, prompt: str, new: int, chat: ChatFormat | None = None) -> dict[str, torch.Tensor]:
    """A prompt as `generate` takes it, which at most `new` tokens follow; with a chat format, as a user's turn."""
    if is_broken(prompt):
        raise ValueError("the prompt is not UTF-8 text; convert it")
    if chat is None:
        ids = list(opened.tokenizer(prompt)["input_ids"])
    else:
        check_template(opened.tokenizer, "--chat was given", chat)
        ids = chat_prompt([{"role": "user", "content": prompt}], opened.tokenizer, chat)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt, --file, or text on the standard input")
    if (longest := opened.longest(new)) is not None and len(ids) > longest:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but with {new} new ones the target has room for {longest}: shorten "
            "it, or give a smaller --max-new-tokens"
        )
    return as_inputs(opened, ids)


def as_inputs(opened: Opened, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Token ids as `generate` takes them: `input_ids` and `attention_mask`, both (1, length) int64."""
    row = torch.tensor([ids], dtype=torch.long, device=opened.target.device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def prompts_of_file(
    opened: Opened, source: str, args: argparse.Namespace, limit: int | None = None
) -> list[list[int]]:
    """Token ids of a source's prompts. The chat template is applied to conversations; with --chat, to all prompts."""
    format = ChatFormat.read(args.chat_template, args.chat_template_options)
    longest = opened.longest(args.max_new_tokens)
    return read_prompts(source, opened.tokenizer, limit, longest, "train", format, args.chat)
