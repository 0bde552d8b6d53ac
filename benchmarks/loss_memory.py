"""What the chunked loss really takes, beside what `Objective.peak_bytes` foretells. Runs anywhere.

python -m benchmarks memory --vocabulary 151936 --positions 4096
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import nn

from benchmarks.memory import PeakMemory
from csdraft.amounts import size_text
from csdraft.trainers.objective import Objective
from csdraft_command import COUNT

__all__ = ["LossMemory", "loss_memory"]

WARM_UP = 16
"""Positions of a first turn, which loads kernels and their workspaces."""


@dataclass(frozen=True)
class LossMemory:
    """Bytes.

    Attributes:
        tensors: the most that the loss and its backward held at once, by the allocator's own record: of a CUDA device,
            or of tensors on the CPU.
        resident: by how much the process grew; None on a CUDA device, or where the system does not say.
        forecast: `Objective.peak_bytes`.
        whole: the forecast for one chunk of all positions.
    """

    tensors: int
    resident: int | None
    forecast: int
    whole: int


def loss_memory(
    objective: Objective, vocab: int, positions: int, width: int, dtype: torch.dtype, device: torch.device
) -> LossMemory:
    """Loss and backward on random hidden states, of a student and a target whose heads are linear.

    Args:
        objective: the mixed loss and its chunk.
        vocab: tokens.
        positions: scored positions of a micro-batch.
        width: of both models' hidden states; the gradients of the student's are part of what is measured, as is that
            of its head. Weights and hidden states are not.
        dtype: of weights and hidden states.
        device: where it runs.
    """
    heads = [nn.Linear(width, vocab, bias=False, dtype=dtype, device=device) for _ in range(2)]
    heads[1].requires_grad_(False)
    hidden = [torch.randn(positions, width, dtype=dtype, device=device) for _ in range(2)]
    labels = torch.randint(vocab, (positions,), device=device)

    def turn(count: int) -> None:
        student = hidden[0][:count].requires_grad_()
        objective.total(student, hidden[1][:count], labels[:count], *heads).backward()
        heads[0].zero_grad()

    turn(min(WARM_UP, positions))
    with PeakMemory(device) as seen:
        turn(positions)
    cuda = device.type == "cuda"
    tensors = seen.peak or 0 if cuda else _recorded(lambda: turn(positions))
    whole = replace(objective, chunk=positions).peak_bytes(vocab)
    return LossMemory(tensors, None if cuda else seen.peak, objective.peak_bytes(vocab), whole)


def _recorded(run: Callable[[], None]) -> int:
    """Bytes that the CPU allocator held at most, on top of what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = (event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")  # type: ignore[union-attr]
    return max(accumulate(changes), default=0)


def main(argv: Sequence[str]) -> int:
    """Runs it; the exit status is 0 if the forecast held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", type=json.loads, default='{"forward_kl": 1.0}', help="default: %(default)s")
    parser.add_argument("--vocabulary", type=COUNT, default=151936, help="tokens (default: %(default)s, Qwen3's)")
    parser.add_argument("--positions", type=COUNT, default=4096, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--chunk", type=COUNT, default=256, help="positions at once (default: %(default)s)")
    parser.add_argument(
        "--width", type=COUNT, default=64, help="of hidden states; it costs time (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    options = parser.parse_args(argv)
    found = loss_memory(
        Objective(options.losses, chunk=options.chunk),
        options.vocabulary,
        options.positions,
        options.width,
        getattr(torch, options.dtype),
        torch.device(options.device),
    )
    resident = "" if found.resident is None else f", the process grew by {size_text(found.resident)}"
    print(f"measured {size_text(found.tensors)} of tensors{resident}")
    print(f"forecast {size_text(found.forecast)}; of one chunk of all positions {size_text(found.whole)}")
    passed = found.tensors <= found.forecast
    print("PASS" if passed else "FAIL", "at most the forecast")
    return 0 if passed else 1
