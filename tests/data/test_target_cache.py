"""The target's largest logits on disk: what the target says, whoever wrote them and however often he was stopped."""

from __future__ import annotations

import pickle
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from csdraft.data.packing import IGNORED, Texts, collate
from csdraft.data.shards import Part
from csdraft.data.target_cache import CacheArguments, TargetCache, cache_logits, dense
from csdraft.losses.forward_kl import forward_kl
from tests.data.words import make_target, sentence, write_lines
from tests.forked import Forked
from tests.tiny import VOCAB, tiny

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts/cache_logits.py"
K = 12
DESCRIPTION = {"target": "tiny", "k": K}


def make_rows(count: int = 20) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, VOCAB, (3 + 7 * i % 23,), generator=generator).tolist(),
            "prompt_length": i % 4 % (3 + 7 * i % 23),
        }
        for i in range(count)
    ]


ROWS = make_rows()


def load_target() -> torch.nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    folder = tmp_path_factory.mktemp("cache")
    TargetCache.write(load_target, ROWS, folder, DESCRIPTION, 4)
    return TargetCache(folder)


def kept(cache: TargetCache, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and ids, (length, K)."""
    bits, ids = cache.packed(row).chunk(2, -1)
    return bits.view(torch.float32), ids.long()


def scored(row: dict) -> slice:
    """Positions whose next token counts."""
    return slice(max(row["prompt_length"], 1) - 1, len(row["input_ids"]) - 1)


@torch.no_grad()
def logits_of(row: dict) -> torch.Tensor:
    return tiny("llama")(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]


def test_the_cache_says_what_the_target_says(cache):
    assert len(cache.lengths) == len(ROWS)
    for number, row in enumerate(ROWS):
        said, (log_probs, ids), at = logits_of(row).log_softmax(-1), kept(cache, number), scored(row)
        values = said[at].topk(K).values
        assert log_probs.shape == ids.shape == (len(row["input_ids"]), K)
        assert (log_probs[at] - values).abs().max() < 0.01  # float16 of log-probabilities down to -16
        assert (said[at].gather(-1, ids[at]) - values).abs().max() < 1e-4


def test_what_is_not_scored_is_not_kept(cache):
    for number, row in enumerate(ROWS):
        known = torch.zeros(len(row["input_ids"]), dtype=torch.bool)
        known[scored(row)] = True
        assert torch.equal(~kept(cache, number)[0].isnan().any(-1), known)


def test_all_tokens_kept_give_the_targets_loss(tmp_path):
    TargetCache.write(load_target, ROWS, tmp_path, {"target": "tiny", "k": VOCAB})
    whole = TargetCache(tmp_path)
    for number, row in enumerate(ROWS[:5]):
        at = scored(row)
        student = torch.randn(len(row["input_ids"]), VOCAB)[at]
        labels = torch.zeros(len(student), dtype=torch.long)
        exact = forward_kl(student, logits_of(row)[at], labels)
        assert torch.allclose(forward_kl(student, dense(whole.packed(number)[at], VOCAB), labels), exact, atol=0.01)


def test_dense_logits_are_normalised_and_spread_the_rest_evenly(cache):
    at = scored(ROWS[3])
    log_probs, ids = (values[at] for values in kept(cache, 3))
    probs = dense(cache.packed(3)[at], VOCAB).exp()
    assert torch.allclose(probs.sum(-1), torch.ones(len(probs)))
    assert torch.allclose(probs.gather(-1, ids), log_probs.exp(), atol=2e-3)
    others = probs.scatter(-1, ids, torch.nan)
    spread = others.nan_to_num(0).amax(-1) - others.nan_to_num(1).amin(-1)
    assert spread.abs().max() < 1e-6


@pytest.mark.parametrize("packing", [True, False])
def test_batches_carry_the_logits_of_their_tokens(cache, packing):
    data = Texts(ROWS, 32, packing=packing, cache=cache)
    batch = collate([data[i] for i in range(len(data))])
    assert batch["cached"].shape == (*batch["input_ids"].shape, 2 * K)
    counts = batch["labels"][:, 1:] != IGNORED
    kept = batch["cached"][:, :-1][counts]
    assert not kept.is_floating_point(), "DeepSpeed and FSDP would make it bfloat16, which holds no large id"
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        target = tiny("llama")(**inputs, use_cache=False).logits[:, :-1][counts]
    assert len(kept) == sum(len(row["input_ids"]) - max(row["prompt_length"], 1) for row in ROWS)
    log_probs, ids = kept.chunk(2, -1)
    log_probs = log_probs.view(torch.float32)
    assert not log_probs.isnan().any()
    assert (target.log_softmax(-1).gather(-1, ids.long()) - log_probs).abs().max() < 0.01


def test_processes_and_batches_write_the_same(cache, tmp_path):
    for rank in range(3):
        TargetCache.write(load_target, ROWS, tmp_path, DESCRIPTION, 3, Part(rank, 3))
    other = TargetCache(tmp_path)
    for number in range(len(ROWS)):
        for one, two in zip(kept(cache, number), kept(other, number), strict=True):
            assert torch.allclose(one, two, atol=0.01, equal_nan=True)


def test_the_forecast_is_what_the_files_take(tmp_path, capsys):
    printed = []
    TargetCache.write(lambda: printed.append(capsys.readouterr().out) or load_target(), ROWS, tmp_path, DESCRIPTION)
    files = [path for path in tmp_path.iterdir() if path.suffix not in (".npy", ".json")]
    taken = sum(path.stat().st_size for path in files)
    assert f"positions: {taken / 1000:.3g} KB in {tmp_path}" in printed[0]  # before the target is loaded


def test_readers_of_other_processes_open_the_files_themselves(cache):
    cache.packed(0)
    assert len(pickle.dumps(cache)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(cache)).packed(2), cache.packed(2))


def test_too_small_a_disk_is_noticed_before_the_target_is_loaded(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1, 0, 20000))
    with pytest.raises(ValueError, match=r"take 1\S+ KB, but 20 KB are free in .*, or a smaller k"):
        TargetCache.write(lambda: pytest.fail("was loaded"), ROWS, tmp_path, DESCRIPTION | {"k": 90})
    assert "logits of 20 rows, " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_another_cache_is_neither_read_nor_continued(cache, tmp_path):
    with pytest.raises(ValueError, match="of other texts"):
        Texts(ROWS[1:], 32, cache=cache)
    longer = [row | {"prompt_length": row["prompt_length"] + (number == 5)} for number, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match=r"are of \d+ positions of row 5, which has \d+ after its prompt"):
        Texts(longer, 32, cache=cache)
    cache.check_target("tiny")
    with pytest.raises(ValueError, match="of the target tiny, not of other"):
        cache.check_target("other")
    for rows, other in ((ROWS[1:], {}), (ROWS, {"target": "other"}), (ROWS, {"k": K + 1})):
        with pytest.raises(ValueError, match="holds the cache"):
            TargetCache.write(load_target, rows, cache.folder, DESCRIPTION | other)
    with pytest.raises(ValueError, match="holds no cached logits"):
        TargetCache(tmp_path)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    make_target(tmp_path / "target")
    write_lines(tmp_path / "texts.jsonl", [{"text": sentence(20 + i % 20, i)} for i in range(1000)])
    settings = {
        "target": str(tmp_path / "target"), "dataset": str(tmp_path / "texts.jsonl"), "max_length": 64, "k": 8,
        "batch_size": 2, "output_dir": str(tmp_path / "logits"), "threads": 1,
    }  # fmt: skip
    process = Forked([str(SCRIPT), *(f"{key}={value}" for key, value in settings.items())])
    done, deadline = tmp_path / "logits/done.u8", time.monotonic() + 120
    try:
        while not (done.exists() and sum(done.read_bytes()) > 20):
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline, "the script wrote no rows"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = np.fromfile(done, np.uint8)
    assert 20 < before.sum() < 1000
    with pytest.raises(ValueError, match=f"{1000 - before.sum()} of 1000 rows are missing"):
        TargetCache(tmp_path / "logits")

    read = []
    args = CacheArguments(**settings)
    target = args.load_target()
    target.register_forward_hook(
        lambda module, inputs, options, output: read.append(len(options["input_ids"])), with_kwargs=True
    )
    args.load_target = lambda: target
    cache_logits(args)
    assert sum(read) == 1000 - before.sum()
    cache = TargetCache(tmp_path / "logits")
    for row in range(1000):
        assert (cache.packed(row)[:-1, :8].contiguous().view(torch.float32) < 0).all()


def test_rows_without_a_response_have_nothing_to_keep(tmp_path):
    with pytest.raises(ValueError, match="no position whose logits could be kept"):
        TargetCache.write(pytest.fail, [{"input_ids": [3, 4], "prompt_length": 2}], tmp_path, DESCRIPTION)


def test_bad_input_is_found_before_the_target_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(CacheArguments, "load_target", None)
    make_target(tmp_path / "target")
    make_target(tmp_path / "t5", "t5")
    rows = write_lines(tmp_path / "texts.jsonl", [{"text": sentence(20)}])
    for changes, message in (
        ({"k": 0}, "k=0 must be a whole number of at least 1"),
        ({"max_length": 1}, "max_length=1 must be"),
        ({"max_length": 300}, "longer than the target's context of 256"),
        ({"target": str(tmp_path / "t5")}, "is an encoder-decoder"),
        ({"dataset": "no/such-data"}, "cannot be read"),
    ):
        settings = {"target": str(tmp_path / "target"), "dataset": rows, "output_dir": str(tmp_path / "out")}
        with pytest.raises(ValueError, match=message):
            cache_logits(CacheArguments(**settings | {"max_length": 64} | changes))
