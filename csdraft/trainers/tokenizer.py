"""A byte-level BPE tokenizer trained on a corpus; round-trips any text."""

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from csdraft.data.text import END, read_corpus, split

__all__ = ["TokenizerArguments", "save_tokenizer", "train_tokenizer"]


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


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """As `save_pretrained`, but tokenizer.json on one line: less than half the bytes in git."""
    for key in ("is_local", "local_files_only"):  # how it was loaded; transformers would write them down
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
