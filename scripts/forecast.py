"""What a head's training will take of each GPU, computed from the recipe and the target's config, without any weight.

python scripts/forecast.py --config recipes/llama-3.1-8b/eagle3.yaml [--tflops 200] [target=FOLDER key=value ...]

Memory is what a GPU holds at once under DDP: weights, gradients and optimiser exactly; what the head keeps for its
backward is counted from a step without numbers, in float32, with attention that keeps no scores; the rest by formula.
The allocator's waste and DDP's buffers come on top: some GB. Time is arithmetic alone, at a speed that you name.
"""

import argparse
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from csdraft.amounts import count_text, size_text
from csdraft.data.target import read_target
from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.command import one_line_errors
from csdraft.trainers.distill import DistillArguments
from csdraft.trainers.students import kind_asked
from csdraft.trainers.students._kind import HeadKind


class Fused(torch.autograd.Function):
    """Attention as GPU kernels do it: its backward needs inputs and output, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    return Fused.apply(query, key, value)  # type: ignore[return-value]


def kept_bytes(head: Any, rows: int, length: int, steps: int) -> int:
    """What the head's drafting steps keep for their backward."""
    kept: dict[int, Any] = {}
    own = {parameter.untyped_storage()._cdata for parameter in head.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    states = {tap: torch.zeros(rows, length, head.config.hidden_size) for tap in head.taps}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    try:
        with hooks, patch("torch.nn.functional.scaled_dot_product_attention", fused):
            outputs = [
                head.draft_logits(output[:, :1]) for output in head.unrolled(ids, ids, head.fuse(states), steps)
            ]
    except NotImplementedError:  # a number decides what is computed, and there are none here
        raise ValueError(
            f"there is no forecast for {type(head).__name__} heads: each step has layers of its own; measure 20 steps"
        ) from None
    assert all(output.requires_grad for output in outputs)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def forecast(args: DistillArguments, processes: int, tflops: float) -> list[str]:
    """Lines for people."""
    config, _ = read_target(args)
    kind: Any = kind_asked(args.student, args.init, args.peft)
    if not isinstance(kind, HeadKind) or args.init is None:
        raise ValueError("a forecast is for recipes that make a head: init: {eagle3: {...}} or another")
    text, asked = config.get_text_config(decoder=True), kind._asked(args.init[kind.name] or {})
    kind.check(config, args.init[kind.name] or {})
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
        head: Any = kind.new(text, asked, asked.draft_vocab or text.vocab_size)
        head.embed_tokens.requires_grad_(False)  # the target's
        steps = head.options.steps
        kept = kept_bytes(head.float(), args.per_device_train_batch_size, args.max_length, steps)
    size = getattr(torch, args.target_dtype, torch.float32).itemsize
    trained = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
    tokens, width, vocab = args.per_device_train_batch_size * args.max_length, text.hidden_size, text.vocab_size
    positions = tokens * width * steps
    parts = {
        "target, frozen": size * target.num_parameters(),
        "head with the target's embedding": 4 * head.num_parameters(),
        "gradients, and AdamW's two moments": 12 * trained,
        "hidden states of the target": size * tokens * width * (text.num_hidden_layers + 1),
        "one block of the target at work": size * tokens * (4 * width + 3 * text.intermediate_size),
        "kept for the head's backward": kept + (4 + size) * positions,
        "logits and losses, a chunk at a time": args.objective.peak_bytes(vocab),
    }
    layer, drafted = trained - head.lm_head.weight.numel(), len(head.d2t)
    # The layer forward and backward; logits of both sides are computed twice, those of the head have a backward.
    step_flops = 6 * layer + 8 * width * drafted + 4 * width * vocab
    flops = 2 * target.num_parameters() + steps * step_flops
    batch = tokens * args.gradient_accumulation_steps * processes
    seconds = flops * batch / processes / (tflops * 1e12)
    lines = [f"{size_text(amount):>8}  {name}" for name, amount in parts.items()]
    lines.append(f"{size_text(sum(parts.values())):>8}  on each of {processes} GPUs")
    lines.append(f"{count_text(trained)} parameters are trained; {batch:,} tokens a step, {steps} drafting steps each")
    hours = seconds * max(args.max_steps, 0) / 3600
    lines.append(f"{seconds:.1f} s a step at {tflops:g} TFLOP/s a GPU: {hours:.1f} h for {args.max_steps:,} steps")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe of a head")
    parser.add_argument("--processes", type=int, default=8, help="GPUs (default: %(default)s)")
    parser.add_argument("--tflops", type=float, default=200, help="speed of a GPU in practice (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value")
    given = parser.parse_args()
    with one_line_errors(module=__name__):
        args = read_arguments(DistillArguments, given.config, ["use_cpu=true", *given.overrides])
        lines = forecast(args, given.processes, given.tflops)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
