"""Train a causal language model from scratch, as the bundled target and drafter were.

python recipes/smol/pretrain.py --config recipes/smol/target.yaml max_steps=100

The same command continues an interrupted run. Exit status: 0 finished, 1 error, 130 or 143 after a signal.
The launchers of accelerate and torchrun have a status of their own after a signal, mostly 1.
"""

import random
import zlib
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from csdraft.data.text import END, Document, read_corpus, split
from csdraft.trainers.arguments import RunArguments
from csdraft.trainers.base import BaseTrainer
from csdraft.trainers.command import run_script
from csdraft.trainers.run_folder import RunFolder, only_run
from csdraft.trainers.students import save_tokenizer

__all__ = ["Blocks", "PretrainArguments", "pretrain"]


@dataclass
class PretrainArguments(RunArguments):
    """`RunArguments`, and what a model from scratch needs besides."""

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


class Blocks(Dataset):
    """Documents in a fixed shuffled order, each opened by `<|endoftext|>`, cut into blocks of equal length."""

    def __init__(self, documents: list[Document], tokenizer, block_size: int):
        shuffled = random.Random(0).sample(documents, len(documents))
        ids = tokenizer([END + document.text for document in shuffled])["input_ids"] if shuffled else []
        tokens = torch.tensor([token for document in ids for token in document], dtype=torch.int32)
        count = len(tokens) // block_size
        if not count:
            raise ValueError(
                f"{len(tokens)} tokens in {len(documents)} documents do not fill one block of {block_size}; "
                "use a larger corpus or a smaller block_size"
            )
        self.blocks = tokens[: count * block_size].view(count, block_size)  # [blocks, block_size]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block}


def pretrain(args: PretrainArguments) -> BaseTrainer:
    """Trains, or resumes where an interrupted run stopped; leaves bf16 weights and the tokenizer in `output_dir`.

    A run that is finished is left as it is.

    Raises:
        ValueError: the folder holds a run with other options or data, or another run is writing to it.
        csdraft.trainers.stops.Stopped: a loss or gradient is not finite, or the disk takes no more.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    with only_run(args.output_dir):
        return _pretrain(args)


def _pretrain(args: PretrainArguments) -> BaseTrainer:
    run = RunFolder(args)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    train, held_out = (Blocks(part, tokenizer, args.block_size) for part in split(read_corpus(args.corpus)))
    held_out.blocks = held_out.blocks[: args.eval_blocks]
    data = {"blocks": len(train), "checksum": f"{zlib.crc32(train.blocks.numpy().tobytes()):08x}"}
    run.check_data(data)
    run.say_where()
    model = make_model(args, tokenizer)
    trainer = BaseTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    trainer.noted["data"] = data
    if run.finished:
        run.restore(trainer, load_weights)
    elif run.train(trainer):
        run.finish(trainer, partial(save_result, trainer, tokenizer))
    return trainer


def save_result(trainer: BaseTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model, and the figures of training and of the held-out blocks."""
    trainer.check_weights()
    summary = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), {})
    trainer.save_metrics("train", dict(summary))
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.args.should_save:
        save(trainer.trained(), tokenizer, trainer.args.output_dir)  # type: ignore[arg-type]


def load_weights(model: PreTrainedModel, folder: str) -> None:
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict())


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


def main(args: PretrainArguments) -> int:
    return pretrain(args).status


if __name__ == "__main__":
    run_script(__doc__, PretrainArguments, main)
