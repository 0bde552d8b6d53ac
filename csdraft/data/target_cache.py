"""A frozen target's largest logits on disk, computed once and read many times: training without the target's forward.

Of each position the k most probable tokens are kept, as log-probabilities in float16, ids in int32, and the logsumexp
of all logits in float32: with it the logits themselves are known again, and how much probability the others share.
Log-probabilities rather than logits, because float16 is finest near 0, where the tokens are that matter.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from csdraft.data.changes import check_unchanged
from csdraft.data.shards import Part, batches, write_whole
from csdraft.data.sources import read_rows
from csdraft.data.target import TargetArguments, target_name

__all__ = ["CacheArguments", "TargetCache", "TopK", "cache_logits", "checksum", "dense", "write_target_cache"]

LOG_PROBS, IDS, LOGSUMEXP, DONE = "log_probs.f16", "ids.i32", "logsumexp.f32", "done.u8"
DESCRIPTION = "target_cache.json"


class TopK(NamedTuple):
    """The most probable next tokens after each token of a row, most probable first; nan where nothing is scored.

    Attributes:
        log_probs: (length, k) float32, at temperature 1; rounded to float16.
        ids: (length, k) int64.
        logsumexp: (length,) float32, of all logits; `log_probs + logsumexp[:, None]` are the logits.
    """

    log_probs: Tensor
    ids: Tensor
    logsumexp: Tensor

    @property
    def rest(self) -> Tensor:
        """(length,) float32, probability of all tokens that are not listed."""
        return (1 - self.log_probs.exp().sum(-1)).clamp(min=0)

    def packed(self) -> Tensor:
        """(length, 2 k) float32, log-probabilities and then ids, for `dense`."""
        return torch.cat([self.log_probs, self.ids.float()], -1)


def dense(packed: Tensor, vocab: int) -> Tensor:
    """Logits over all tokens, with what the listed ones leave spread evenly over the others.

    Args:
        packed: (positions, 2 k) from `TopK.packed`.
        vocab: tokens, fewer than 2**24, up to which float32 holds every id.

    Returns:
        (positions, vocab) float32, normalised.
    """
    log_probs, ids = packed.float().chunk(2, -1)
    others = max(vocab - ids.shape[-1], 1)
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    filled = (rest.log() - np.log(others)).expand(-1, vocab)
    return filled.scatter(-1, ids.long(), log_probs).log_softmax(-1)


@dataclass(frozen=True)
class TargetCache:
    """Reads what `write_target_cache` wrote; `cache[row]` is a `TopK`.

    Args:
        folder: of the cache.

    Raises:
        ValueError: there is no cache, or a part of it is missing because its writer was stopped.
    """

    folder: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not Path(self.folder, DESCRIPTION).is_file():
            raise ValueError(f"{self.folder} holds no cached logits; write them with write_target_cache")
        if missing := int((self.done == 0).sum()):
            raise ValueError(f"{missing} of {len(self.done)} rows are missing in {self.folder}: run its writer again")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TopK:
        start, stop = self.ends[row : row + 2]
        first = self.lengths[row] - (stop - start) - 1
        k = self.description["k"]
        log_probs = torch.full((self.lengths[row], k), torch.nan)
        ids = torch.zeros(self.lengths[row], k, dtype=torch.long)
        logsumexp = torch.full((self.lengths[row],), torch.nan)
        for whole, stored in ((log_probs, LOG_PROBS), (ids, IDS), (logsumexp, LOGSUMEXP)):
            whole[first:-1] = torch.from_numpy(np.array(self.arrays[stored][start:stop]))
        return TopK(log_probs, ids, logsumexp)

    def __reduce__(self) -> tuple:
        """Workers of a data loader open the files themselves."""
        return TargetCache, (self.folder,)

    def check(self, rows: Any) -> None:
        """Raises ValueError if the cache is of other rows, or of other parts of them."""
        if self.description["texts"] != (found := checksum(rows)):
            raise ValueError(
                f"the logits in {self.folder} are of other texts (checksum {self.description['texts']}) than these "
                f"({found}); write them again, into another folder"
            )
        if other := (np.diff(self.ends) != (sizes := _sizes(rows))).nonzero()[0].tolist():
            row = other[0]
            raise ValueError(
                f"the logits in {self.folder} are of {self.ends[row + 1] - self.ends[row]} positions of row {row}, "
                f"which has {sizes[row]} after its prompt: prompts were cut otherwise; write them again, into another "
                "folder"
            )

    def check_target(self, name: str) -> None:
        """Raises ValueError if the logits are of another target than `csdraft.data.target.target_name` says."""
        if (found := self.description["target"]) != name:
            raise ValueError(
                f"the logits in {self.folder} are of the target {found}, not of {name}; write them with this target, "
                "into another folder"
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads(Path(self.folder, DESCRIPTION).read_text(encoding="utf-8"))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return np.load(Path(self.folder, "lengths.npy")).tolist()

    @cached_property
    def ends(self) -> list[int]:
        """Where each row's positions end in the arrays; one more than rows, the first is 0."""
        return [0, *np.load(Path(self.folder, "sizes.npy")).cumsum().tolist()]

    @cached_property
    def arrays(self) -> dict[str, np.memmap]:
        return _open(Path(self.folder), self.ends[-1], self.description["k"], "r")

    @cached_property
    def done(self) -> np.ndarray:
        return np.memmap(Path(self.folder, DONE), np.uint8, "r")


