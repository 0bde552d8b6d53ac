"""Hidden states on disk are those of the target's own forward, for every causal family, prompts included."""

from __future__ import annotations

import pytest
import torch

from csdraft.data.packing import Texts, collate
from csdraft.data.target_cache import LAST, FeatureArguments, FeatureCache, cache_features
from tests.tiny import CAUSAL, tiny

ROWS = [{"input_ids": [3 + (i * k) % 60 for i in range(5 + k)], "prompt_length": k} for k in range(1, 6)]


def described(target: torch.nn.Module, *layers: int) -> dict:
    return {"target": "tiny", "taps": [*layers, LAST], "width": target.config.get_text_config().hidden_size}


@pytest.mark.parametrize("family", CAUSAL)
def test_they_are_what_the_target_computes(tmp_path, family):
    target = tiny(family)
    FeatureCache.write(lambda: target, ROWS, tmp_path, described(target, 1), 2)
    cache = FeatureCache(tmp_path)
    assert cache.taps == (1, LAST)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            states = target(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        found = cache.packed(number).float().chunk(2, -1)
        for kept, tap in zip(found, cache.taps, strict=True):
            assert kept.shape == states[tap][0].shape
            assert torch.allclose(kept, states[tap][0], rtol=0.01, atol=0.01 * float(states[tap].abs().max()))


def test_batches_carry_them_beside_their_tokens(tmp_path):
    target = tiny("llama")
    FeatureCache.write(lambda: target, ROWS, tmp_path, described(target, 0))
    cache = FeatureCache(tmp_path)
    texts = Texts(ROWS, 24, cache=cache)
    batch = collate([texts[i] for i in range(len(texts))])
    embedded = batch["cached"].float().chunk(2, -1)[0]
    wanted = target.get_input_embeddings()(batch["input_ids"])
    real = embedded.abs().sum(-1) > 0
    assert int(real.sum()) == sum(len(row["input_ids"]) for row in ROWS)
    assert torch.allclose(embedded[real], wanted[real].detach(), rtol=0.01, atol=1e-3)


def test_another_cache_is_not_continued_and_a_layer_that_is_not_there_is_refused(tmp_path):
    target = tiny("llama")
    FeatureCache.write(lambda: target, ROWS, tmp_path, described(target, 1))
    with pytest.raises(ValueError, match="holds the cache"):
        FeatureCache.write(lambda: target, ROWS, tmp_path, described(target, 0, 1))
    with pytest.raises(ValueError, match=r"the features in .* of other texts"):
        Texts(ROWS[1:], 24, cache=FeatureCache(tmp_path))
    asked = {"target": "models/smol-target", "dataset": "no/such-data", "output_dir": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="max_length=1 must be"):
        FeatureArguments(**asked, max_length=1)
    with pytest.raises(ValueError, match="cannot be read"):
        cache_features(FeatureArguments(**asked))
