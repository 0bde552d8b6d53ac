"""A target's own continuations of prompts and of beginnings of texts, as training data for a drafter.

This is sequence-level distillation (Kim and Rush, arXiv 1606.07947). DistillSpec (arXiv 2310.08461) finds that text
written by the target is the safest data: a drafter trained on it agrees with the target more often than one trained
on the text that the target was trained on. Write it at the temperature at which the target will be used.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from csdraft.data.engine import Engine, EngineError, Refused, checked_url, each, up_to_end
from csdraft.data.packing import ends_of, pad_of, padded_prompts
from csdraft.data.reader import ids_end
from csdraft.data.shards import Place, Shard, batches, check_unchanged, finished, store, stored, write_whole
from csdraft.data.sources import open_source, prompts_of, texts_of
from csdraft.data.tally import Counted, Tally
from csdraft.data.target import TargetArguments, check_at_least, check_writable, option, read_target
from csdraft.data.text import END

__all__ = ["GenerateArguments", "beginnings", "generate"]

FIXED = ("target", "target_revision", "chat_template", "chat_template_options", "max_new_tokens", "sampled",
         "temperature", "seed")  # fmt: skip
"""Arguments that must not change between runs that write one data set. Prompts are compared row by row."""

OF_A_RUN = ("rank", "world_size", "threads", "engine", "engine_timeout")
"""Arguments that do not describe the data set."""

FIRST = 8
"""The run ends if a server refuses this many rows at the start and writes none."""


@dataclass
class GenerateArguments(TargetArguments):
    """What a target writes, and after what."""

    count: int | None = option(None, "Rows to write; none is one for each example of the data.")
    begin: int = option(128, "Tokens of a beginning; prompts are used as they are.")
    max_new_tokens: int = option(128, "Tokens that the target adds at most.")
    sampled: float = option(0.5, "Share of the rows written at `temperature`, not greedily.")
    temperature: float = option(1.0, "Temperature at which the target will be used.")
    seed: int = option(0, "Seed of the choice of beginnings, and of sampling.")
    assistant: Any = option(
        "max_gram", "Drafter, for speed alone: a type, {type: ..., options}, a folder or a Hub id."
    )
    text_file: str | None = option(None, "File for the same texts as plain text, for pretrain.py.")
    engine: str | None = option(
        None,
        "Address of an OpenAI-compatible server that writes in place of this process, such as "
        "http://localhost:8000/v1; `batch_size` requests at once, no `assistant`.",
    )
    engine_model: str | None = option(
        None, "The target's name on that server; none is the only one there, or `target`."
    )
    engine_timeout: float = option(600, "Seconds that the server may be silent.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is not None:
            checked_url(self.engine)
        check_at_least(self, 1, "begin", "max_new_tokens", "count")
        if not 0 <= self.sampled <= 1:
            raise ValueError(f"sampled={self.sampled} is a share of the rows: give a number from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; sampled=0 is greedy")


def generate(args: GenerateArguments, assistant: Any) -> Any:
    """Lets the target continue prompts; a run that was killed continues where it stopped.

    Rows go to `output_dir/parts`, one file for each process. The process that finishes last stores them all as a data
    set in `output_dir`, in the order of their prompts. Row i is sampled with row seed i (if `seed` is 0), so its text
    does not depend on the drafter, nor, except for rounding, on batches, processes and interruptions. Rows that a
    server refuses are left out, and noted in `output_dir/refused`.

    Args:
        assistant: for `target.generate`; it changes the speed, not the text.

    Returns:
        A `datasets.Dataset` of `input_ids`, `prompt_length` and `index`, which `read_rows` reads; None while other
        processes still have rows to write.

    Raises:
        ValueError: before the target is loaded, if the data cannot be read, prompts do not fit, or `output_dir` cannot
            be written or holds rows of other prompts or of another target. Or the server does not answer, or it
            refuses all of the first rows.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("storing what a target writes needs datasets: pip install csdraft[train]")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, (config, tokenizer) = check_writable(args.output_dir), read_target(args)
    prompts = read_starts(args, config, tokenizer)
    check_same(folder / "arguments.json", args, prompts.tally)
    refused = find_rows(folder / "refused", prompts)
    if stored(folder) + len(refused) != len(prompts):
        places = find_rows(folder / "parts", prompts)
        kinds = [is_sampled(row, args.sampled) for row in range(len(prompts))]
        plan = batches([len(prompt) for prompt in prompts], args.batch_size, kinds)
        known = places.keys() | refused.keys()
        missing = [rows for rows in args.part.of(plan) if not known >= set(rows)]
        if missing:
            wanted = sorted(row for rows in missing for row in rows if row not in known)
            if args.engine is None:
                written = rows_of_target(args, args.load_target(), tokenizer, assistant, prompts, missing)
            else:
                answers = rows_of_engine(args, config, tokenizer, prompts, wanted)
                written = without_refused(answers, args, prompts, wanted, bool(places))
            # A target's vocabulary may be padded: a text ends before a token that the tokenizer lacks.
            texts = ((row, takewhile(ids_end(tokenizer).__gt__, text)) for row, text in written)
            append(args, prompts, set(wanted), texts)
            places, refused = (find_rows(folder / name, prompts) for name in ("parts", "refused"))
        if left := len(prompts) - len(places) - len(refused):
            print(f"other processes still have {left:,} rows to write")
            return None
        store(folder, [places[row] for row in sorted(places)])
    if refused:
        print(
            f"{len(refused):,} of {len(prompts):,} rows are left out: the server refuses their prompts. The first is "
            f"row {min(refused)}: {refused[min(refused)].read()['refused']} To ask again, remove {folder / 'refused'}"
        )
    return load(args, folder, prompts, tokenizer)


