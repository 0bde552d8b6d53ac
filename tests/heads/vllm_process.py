"""What vLLM writes, in an environment of its own: `python vllm_process.py FOLDER`.

FOLDER/asked.json asks for a model, what drafts for it, and prompts. FOLDER/found.json receives the texts that it
writes greedily, and how many tokens each step added to them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model


def normed_keys(model: Any, keys: torch.Tensor) -> torch.Tensor:
    """(layers, tokens, heads, head size) a DFlash head's keys of the text, each layer's with its own weights.

    On a CPU, vLLM 0.32 takes the first layer's weights for all: its kernel for CPUs knows one set of weights alone.
    """
    weights = model._k_norm_weights[:, None, None]
    return torch.nn.functional.rms_norm(keys, keys.shape[-1:], eps=model._rms_norm_eps) * weights


DFlashQwen3Model._normalize_context_k = normed_keys


def written(engine: Any, prompt: list[int], tokens: int) -> dict[str, list[int]]:
    """The text after a prompt, and the tokens that each step of the engine added to it."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine.add_request("text", {"prompt_token_ids": prompt}, sampling)
    text: list[int] = []
    steps = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = list(output.outputs[0].token_ids)
            if len(now) > len(text):
                steps.append(len(now) - len(text))
                text = now
    return {"tokens": text, "steps": steps}


def found(asked: dict[str, Any]) -> list[dict[str, list[int]]]:
    """What an engine writes after each prompt."""
    options = {"speculative_config": asked["drafter"]} if asked["drafter"] else {}
    llm = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=asked["length"],
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        **options,
    )
    return [written(llm.llm_engine, prompt, asked["tokens"]) for prompt in asked["prompts"]]


def main(folder: Path) -> None:
    texts = found(json.loads((folder / "asked.json").read_text(encoding="utf-8")))
    (folder / "found.json").write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
