"""A target's own continuations: what it writes after real prompts and beginnings, to align a drafter with it.

Sequence-level distillation (Kim and Rush, arXiv 1606.07947); DistillSpec (arXiv 2310.08461) finds text written by the
target the safest data for drafters: one trained on it agrees more often with the target than one trained on the text
that the target was trained on. Write it at the temperature at which the target will be used.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from csdraft.data.changes import check_unchanged
from csdraft.data.engine import Engine, checked_url, each
from csdraft.data.shards import Place, Shard, batches, finished, store, stored, write_whole
from csdraft.data.sources import open_source, prompts_of, texts_of
from csdraft.data.tally import Counted, Tally
from csdraft.data.target import TargetArguments
from csdraft.data.text import END

__all__ = ["GenerateArguments", "beginnings", "generate"]

FIXED = ("target", "target_revision", "chat_template", "chat_template_options", "max_new_tokens", "sampled",
         "temperature", "seed")  # fmt: skip
"""What must not change between runs that write one data set. That prompts do not is checked row by row."""

OF_A_RUN = ("rank", "world_size", "threads", "engine", "engine_timeout")


@dataclass
class GenerateArguments(TargetArguments):
    """What a target writes, and after what."""

    count: int | None = field(
        default=None, metadata={"help": "Rows to write; none is one for each example of the data."}
    )
    begin: int = field(default=128, metadata={"help": "Tokens of a beginning; prompts are used as they are."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens that the target adds at most."})
    sampled: float = field(default=0.5, metadata={"help": "Share of the rows written at `temperature`, not greedily."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature at which the target will be used."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of beginnings, and of sampling."})
    assistant: Any = field(
        default="max_gram",
        metadata={"help": "Drafter, for speed alone: a type, {type: ..., options}, a folder or a Hub id."},
    )
    text_file: str | None = field(
        default=None, metadata={"help": "File for the same texts as plain text, for pretrain.py."}
    )
    engine: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible server that writes in place of this process, such as "
            "http://localhost:8000/v1; `batch_size` requests at once, no `assistant`."
        },
    )
    engine_model: str | None = field(
        default=None, metadata={"help": "The target's name on that server; none is the only one there, or `target`."}
    )
    engine_timeout: float = field(default=600, metadata={"help": "Seconds that the server may be silent."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is not None:
            checked_url(self.engine)
        self.check_at_least(1, "begin", "max_new_tokens", *(["count"] if self.count is not None else []))
        if not 0 <= self.sampled <= 1:
            raise ValueError(f"sampled={self.sampled} is a share of the rows: give a number from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; sampled=0 is greedy")


def generate(args: GenerateArguments, assistant: Any) -> Any:
    """Lets the target write on; continues where a killed run stopped.

    Rows go to `output_dir/parts`, a file for each process. When all are there, the process that comes last stores them
    as a data set in `output_dir`, in the order of their prompts. Row i is sampled with row seed i (if `seed` is 0), so
    that its text does not depend on the drafter, nor, but for rounding, on batches, processes and interruptions.

    Args:
        args: see `GenerateArguments`.
        assistant: for `target.generate`; it changes how fast texts come, not what they say.

    Returns:
        A `datasets.Dataset` of `input_ids`, `prompt_length` and `index`, which `read_rows` reads; None while other
        processes have rows to write.

    Raises:
        ValueError: before the target is loaded, for data that cannot be read, prompts that do not fit, and an
            `output_dir` that cannot be written or that other prompts or another target filled.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("storing what a target writes needs datasets: pip install csdraft[train]")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, (config, tokenizer) = args.folder(), args.read_target()
    prompts = read_starts(args, config, tokenizer)
    check_same(folder / "arguments.json", args, prompts.tally)
    if stored(folder) != len(prompts):
        places = find_rows(folder / "parts", prompts)
        kinds = [is_sampled(row, args.sampled) for row in range(len(prompts))]
        plan = batches([len(prompt) for prompt in prompts], args.batch_size, kinds)
        missing = [rows for rows in args.part.of(plan) if not places.keys() >= set(rows)]
        if missing:
            wanted = [row for rows in missing for row in rows if row not in places]
            if args.engine is None:
                written = Writer(args, args.load_target(), tokenizer, assistant, prompts).rows(missing)
            else:
                written = rows_of_engine(args, config, tokenizer, prompts, wanted)
            append(args, prompts, set(wanted), written)
            places = find_rows(folder / "parts", prompts)
        if len(places) < len(prompts):
            print(f"{len(prompts) - len(places):,} rows are still to come from other processes")
            return None
        store(folder, [places[row] for row in range(len(prompts))])
    return load(args, folder, prompts, tokenizer)


