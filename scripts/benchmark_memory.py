"""What the loss takes in memory, measured, beside what it is said to take. Runs anywhere.

python scripts/benchmark_memory.py --vocabulary 151936 --positions 4096
"""

import argparse
import json

import torch

from csdraft.bench.loss_memory import loss_memory
from csdraft.trainers.objective import Objective

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=json.loads, default='{"forward_kl": 1.0}', help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=151936, help="tokens (default: %(default)s, Qwen3's)")
    parser.add_argument("--positions", type=int, default=4096, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="positions at once (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of hidden states; it costs time (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    options = parser.parse_args()
    found = loss_memory(
        Objective(options.losses, chunk=options.chunk),
        options.vocabulary,
        options.positions,
        options.width,
        getattr(torch, options.dtype),
        torch.device(options.device),
    )
    resident = "" if found.resident is None else f", the process grew by {found.resident / 1e9:.2f} GB"
    print(f"measured {found.tensors / 1e9:.2f} GB of tensors{resident}")
    print(f"forecast {found.forecast / 1e9:.2f} GB; of one chunk of all positions {found.whole / 1e9:.1f} GB")
    print("PASS" if found.tensors <= found.forecast else "FAIL", "at most the forecast")
