"""Train a byte-level BPE tokenizer on a corpus; it round-trips any text.

python recipes/smol/train_tokenizer.py --config recipes/smol/tokenizer.yaml vocab_size=1024
"""

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from csdraft.data.text import END, read_corpus, split
from csdraft.trainers.command import run_script
from csdraft.trainers.students import save_tokenizer

__all__ = ["TokenizerArguments", "train_tokenizer"]


@dataclass
class TokenizerArguments:
    """What a tokenizer is trained on, and its size."""

    corpus: str = field(
        default="stdlib", metadata={"help": "'stdlib', 'stdlib-tests', a folder of text files, or a .txt(.xz) file."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens, at least the 256 bytes and one."})
    output_dir: str = field(default="out/smol/tokenizer", metadata={"help": "Folder for the tokenizer."})


def train_tokenizer(args: TokenizerArguments) -> PreTrainedTokenizerFast:
    """Train on the documents that are not held out, and save; `<|endoftext|>` is id 0 and the only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    train, _ = split(read_corpus(args.corpus))
    tokenizer.train_from_iterator((document.text for document in train), trainer, length=len(train))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    save_tokenizer(fast, args.output_dir)
    return fast


def main(args: TokenizerArguments) -> None:
    train_tokenizer(args)


if __name__ == "__main__":
    run_script(__doc__, TokenizerArguments, main)