def read_starts(args: GenerateArguments, config: Any, tokenizer: Any) -> Counted:
    """Token ids of what the target continues: prompts, or beginnings of texts."""
    context = getattr(config, "max_position_embeddings", None)
    longest = None if config.is_encoder_decoder or not context else context - args.max_new_tokens
    opened = open_source(args.dataset, args.split, args.dataset_limit)
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
    """Endlessly draws pieces of `length` tokens from anywhere in the texts, which are longer.

    Args:
        bos: begin-of-text token; pieces of texts that start with it start with it, too.
    """
    weights = list(accumulate(map(len, texts)))
    chosen = random.Random(seed)
    while True:
        (text,) = chosen.choices(texts, cum_weights=weights)
        start = chosen.randrange(len(text) - length)
        piece = text[start : start + length]
        yield [bos, *piece[1:]] if bos is not None and text[0] == bos else list(piece)


def is_sampled(row: int, share: float) -> bool:
    """Whether a row is sampled rather than greedy; the `share` of sampled rows is spread evenly."""
    return int((row + 1) * share) > int(row * share)


def check_same(path: Path, args: GenerateArguments, tally: Tally) -> None:
    """Raises ValueError if `path` names other arguments; then writes these, and the data's counts, to it."""
    document = {name: value for name, value in asdict(args).items() if name not in OF_A_RUN}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        fixed = {name: before.get(name) for name in FIXED}
        check_unchanged(
            f"{path.parent} holds rows of", fixed, document, "Give another output_dir, or remove that folder"
        )
    with write_whole(path) as file:
        file.write(json.dumps(document | {"data": tally.described()}, indent=2).encode())


def find_rows(folder: Path, prompts: Sequence[list[int]]) -> dict[int, Place]:
    """Where these prompts' finished rows are, by number."""
    places: dict[int, Place] = {}
    for row, place in finished(folder):
        if row["index"] < len(prompts):
            check_row(row, prompts, place.path)
            places.setdefault(row["index"], place)
    return places


def check_row(row: Mapping[str, Any], prompts: Sequence[list[int]], where: Path) -> None:
    """Raises ValueError if a row does not start with its prompt."""
    if row["input_ids"][: row["prompt_length"]] != prompts[row["index"]]:
        raise ValueError(
            f"row {row['index']} in {where} follows another prompt than the data has: the data, or how it is read, "
            "has changed (some chat templates write today's date: set it by chat_template_options); give another "
            "output_dir, or remove that folder"
        )


