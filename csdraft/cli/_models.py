"""What commands that run models have in common: their arguments, and the models that these name."""

from __future__ import annotations

import argparse
import json
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
from csdraft.data.sources import read_prompts
from csdraft.decoding.interfaces import Drafter
from csdraft.drafters.model import ModelDrafter, bound
from csdraft.heads.on_target import OnTarget
from csdraft.models import load_model

__all__ = [
    "Opened",
    "add_chat_arguments",
    "add_drafting_arguments",
    "add_model_arguments",
    "add_prompts_arguments",
    "as_inputs",
    "chat_format",
    "chat_of_text",
    "encode",
    "open_models",
    "prompts_of_file",
]

DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Opened:
    """What a command works with."""

    target: Any
    tokenizer: PreTrainedTokenizerBase
    assistant: Drafter | None
    options: dict[str, Any]
    """Keywords of `generate` beside `assistant`: verifier and schedule, where the user named one."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, on what."""
    parser.add_argument("--target", required=True, metavar="MODEL", help="path or Hub id of the model to decode with")
    parser.add_argument("--tokenizer", metavar="PATH", help="path or Hub id; the target's own by default")
    assistant = parser.add_mutually_exclusive_group()
    assistant.add_argument("--cascade", metavar="PATH", help="path or Hub id of a saved cascade")
    assistant.add_argument(
        "--drafter",
        action="append",
        metavar="DRAFTER",
        help="path or Hub id of a model, or the type of a drafter that needs none, such as max_gram, "
        "or mtp, the target's own next-token module; repeat for a cascade, largest first",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of all models; their own by default")
    parser.add_argument("--device", default="cpu", help="of all models: cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")


def add_drafting_arguments(parser: argparse.ArgumentParser) -> None:
    """How they draft."""
    parser.add_argument("--k-matrix", type=_json, metavar="JSON", help="e.g. 5, [5, 10] or [[5, 8], [0, 10]]")
    parser.add_argument("--lenience", type=float, metavar="X", help="of inner reviewers, 1 (strict, default) or more")
    parser.add_argument("--verifier", metavar="TYPE", help="acceptance rule at the target, e.g. match or rejection")
    parser.add_argument("--schedule", metavar="TYPE", help="how much to draft, e.g. fixed or cost_model")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


def open_models(args: argparse.Namespace) -> Opened:
    """Loads what the arguments name."""
    _shape(args)  # before anything is loaded
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = SHORT.get(args.dtype) or str(args.dtype)
    target = load_model(args.target, dtype=dtype)
    if isinstance(target, OnTarget):
        raise ValueError(
            f"--target {args.target}: {target.what} of a model, which {target.use} and cannot run alone; name that "
            "model as --target, and this folder as --drafter"
        )
    target = target.to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.target, trust_remote_code=False)
    options = _given(args, "verifier", "schedule")
    return Opened(target, tokenizer, bound(_assistant(args, target, dtype), target), options)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments that the command has and the user gave."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the cascade to build, where the user named one; ValueError if there is none to build."""
    given = _given(args, "k_matrix", "lenience")
    if given and not args.drafter:
        flags = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        why = "a saved cascade has its own: drop --cascade, and" if args.cascade else "nothing drafts:"
        raise ValueError(f"{flags}: {why} name the drafters with --drafter, largest first")
    return given


def _assistant(args: argparse.Namespace, target: nn.Module, dtype: str) -> Drafter | None:
    if args.cascade:
        return CascadeDrafter.from_pretrained(args.cascade, target=target, dtype=dtype)
    if not args.drafter:
        return None
    drafters = [_drafter(name, dtype, args.device) for name in args.drafter]
    shape = _shape(args)
    return CascadeDrafter(drafters, **shape) if shape or len(drafters) > 1 else drafters[0]


def _drafter(name: str, dtype: str, device: str) -> Drafter:
    """A drafter by its type, unless there is a folder of that name; else a model."""
    if name in spec.types("drafters") and not Path(name).exists():
        return spec.resolve("drafters", name)
    return ModelDrafter(drafter_model(name, dtype=dtype).to(device))


def add_prompts_arguments(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    """Which prompts, how many, and how they go through the chat template."""
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON lines with a `prompt` or `messages`, or a Hub data set"
    )
    add_chat_arguments(parser)
    said = "" if limit is None else " (default: %(default)s)"
    parser.add_argument("--limit", type=int, default=limit, metavar="N", help=f"use so many prompts at most{said}")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """How prompts go through the chat template."""
    parser.add_argument("--chat", action="store_true", help="put prompts that are text into the chat template")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template; the tokenizer's own by default")
    parser.add_argument(
        "--chat-template-options",
        type=_json,
        metavar="JSON",
        help="""what the template reads besides messages, e.g. '{"enable_thinking": false}'""",
    )


def chat_format(args: argparse.Namespace) -> ChatFormat:
    """How conversations become tokens, as the arguments say."""
    return ChatFormat.read(args.chat_template, args.chat_template_options)


def chat_of_text(args: argparse.Namespace) -> ChatFormat | None:
    """How prompts that are text go through the template; None if they do not."""
    if not args.chat and (args.chat_template is not None or args.chat_template_options is not None):
        raise ValueError("--chat-template and --chat-template-options do nothing to a text without --chat: add it")
    return chat_format(args) if args.chat else None


def encode(opened: Opened, prompt: str, chat: ChatFormat | None = None) -> dict[str, torch.Tensor]:
    """A prompt as `generate` takes it, on the target's device.

    Args:
        chat: how it goes through the chat template, as a user's turn; None leaves it as it is.
    """
    if chat is None:
        ids = list(opened.tokenizer(prompt)["input_ids"])
    else:
        check_template(opened.tokenizer, "--chat was given", chat)
        ids = chat_prompt([{"role": "user", "content": prompt}], opened.tokenizer, chat)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt, --file, or text on the standard input")
    return as_inputs(opened, ids)


def as_inputs(opened: Opened, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Token ids as `generate` takes them: `input_ids` and `attention_mask`, both (1, length) int64."""
    row = torch.tensor([ids], dtype=torch.long, device=opened.target.device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def prompts_of_file(
    opened: Opened, source: str, args: argparse.Namespace, limit: int | None = None
) -> list[list[int]]:
    """Token ids of a source's prompts; those that are conversations, and with --chat all, through the template."""
    return read_prompts(source, opened.tokenizer, limit, None, "train", chat_format(args), args.chat)
