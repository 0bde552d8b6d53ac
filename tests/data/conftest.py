"""What tests of data get besides: a cache of `datasets` of their own."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
