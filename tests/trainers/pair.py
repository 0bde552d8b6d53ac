"""A tiny target, a smaller student and texts, on disk: what the trainer's tests train on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from csdraft.trainers.arguments import read_arguments
from csdraft.trainers.distill import DistillArguments
from recipes.smol.train_tokenizer import TokenizerArguments, train_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_pair(folder: Path) -> Path:
    """`target/`, `student/`, texts of unequal lengths in `texts.jsonl` and `prompts.jsonl`."""
    chosen = random.Random(0)
    texts = [
        "".join(f"x{chosen.randrange(30)} = y + {i}\n" for i in range(chosen.randrange(2, 12))) for _ in range(64)
    ]
    (folder / "corpus").mkdir()
    for i, text in enumerate(texts):
        (folder / "corpus" / f"{i}.py").write_text(text * 4)
    tokenizer = train_tokenizer(
        TokenizerArguments(str(folder / "corpus"), vocab_size=300, output_dir=str(folder / "tokenizer"))
    )
    for name, layers in (("target", 3), ("student", 1)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prompts = [json.dumps({"prompt": text[:40]}) + "\n" for text in texts[:6]]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    return folder


def settings(folder: Path, name: str, **changes: object) -> dict:
    """Flat arguments of a short run on the CPU."""
    return {
        "target": str(folder / "target"),
        "student": str(folder / "student"),
        "dataset": str(folder / "texts.jsonl"),
        "max_length": 48,
        "packing": False,
        "output_dir": str(folder / name),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "threads": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "on_policy_prompt": 6,
    } | changes


def arguments(folder: Path, name: str, **changes: object) -> DistillArguments:
    return read_arguments(
        DistillArguments, None, [f"{k}={json.dumps(v)}" for k, v in settings(folder, name, **changes).items()]
    )
