"""The command line, `csdraft COMMAND`: what each command takes. `csdraft/cli/COMMAND.py` runs it.

This file lies outside the package because importing `csdraft` loads torch and transformers, which takes seconds. Help,
and the answer to a mistyped option, should not wait for them.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

__all__ = ["COMMANDS", "add_chat_arguments", "add_drafting_arguments", "add_model_arguments", "add_prompts_arguments",
           "main"]  # fmt: skip

DESCRIPTION = (
    "Exact, batched speculative decoding with cascades of drafters, for `generate` of Hugging Face transformers."
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short names of dtypes."""
ENGINES = ("vllm", "sglang", "speculators")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 if all went well, 1 if a check failed, 2 if the request makes no sense."""
    version = runpy.run_path(str(Path(__file__).with_name("csdraft") / "version.py"))["__version__"]
    parser = argparse.ArgumentParser("csdraft", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"csdraft {version}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = getdoc(command) or ""
        summary, raw = text.partition("\n")[0], argparse.RawDescriptionHelpFormatter
        command(subparsers.add_parser(command.__name__, help=summary, description=text, formatter_class=raw))
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `<&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the program ends
    try:
        status = importlib.import_module(f"csdraft.cli.{args.command}").run(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # the reader has seen enough: `csdraft report FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\ncsdraft {args.command}: stopped", file=sys.stderr)
        return 130  # as shells have it
    except (ValueError, OSError) as error:  # the user can fix these: no traceback
        print(f"csdraft {args.command}: {error}", file=sys.stderr)
        return 2


def bench(parser: argparse.ArgumentParser) -> None:
    """Time your models on your prompts, side by side: plain generate, transformers' own drafting, and csdraft's.

    All methods take turns on the same prompts. A speed-up is the median ratio to plain generate, paired by prompt and
    repetition, with its 95 % interval. Texts are compared with plain generate's. Without --drafter or --cascade, the
    only drafts are copies from the text.
    """
    add_model_arguments(parser)
    add_prompts_arguments(parser)
    _add_writing_arguments(parser, length=128)
    parser.add_argument("--batch-size", type=COUNT, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--repetitions", type=COUNT, default=3, metavar="N", help="default: %(default)s")


def check(parser: argparse.ArgumentParser) -> None:
    """Prove on your own models that drafting changes nothing: neither greedy text nor the distribution of samples.

    Greedy: the text with the assistant is compared with plain generate's, and every emitted token with the logits that
    the target computes when it reads that text one token at a time. A block of tokens rounds differently from single
    tokens. Where two logits are closer than the model's own rounding, either token is right: such a near-tie is
    counted, and passes. The rounding is measured: it is the difference between the logits of one forward over the text
    and those of single steps. It counts as at least the relative precision of the model's dtype, since other kernels
    may read drafted tokens. In float32 near-ties hardly occur; in bfloat16 they do.

    Sampling: the first tokens are drawn many times with and without the assistant. A chi-square test compares the two
    tables of counts; two tables of plain generate are the control.

    The exit status is 0 if all passed and 1 if not.
    """
    add_model_arguments(parser)
    add_drafting_arguments(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help="one a line; in a .jsonl file under the key `prompt` or `messages`"
    )
    add_chat_arguments(parser)
    parser.add_argument("--max-new-tokens", type=COUNT, default=64, metavar="N", help="of the greedy texts")
    parser.add_argument("--samples", type=_number(int, 0), default=1000, metavar="N", help="0: no sampling")
    joint = "tokens whose joint distribution is compared"
    parser.add_argument("--sampled-tokens", type=COUNT, default=3, metavar="N", help=joint)
    parser.add_argument("--temperature", type=POSITIVE, default=1.0, metavar="T", help="of the sampling")
    parser.add_argument("--batch", type=COUNT, default=100, metavar="N", help="rows sampled at once")


def doctor(parser: argparse.ArgumentParser) -> None:
    """Describe this machine, check the installed versions, and say what csdraft can do with your models.

    For each model: whether drafts leave its text unchanged, whether its forwards are recorded and replayed, how long a
    forward of 1, 4, 8 and 16 tokens takes, and whether wide drafts pay. The exit status is 1 if a version is out of
    bounds, or a model cannot be loaded or decoded.
    """
    parser.add_argument("models", nargs="*", metavar="MODEL", help="path or Hub id of a model, target or drafter")
    _add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")


def export(parser: argparse.ArgumentParser) -> None:
    """Write a drafter in the format of a serving engine: vLLM, SGLang or speculators.

    A head is written in the engine's layout, an adapter is merged into its base, and a drafter that is tied to its
    target gets the target's embedding. If the engine would refuse the drafter, nothing is written: the reasons are
    printed, each with the key and a way out. The last line is the command that serves the target with the drafter.

      csdraft export out/qwen3-8b/eagle3 served/eagle3 --to vllm --target Qwen/Qwen3-8B
    """
    parser.add_argument("drafter", metavar="DRAFTER", help="path or Hub id of a head, a model or an adapter")
    parser.add_argument("folder", metavar="FOLDER", help="where to write: a new folder")
    parser.add_argument("--to", required=True, choices=ENGINES, help="the engine; vLLM loads speculators too")
    read = "path or Hub id of the drafter's target; for a head only its config.json is read"
    parser.add_argument("--target", required=True, metavar="MODEL", help=read)
    drafted = "drafted a round, in that command (default: %(default)s)"
    parser.add_argument("--tokens", type=COUNT, default=3, metavar="N", help=drafted)


def generate(parser: argparse.ArgumentParser) -> None:
    """Generate text with drafts and stream it; with --chat and no prompt, chat in the terminal.

    The chat reads one line a turn. After each answer it shows the speed, and how much of the conversation did not have
    to be read again. /reset begins a new conversation, /quit (or end of input) leaves. Without --cascade or --drafter,
    assistant="auto" drafts, which needs no other model.
    """
    add_model_arguments(parser)
    add_drafting_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue; it is not printed again")
    source.add_argument(
        "--file", metavar="PATH", help="read the prompt from a file; standard input by default (a chat with --chat)"
    )
    add_chat_arguments(parser)
    _add_writing_arguments(parser, length=256)
    parser.add_argument("--top-k", type=_number(int, 0), metavar="N")
    parser.add_argument("--top-p", type=_number(float, 0, 1), metavar="P")
    parser.add_argument("--color", action="store_true", help="colour each token by the level that drafted it")
    parser.add_argument("--report", action="store_true", help="print how drafting went, on the standard error")
    parser.add_argument("--save-report", metavar="FILE", help="write it as JSON for `csdraft report`")


def inspect(parser: argparse.ArgumentParser) -> None:
    """Say what drafting head a folder holds, what it needs, and which serving engines would load it."""
    parser.add_argument("folder", metavar="FOLDER", help="path or Hub id of the head")
    parser.add_argument("--target", metavar="MODEL", help="path or Hub id of its target: compares their sizes as well")


def report(parser: argparse.ArgumentParser) -> None:
    """Show a saved report in the terminal or turn it into a page; several are added up."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `csdraft generate --save-report` wrote")
    parser.add_argument("--html", metavar="PATH", help="write a page: the tables, and the text coloured by level")
    parser.add_argument("--tokenizer", metavar="PATH", help="path or Hub id; without it the page shows token ids")