def write_target_cache(
    load_target: Callable[[], Any],
    rows: Any,
    folder: str | os.PathLike[str],
    name: str,
    k: int = 64,
    batch_size: int = 8,
    part: Part | None = None,
) -> None:
    """Writes the cache, or what is still missing of it. Every process writes its share into the same files.

    A row is marked as done after its numbers are written, so that a run killed anywhere continues with the next row.
    What it takes is printed, and compared with what is free, before the target is loaded.

    Args:
        load_target: gives a causal LM; called if a row is missing.
        rows: of `csdraft.data.sources.read_rows`.
        folder: for the files.
        name: of the target; a cache of another one is not gone on with.
        k: tokens kept of each position.
        batch_size: rows read at once; their logits, (batch_size, longest row, vocab), must fit into memory.
        part: which process of how many this is; None asks the environment.

    Raises:
        ValueError: the rest of the cache does not fit on the disk, `folder` holds another one, or k is not a number
            of tokens.
    """
    path, part = Path(folder), part or Part.of_environment()
    lengths, sizes = _lengths(rows), _sizes(rows)
    if k < 1 or not sizes.sum():
        raise ValueError(f"k={k} tokens of {sizes.sum()} scored positions are nothing to keep; give 1 or more of both")
    path.mkdir(parents=True, exist_ok=True)
    _check_disk(path, sizes, k, part)
    _prepare(path, {"target": name, "k": k, "rows": len(lengths), "texts": checksum(rows)}, lengths, sizes)
    ends, arrays = [0, *sizes.cumsum().tolist()], _open(path, int(sizes.sum()), k, "r+")
    done = np.memmap(path / DONE, np.uint8, "r+")
    missing = [batch for batch in part.of(batches(lengths.tolist(), batch_size)) if not done[batch].all()]
    if not missing:
        return
    target = load_target()
    for batch in _shown(missing, part):
        found = _largest(target, [rows[row]["input_ids"] for row in batch], sizes[batch], k)
        for row, values in zip(batch, found, strict=True):
            for file, value in values.items():
                arrays[file][ends[row] : ends[row + 1]] = value
        done[batch] = 1


