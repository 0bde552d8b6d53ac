"""Causal language modelling from scratch: how the project's own tiny target and drafter are made."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from csdraft.data.text import Blocks, read_corpus, split
from csdraft.trainers.muon import MuonAdamW
from csdraft.trainers.tokenizer import save_tokenizer

__all__ = ["PretrainArguments", "pretrain"]


@dataclass
class PretrainArguments(TrainingArguments):
    """`transformers.TrainingArguments`, unchanged, and what a model from scratch needs besides."""

    model: str | None = field(default=None, metadata={"help": "Continue from this folder; the shape below is unused."})
    hidden_size: int = field(default=144, metadata={"help": "Width of the residual stream."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of the MLP."})
    num_hidden_layers: int = field(default=16, metadata={"help": "Depth; on a CPU a forward costs by the layer."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads."})
    num_key_value_heads: int = field(default=4, metadata={"help": "Key and value heads, a divisor of the above."})
    max_position_embeddings: int = field(default=4096, metadata={"help": "Longest text the model may read."})
    tokenizer: str = field(default="out/smol/tokenizer", metadata={"help": "Folder or Hub id of the tokenizer."})
    corpus: str = field(default="stdlib", metadata={"help": "'stdlib', a folder of text files, or a .txt(.xz) file."})
    block_size: int = field(default=512, metadata={"help": "Tokens per training example."})
    eval_blocks: int | None = field(default=None, metadata={"help": "Held-out blocks evaluated; None is all."})
    muon: bool = field(default=False, metadata={"help": "Muon for the weight matrices instead of `optim`."})
    threads: int | None = field(default=None, metadata={"help": "torch CPU threads; None leaves torch's default."})


def pretrain(args: PretrainArguments) -> Trainer:
    """Train, resuming where an interrupted run stopped; leaves bf16 weights and the tokenizer in `output_dir`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    train, held_out = (Blocks(part, tokenizer, args.block_size) for part in split(read_corpus(args.corpus)))
    held_out.blocks = held_out.blocks[: args.eval_blocks]
    model = make_model(args, tokenizer)
    betas = (args.adam_beta1, args.adam_beta2)
    muon = MuonAdamW(model, args.learning_rate, args.weight_decay, betas) if args.muon else None
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(muon, None),
    )
    result = trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    save(trainer.model, tokenizer, args.output_dir)
    return trainer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """A folder ready for inference: bf16 weights, the cache switched on again, the tokenizer."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def make_model(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of `args.model`, or a new Llama with tied embeddings, in float32."""
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        max_position_embeddings=args.max_position_embeddings,
        **{name: getattr(args, name) for name in shape},
    )
    return LlamaForCausalLM(config)


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint: the trainer writes its state last, so a killed one has none, or half of it."""
    whole = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(map(str, whole), key=lambda folder: int(folder.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True