def tune(parser: argparse.ArgumentParser) -> None:
    """Find the cascade for your models and prompts: which drafters, the K matrix, lenience, tree size, schedule.

    The target writes once on every prompt, every drafter is compared with it position by position, and each K matrix
    is replayed on those texts with measured times. The best are then timed against plain generate, side by side. The
    table shows both figures: the expected speed-up (the whole matrix each round, at lenience 1) and the measured one.
    Among cascades within 3 % of the fastest, tune prefers a strict one, and one that leaves lengths to the cost model.
    A line below the table names the rows that cannot be told apart from the fastest. Prompts are left out where
    --minutes are too short for all.
    """
    add_model_arguments(parser)
    add_prompts_arguments(parser, limit=12)
    _add_writing_arguments(parser, length=96)
    parser.add_argument("--finalists", type=COUNT, default=4, metavar="N", help="plans to time (default 4)")
    parser.add_argument("--lenience-values", type=_number(float, 1), nargs="+", default=[1.0, 2.0], metavar="X")
    sizes = "sizes of trees to try with each model (default 16); no number leaves trees out"
    parser.add_argument("--tree-nodes", type=COUNT, nargs="*", default=[16], metavar="N", help=sizes)
    parser.add_argument("--repetitions", type=COUNT, default=2, metavar="N")
    parser.add_argument(
        "--minutes", type=POSITIVE, default=3.0, metavar="M", help="time for all of it (default 3); more is surer"
    )
    parser.add_argument("--save", metavar="PATH", help="save the fastest as a cascade")


