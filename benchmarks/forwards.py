"""What packed weights save on a CPU: times of forwards with the model's own weights and with packed ones.

python -m benchmarks forwards --target MODEL --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from csdraft.prepare import measured
from csdraft_command import COUNT

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
MODES = {"own": False, "packed": "auto"}


def main(argv: Sequence[str]) -> None:
    """Prints a table of ratios: both ways in turn, and the medians of all passes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks forwards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="a causal model's folder")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--threads", type=COUNT, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--slots", type=COUNT, default=256, help="tokens that it sees (default: %(default)s)")
    parser.add_argument("--passes", type=COUNT, default=5, help="over all widths and ways (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval()
    shapes = [(width, options.slots) for width in WIDTHS]
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.passes):
        for way, mode in MODES.items():
            ready = measured(options.target, target, 1, shapes, mode, lambda *_: None)  # type: ignore[arg-type]
            for shape, seconds in ready.costs.items():
                found.setdefault((way, shape.queries), []).append(1e3 * seconds)
    print(f"{options.target}, {options.dtype}, {options.threads} threads, {options.slots} tokens seen\n")
    print("| tokens | own over packed | own, over one token | packed, over one token |\n|---|---|---|---|")
    first_own, first_packed = (median(found[way, 1]) for way in MODES)
    for width in WIDTHS:
        own, packed = (median(found[way, width]) for way in MODES)
        print(f"| {width} | {own / packed:.2f} | {own / first_own:.2f} | {packed / first_packed:.2f} |")