def read_starts(args: GenerateArguments, config: Any, tokenizer: Any) -> Counted:
    """Token ids of what the target writes on from: prompts, or beginnings of texts."""
    context = getattr(config, "max_position_embeddings", None)
    longest = None if config.is_encoder_decoder or not context else context - args.max_new_tokens
    opened = open_source(args.dataset, args.split, args.dataset_limit, in_memory=True)
    if opened.kind == "text":
        if longest is not None and args.begin > longest:
            raise ValueError(
                f"begin={args.begin} and max_new_tokens={args.max_new_tokens} tokens do not fit into the target's "
                f"context of {context}; lower one of them"
            )
        texts = texts_of(opened, tokenizer, args.begin)
        starts = beginnings(texts, args.begin, args.seed, tokenizer.bos_token_id)
        return Counted(islice(starts, args.count or len(opened.examples)), texts.tally)
    prompts = prompts_of(opened, tokenizer, longest, args.chat)
    if args.count is not None and args.count > len(prompts):
        raise ValueError(
            f"count={args.count}, but {args.dataset!r} has {len(prompts)} prompts; give fewer, or another seed and "
            "output_dir for other continuations of the same"
        )
    return Counted(prompts[: args.count], prompts.tally)


def beginnings(
    texts: Sequence[Sequence[int]], length: int, seed: int = 0, bos: int | None = None
) -> Iterator[list[int]]:
    """Endless pieces of `length` tokens from anywhere in the texts; the same for the same seed.

    Args:
        texts: token ids of each; one that is not longer than `length` is left out.
        length: tokens of a piece.
        seed: of the choice.
        bos: a token that opens every piece, if it opens the texts.
    """
    texts = [text for text in texts if len(text) > length]
    if not texts:
        raise ValueError(f"no text has more than {length} tokens; ask for shorter beginnings")
    weights = list(accumulate(map(len, texts)))
    chosen = random.Random(seed)
    while True:
        (text,) = chosen.choices(texts, cum_weights=weights)
        start = chosen.randrange(len(text) - length)
        piece = text[start : start + length]
        yield [bos, *piece[1:]] if bos is not None and text[0] == bos else list(piece)


def is_sampled(row: int, share: float) -> bool:
    """Whether a row is sampled rather than greedy: `share` of them are, evenly spread."""
    return int((row + 1) * share) > int(row * share)


def check_same(path: Path, args: GenerateArguments, tally: Tally) -> None:
    """Raises ValueError if what is there was written with other arguments; notes these, and the counts of the data."""
    document = {name: value for name, value in asdict(args).items() if name not in OF_A_RUN}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    check_unchanged(
        f"{path.parent} holds rows of",
        {name: before.get(name) for name in FIXED} if before is not None else {},
        document,
        "Give another output_dir, or remove that folder",
    )
    with write_whole(path) as file:
        file.write(json.dumps(document | {"data": tally.described()}, indent=2).encode())


def find_rows(folder: Path, prompts: Sequence[list[int]]) -> dict[int, Place]:
    """Where the finished rows of these prompts are."""
    places: dict[int, Place] = {}
    for row, place in finished(folder):
        if row["index"] < len(prompts):
            check_row(row, prompts, place.path)
            places.setdefault(row["index"], place)
    return places


def check_row(row: Mapping[str, Any], prompts: Sequence[list[int]], where: Path) -> None:
    """Raises ValueError if a row does not follow its prompt."""
    if row["input_ids"][: row["prompt_length"]] != prompts[row["index"]]:
        raise ValueError(
            f"row {row['index']} in {where} follows another prompt than that of the data now: the data, or how it is "
            "read, has changed; give another output_dir, or remove that folder"
        )