COMMANDS = (bench, check, doctor, export, generate, inspect, report, tune)

# Arguments that several commands take.


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the models, their dtype and device."""
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
    _add_device_arguments(parser)
    parser.add_argument("--seed", type=_number(int, -(1 << 63), (1 << 64) - 1), default=0, help="of sampling")


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        type=lambda name: DTYPES.get(name, name),
        choices=("auto", *DTYPES.values()),
        default="auto",
        help=f"of all models, or {', '.join(DTYPES)}; their own by default",
    )
    parser.add_argument("--device", default="cpu", help="of all models: cpu (default), cuda, cuda:1, mps, ...")
    parser.add_argument("--threads", type=COUNT, metavar="N", help="CPU threads of torch")


def add_drafting_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of drafting."""
    parser.add_argument("--k-matrix", type=_json, metavar="JSON", help="e.g. 5, [5, 10], [[5, 8], [0, 10]] or auto")
    parser.add_argument("--lenience", type=float, metavar="X", help="of inner reviewers, 1 (strict, default) or more")
    parser.add_argument("--verifier", metavar="TYPE", help="acceptance rule at the target, e.g. match or rejection")
    parser.add_argument("--schedule", metavar="TYPE", help="how much to draft, e.g. fixed or cost_model")


def add_prompts_arguments(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    """Adds the prompts' source and number, and the chat template."""
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSON lines with a `prompt` or `messages`, or a Hub data set"
    )
    add_chat_arguments(parser)
    default = "" if limit is None else " (default: %(default)s)"
    parser.add_argument("--limit", type=COUNT, default=limit, metavar="N", help=f"use at most N prompts{default}")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the chat template and its options."""
    parser.add_argument("--chat", action="store_true", help="put prompts that are text into the chat template")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template; the tokenizer's own by default")
    read = """what the template reads besides messages, e.g. '{"enable_thinking": false}'"""
    parser.add_argument("--chat-template-options", type=_json, metavar="JSON", help=read)


def _add_writing_arguments(parser: argparse.ArgumentParser, length: int) -> None:
    parser.add_argument("--max-new-tokens", type=COUNT, default=length, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=_number(float, 0), default=0.0, metavar="T", help="0 (default) is greedy"
    )


def _number(kind: type[float], least: float, most: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """A type for argparse: an int or float, at least `least`, or above it. (A ValueError would show its own name.)"""
    bounds = f"{'above' if above else 'of at least'} {least}" if most == math.inf else f"from {least} to {most}"

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most or (above and number == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {bounds}")
        return number

    return read


COUNT, POSITIVE = _number(int, 1), _number(float, 0, above=True)


def _json(text: str) -> Any:
    try:
        return text if text == "auto" else json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
