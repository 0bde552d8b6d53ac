"""Tokens a second on a GPU: an 8B-shaped target with random weights, a drafter that is right in most positions.

python -m benchmarks gpu                                  # three minutes of an H100
python -m benchmarks gpu --only plain "drafter, 5 tokens" --new 64
python -m benchmarks gpu --size tiny --device cpu         # whether it runs

Random weights of Llama-3.1-8B's shape: time does not depend on what they say. The drafter is the target's first two
layers; the target's later ones are scaled down until both mostly choose the same token. In bfloat16 texts part at
near-ties, so a row also says how many tokens a round gave.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import csdraft
from csdraft import CascadeDrafter, MaxGram, ModelDrafter
from csdraft.amounts import count_text
from csdraft_command import COUNT

__all__ = ["ROWS", "Measured", "measure", "pair_of_models"]

SIZES = {
    "8b": (32, 4096, 14336, 32, 8, 128_256),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "tiny": (4, 64, 128, 4, 2, 512),
}
"""Layers, width, width of the MLP, heads, heads of keys and values, tokens."""
LATER = 0.028
"""What the output of later layers is multiplied by: drafter and target then agree in about five positions of six."""
PROMPT, TURNS = 128, 4
PLAIN = {"custom_generate": csdraft.decode}
FIXED = {"assistant": "five", "schedule": "fixed"}
ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "transformers": (1, {}),
    "transformers, static cache, compiled": (1, {"cache_implementation": "static"}),
    "transformers, assistant_model, 5 tokens": (1, {"assistant_model": "drafter"}),
    "plain": (1, PLAIN),
    "drafter, 5 tokens": (1, FIXED),
    "drafter": (1, {"assistant": "five"}),
    "max_gram": (1, {"assistant": "max_gram"}),
    "cascade": (1, {"assistant": "cascade"}),
    "auto": (1, {"assistant": "auto"}),
    "transformers, T=1": (1, {"do_sample": True}),
    "drafter, 5 tokens, T=1": (1, {**FIXED, "do_sample": True}),
    **{f"transformers, {rows} rows": (rows, {}) for rows in (8, 32)},
    **{f"drafter, 5 tokens, {rows} rows": (rows, FIXED) for rows in (8, 32)},
    **{f"drafter, {rows} rows": (rows, {"assistant": "five"}) for rows in (8, 32)},
    "plain, eager": (1, {**PLAIN, "graphs": False}),
    "plain, compiled": (1, {**PLAIN, "graphs": "compile"}),
    "drafter, 5 tokens, eager": (1, {**FIXED, "graphs": False}),
    "drafter, 5 tokens, compiled": (1, {**FIXED, "graphs": "compile"}),
}
"""Name -> batch size and options of `generate`, assistants by the names of `assistants`.

Other ways to run come last: a call with another one drops what was prepared.
"""


@dataclass(frozen=True)
class Measured:
    """One row.

    Attributes:
        tokens_per_second: of the fastest call but the first, over all rows of the batch.
        first_call: its seconds: it loads kernels, records or compiles.
        per_round: tokens a round gave a row; 0 for transformers' own decoding.
        recorded: shapes of the target that are replayed.
    """

    tokens_per_second: float
    first_call: float
    per_round: float = 0.0
    recorded: int = 0


def pair_of_models(size: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Target and drafter, which shares the target's weights."""
    layers, width, inner, heads, kv, vocab = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        pad_token_id=0,
    )
    config.eos_token_id = None
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        target = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        target.model.embed_tokens.weight.mul_(20)  # the last token decides most of the next: no early loops
        later: Any = target.model.layers[2:]
        for layer in later:
            layer.self_attn.o_proj.weight.mul_(LATER)
            layer.mlp.down_proj.weight.mul_(LATER)
    short = copy.deepcopy(config)
    short.num_hidden_layers = 2
    with torch.device("meta"):
        drafter = LlamaForCausalLM(short).eval()
    drafter.model.embed_tokens, drafter.lm_head = target.model.embed_tokens, target.lm_head
    drafter.model.norm, drafter.model.rotary_emb = target.model.norm, target.model.rotary_emb
    drafter.model.layers = target.model.layers[:2]
    drafter.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return target, drafter


def assistants(drafter: Any) -> dict[str, Any]:
    five = ModelDrafter(drafter, depth=5)
    cascade = CascadeDrafter([five, MaxGram()], [[3, 8], [0, 4]])
    return {"drafter": drafter, "five": five, "cascade": cascade, "max_gram": MaxGram()}


def measure(target: Any, batch: int, options: Mapping[str, Any], new: int) -> Measured:
    """Times calls of `generate`, the first apart."""
    vocab = target.config.vocab_size
    ids = torch.randint(10, vocab - 10, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    ids = ids.to(target.device)
    call: Callable[[], Any] = partial(
        target.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    seconds, output = [], None
    for _ in range(TURNS):
        torch.manual_seed(1)
        started = time.perf_counter()
        output = call()
        output.sequences.cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    report: Any = getattr(output, "report", None)
    speed = batch * new / min(seconds[1:])
    if report is None:
        return Measured(speed, seconds[0])
    return Measured(speed, seconds[0], report.block_efficiency, report.models["target"].recorded)


def line(name: str, found: Measured, base: Measured | None) -> str:
    ratio = f"{found.tokens_per_second / base.tokens_per_second:.2f}" if base else ""
    per_round = f"{found.per_round:.2f}" if found.per_round else ""
    return f"| {name} | {found.tokens_per_second:.0f} | {ratio} | {per_round} | {found.first_call:.1f} |"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="8b", help="of the target (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=COUNT, default=128, help="tokens to write, half of them in batches")
    parser.add_argument("--only", nargs="*", choices=ROWS, metavar="ROW", help="of: " + "; ".join(ROWS))
    parser.add_argument("--prepare", action="store_true", help="record and time all shapes first, and print them")
    parser.add_argument("--out", type=Path, default=Path("out/bench/gpu.json"))
    options = parser.parse_args(argv)
    target, drafter = pair_of_models(options.size, options.device, getattr(torch, options.dtype))
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    parameters = count_text(target.num_parameters())
    print(f"{parameters} parameters in {options.dtype} on {where}, torch {torch.__version__}\n")
    if options.prepare:
        print(csdraft.prepare(target, ModelDrafter(drafter, depth=5), rows=1, slots=512))
    print("| row | tokens/s | to transformers | tokens a round | first call, s |\n|---|---|---|---|---|")
    found: dict[str, Measured] = {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    named = assistants(drafter)
    for name in options.only or ROWS:
        batch, how = ROWS[name]
        how = {key: named.get(value, value) if key.startswith("assistant") else value for key, value in how.items()}
        found[name] = measure(target, batch, how, options.new if batch == 1 else options.new // 2)
        base = found.get("transformers" if batch == 1 else f"transformers, {batch} rows")
        print(line(name, found[name], base), flush=True)
        options.out.write_text(json.dumps({name: asdict(row) for name, row in found.items()}, indent=1))