@dataclass
class CacheArguments(TargetArguments):
    """Whose logits to keep, over which rows, and how many."""

    max_length: int = field(default=512, metadata={"help": "Tokens of a row at most; as when training."})
    k: int = field(default=64, metadata={"help": "Logits kept of each position."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "k")
        self.check_at_least(2, "max_length")


def cache_logits(args: CacheArguments) -> None:
    """`write_target_cache` for the rows of a data set, as `read_rows` reads them for training.

    Raises:
        ValueError: before the target is loaded, for data that cannot be read, a target that is no decoder-only model,
            rows longer than its context, and what `write_target_cache` refuses.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, (config, tokenizer) = args.folder(), args.read_target()
    if config.is_encoder_decoder:
        raise ValueError(f"{args.target} is an encoder-decoder; logits are cached for decoder-only targets")
    context = getattr(config, "max_position_embeddings", None)
    if context and args.max_length > context:
        raise ValueError(f"max_length={args.max_length} is longer than the target's context of {context} tokens")
    rows = read_rows(args.dataset, tokenizer, args.max_length, args.split, args.dataset_limit, args.chat)
    write_target_cache(args.load_target, rows, folder, target_name(args), args.k, args.batch_size, args.part)


def _shown(missing: Sequence[list[int]], part: Part) -> Iterator[list[int]]:
    with tqdm(total=sum(map(len, missing)), unit=" rows", desc="logits", disable=part.local_rank > 0) as bar:
        for batch in missing:
            yield batch
            bar.update(len(batch))


@torch.no_grad()
def _largest(target: Any, texts: Sequence[Sequence[int]], sizes: np.ndarray, k: int) -> list[dict[str, np.ndarray]]:
    """Of each text's last `sizes` predictions: what is stored, by file."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=target.device)
    logits = target(input_ids=ids, use_cache=False).logits  # filling follows the texts, which do not see it
    if k > logits.shape[-1]:
        raise ValueError(f"k={k} tokens cannot be kept of {logits.shape[-1]}; give fewer")
    found = []
    for row, (text, size) in enumerate(zip(texts, sizes.tolist(), strict=True)):
        scored = logits[row, len(text) - 1 - size : len(text) - 1].float()
        logsumexp = scored.logsumexp(-1)
        values, places = scored.topk(k, -1)
        stored = {LOG_PROBS: values - logsumexp[:, None], IDS: places, LOGSUMEXP: logsumexp}
        found.append({name: value.cpu().numpy() for name, value in stored.items()})
    return found


def _open(folder: Path, positions: int, k: int, mode: Any) -> dict[str, np.memmap]:
    shapes = {LOG_PROBS: (np.float16, (positions, k)), IDS: (np.int32, (positions, k))}
    shapes[LOGSUMEXP] = (np.float32, (positions,))
    return {name: np.memmap(folder / name, kind, mode, shape=shape) for name, (kind, shape) in shapes.items()}


def _prepare(folder: Path, description: dict[str, Any], lengths: np.ndarray, sizes: np.ndarray) -> None:
    """Files of full size, which take no place before they are written; the same from every process."""
    path = folder / DESCRIPTION
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    check_unchanged(f"{folder} holds the cache of", found, description, "Give another folder, or remove it")
    positions = int(sizes.sum())
    wanted = {LOG_PROBS: 2 * description["k"], IDS: 4 * description["k"], LOGSUMEXP: 4}
    for name, size in [*((name, positions * each) for name, each in wanted.items()), (DONE, len(sizes))]:
        with open(folder / name, "ab") as file:
            file.truncate(size)
    for name, array in (("lengths.npy", lengths), ("sizes.npy", sizes)):
        with write_whole(folder / name) as file:
            np.save(file, array)
    with write_whole(path) as file:
        file.write(json.dumps(description).encode())


def _check_disk(folder: Path, sizes: np.ndarray, k: int, part: Part) -> None:
    total = _bytes(sizes, k) + len(sizes)
    done = np.fromfile(folder / DONE, np.uint8) if (folder / DONE).is_file() else np.zeros(len(sizes), np.uint8)
    left = sizes[done == 0] if len(done) == len(sizes) else sizes
    needed, free = _bytes(left, k), shutil.disk_usage(folder).free
    if part.rank == 0:
        print(
            f"{len(sizes):,} rows, {int(sizes.sum()):,} positions x {k} logits: {_readable(total)} in {folder}, "
            f"{_readable(needed)} of it to be written; {_readable(free)} are free"
        )
    if needed > free:
        fitting = (free // max(int(left.sum()), 1) - 4) // 6
        raise ValueError(
            f"the logits take {_readable(needed)}, but {_readable(free)} are free in {folder}; give another folder, "
            f"fewer rows, or a k of at most {max(fitting, 0)} instead of {k}"
        )


def _bytes(sizes: np.ndarray, k: int) -> int:
    """Of each position k log-probabilities and ids, 6 bytes together, and 4 for the logsumexp."""
    return int(sizes.sum()) * (6 * k + 4)


def _readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _sizes(rows: Any) -> np.ndarray:
    """(rows,) predictions that count of each: all but those within the prompt, and of nothing after the last token."""
    lengths, prompts = (
        _lengths(rows),
        np.array([row.get("prompt_length", 0) for row in _columns(rows, "prompt_length")]),
    )
    return np.maximum(lengths - np.maximum(prompts, 1), 0)


def _lengths(rows: Any) -> np.ndarray:
    return np.array([len(row["input_ids"]) for row in _columns(rows, "input_ids")])


def checksum(rows: Any) -> str:
    """Of all tokens, row by row."""
    found = 0
    for row in _columns(rows, "input_ids"):
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        found = zlib.crc32(ids.tobytes() + b"\n", found)
    return f"{found:08x}"


def _columns(rows: Any, *names: str) -> Any:
    """Rows that need not decode more than these columns."""
    return rows if isinstance(rows, list) else rows.select_columns([n for n in names if n in rows.column_names])