@dataclass(frozen=True)
class Writer:
    """A target and what it writes on from."""

    args: GenerateArguments
    target: Any
    tokenizer: Any
    assistant: Any
    prompts: Sequence[list[int]]

    def rows(self, batches: Iterable[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """The rows of whole batches, so that each comes out as it would have: the caller may know some."""
        for rows in batches:
            yield from zip(rows, self.write(rows), strict=True)

    @torch.no_grad()
    def write(self, rows: Sequence[int]) -> list[list[int]]:
        """What follows the prompts of `rows`, all sampled or all greedy; an end-of-text token is part of it."""
        encoder = self.target.config.is_encoder_decoder
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        ids, mask = padded([self.prompts[row] for row in rows], pad, left=not encoder)
        sample = is_sampled(rows[0], self.args.sampled)
        texts = self.target.generate(
            ids.to(self.target.device),
            attention_mask=mask.to(self.target.device),
            max_new_tokens=self.args.max_new_tokens,
            assistant=self.assistant,
            row_seeds=[(self.args.seed << 32) + row for row in rows],
            do_sample=sample,
            pad_token_id=pad,
            use_cache=True,
            **({} if self.assistant is None else {"reuse": False}),
            **({"temperature": self.args.temperature, "top_k": 0, "top_p": 1.0} if sample else {}),
        )
        end = self.target.generation_config.eos_token_id
        ends = set(end) if isinstance(end, list) else {end}
        return [up_to(ends, text) for text in texts[:, 1 if encoder else ids.shape[1] :].tolist()]


def padded(texts: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids, filled up on one side, and which of them are the texts': both (texts, longest) int64."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        at = slice(width - len(text), width) if left else slice(len(text))
        ids[row, at] = torch.tensor(text)
        mask[row, at] = 1
    return ids, mask


def up_to(ends: set[int], text: list[int]) -> list[int]:
    """A text without what fills it up after its end."""
    last = next((i for i, token in enumerate(text) if token in ends), len(text))
    return text[: last + 1]


def rows_of_engine(
    args: GenerateArguments, config: Any, tokenizer: Any, prompts: Sequence[list[int]], wanted: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """The rows that are wanted, with what a server writes, as it comes."""
    if config.is_encoder_decoder:
        raise ValueError(f"engine={args.engine!r}: a {config.model_type!r} target writes here alone; leave engine out")
    vocab = config.get_text_config(decoder=True).vocab_size
    engine = Engine(
        str(args.engine), args.engine_model, args.target, tokenizer, vocab, ends_at(args, config), args.engine_timeout
    )
    print(engine.open(prompts[wanted[0]]))

    def write(row: int) -> list[int]:
        temperature = args.temperature if is_sampled(row, args.sampled) else 0.0
        return engine.write(prompts[row], args.max_new_tokens, temperature, (args.seed * 1_000_003 + row) % (1 << 31))

    return each(write, wanted, args.batch_size, engine.stopped)


def ends_at(args: GenerateArguments, config: Any) -> set[int]:
    """The tokens at which the target's texts end, without its weights."""
    try:
        found = GenerationConfig.from_pretrained(args.target, revision=args.target_revision or "main").eos_token_id
    except OSError:  # it has no generation_config.json
        found = config.get_text_config(decoder=True).eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def append(
    args: GenerateArguments, prompts: Sequence[list[int]], wanted: set[int], rows: Iterable[tuple[int, list[int]]]
) -> None:
    """Appends the rows that are wanted to this process's file, as they are written."""
    part = args.part
    title = f"part {part.rank + 1} of {part.world_size}"
    path = Path(args.output_dir, "parts", f"{part.rank:05}.jsonl")
    with Shard(path) as shard, tqdm(total=len(wanted), unit=" rows", desc=title, disable=part.local_rank > 0) as bar:
        for row, text in rows:
            if row in wanted:
                ids = [*prompts[row], *text]
                shard.append([{"index": row, "prompt_length": len(prompts[row]), "input_ids": ids}])
                bar.update()


def load(args: GenerateArguments, folder: Path, prompts: Sequence[list[int]], tokenizer: Any) -> Any:
    """The stored rows, and the same as a text file where one is wanted."""
    import datasets

    rows: Any = datasets.load_from_disk(folder)
    for row in rows:
        check_row(row, prompts, folder)
    if args.text_file is not None:
        Path(args.text_file).parent.mkdir(parents=True, exist_ok=True)
        with write_whole(Path(args.text_file)) as file:
            for row in rows:
                text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
                file.write(f"{text}\n{END}\n".encode())
    return rows