@torch.no_grad()
def rows_of_target(
    args: GenerateArguments,
    target: Any,
    tokenizer: Any,
    assistant: Any,
    prompts: Sequence[list[int]],
    plan: Iterable[Sequence[int]],
) -> Iterator[tuple[int, list[int]]]:
    """Each row of the plan's batches with what the target writes after its prompt, an end-of-text token included.

    Batches are written whole, even if some of their rows are known: that keeps the others' text the same.
    """
    encoder = target.config.is_encoder_decoder
    pad = pad_of(tokenizer, target.config)
    ends = ends_of(target.generation_config)
    for rows in plan:
        texts, side = [prompts[row] for row in rows], "right" if encoder else "left"
        inputs = padded_prompts(texts, pad, target.device, side)
        sampled = is_sampled(rows[0], args.sampled)  # as all rows of a batch
        written = target.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            assistant=assistant,
            row_seeds=[(args.seed << 32) + row for row in rows],
            do_sample=sampled,
            pad_token_id=pad,
            use_cache=True,
            reuse=False,
            **({"temperature": args.temperature, "top_k": 0, "top_p": 1.0} if sampled else {}),
        )
        new = written[:, 1 if encoder else inputs["input_ids"].shape[1] :].tolist()  # (rows, new tokens)
        yield from ((row, up_to_end(text, ends)) for row, text in zip(rows, new, strict=True))


def rows_of_engine(
    args: GenerateArguments, config: Any, tokenizer: Any, prompts: Sequence[list[int]], wanted: Sequence[int]
) -> Iterator[tuple[int, list[int] | Refused]]:
    """The wanted rows with what a server writes after their prompts, in the order in which they finish."""
    if config.is_encoder_decoder:
        raise ValueError(f"engine={args.engine!r} cannot write for a {config.model_type!r} target; leave engine out")
    vocab = config.get_text_config(decoder=True).vocab_size
    try:
        ends = ends_of(GenerationConfig.from_pretrained(args.target, revision=args.target_revision or "main"))
    except OSError:  # it has no generation_config.json
        ends = ends_of(config.get_text_config(decoder=True))
    engine = Engine(str(args.engine), args.engine_model, args.target, tokenizer, vocab, set(ends), args.engine_timeout)
    print(engine.open(min(prompts, key=len)))

    def write(row: int) -> list[int] | Refused:
        temperature = args.temperature if is_sampled(row, args.sampled) else 0.0
        seed = (args.seed * 1_000_003 + row) % (1 << 31)
        try:
            return engine.write(prompts[row], args.max_new_tokens, temperature, seed)
        except Refused as error:
            return error

    return each(write, wanted, args.batch_size, engine.stopped)


def without_refused(
    answers: Iterable[tuple[int, list[int] | Refused]],
    args: GenerateArguments,
    prompts: Sequence[list[int]],
    wanted: Sequence[int],
    begun: bool,
) -> Iterator[tuple[int, list[int]]]:
    """The rows that a server has written. Those that it refuses are noted once it has written another one.

    Args:
        begun: whether other rows have been written before. Then all that are left may be refused.

    Raises:
        EngineError: it refuses all of the first `FIRST` rows.
    """
    first, held, works = set(wanted[:FIRST]), [], begun
    for row, answer in answers:
        if isinstance(answer, Refused):
            first.discard(row)
            if not first and not works:
                raise EngineError(
                    f"{answer} All of the first rows are refused. Start the server with a longer context (vLLM: "
                    "--max-model-len), lower max_new_tokens, or give other prompts"
                )
            held.append(noted(row, prompts[row], []) | {"refused": str(answer)})
        else:
            works = True
            yield row, answer
        if works and held:
            with Shard(Path(args.output_dir, "refused", f"{args.part.rank:05}.jsonl")) as shard:
                shard.append(held)
            held.clear()


def append(
    args: GenerateArguments, prompts: Sequence[list[int]], wanted: set[int], rows: Iterable[tuple[int, Iterable[int]]]
) -> None:
    """Appends the wanted rows to this process's file, as they are written."""
    part = args.part
    title = f"part {part.rank + 1} of {part.world_size}"
    path = Path(args.output_dir, "parts", f"{part.rank:05}.jsonl")
    with Shard(path) as shard, tqdm(total=len(wanted), unit=" rows", desc=title, disable=part.local_rank > 0) as bar:
        for row, text in rows:
            if row in wanted:
                shard.append([noted(row, prompts[row], text)])
                bar.update()


def noted(row: int, prompt: Sequence[int], text: Iterable[int]) -> dict[str, Any]:
    """A row as it is stored."""
    return {"index": row, "prompt_length": len(prompt), "input_ids": [*prompt, *text]}


def load(args: GenerateArguments, folder: Path, prompts: Sequence[list[int]], tokenizer: Any) -> Any:
    """The stored rows; also writes them as plain text if `args.text_file` is given."""
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
