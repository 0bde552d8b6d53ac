"""Families whose code in transformers lets packed texts see each other are found out, trained or fresh."""

import pytest
import torch

from csdraft.data.packing import check_packing
from tests.tiny import CAUSAL, fresh, tiny


def mixes(model: torch.nn.Module) -> bool:
    """Whether a text's logits change when another text stands before it in its row; this differs by version."""
    texts, positions = torch.tensor([[4, 5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        packed = model(input_ids=texts, position_ids=positions, use_cache=False).logits[:, 3:]
        alone = model(input_ids=texts[:, 3:], position_ids=positions[:, 3:], use_cache=False).logits
    return not torch.allclose(packed, alone, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_families_that_mix_packed_texts_are_refused(family):
    for model in (tiny(family), fresh(family, initializer_range=0.01)):
        if mixes(model):
            with pytest.raises(ValueError, match="does not keep texts apart"):
                check_packing(model)
        else:
            check_packing(model)


def test_a_family_that_mixes_is_among_them():
    assert mixes(tiny("opt"))
