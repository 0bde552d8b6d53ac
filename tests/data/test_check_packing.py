"""Families whose code in transformers lets packed texts see each other are found out, trained or fresh."""

import pytest
from tiny import CAUSAL, fresh, tiny

from csdraft.data.packing import check_packing


@pytest.mark.parametrize("family", CAUSAL)
def test_families_that_mix_packed_texts_are_refused(family):
    for model in (tiny(family), fresh(family, initializer_range=0.01)):
        if family in ("opt", "falcon"):
            with pytest.raises(ValueError, match="does not keep texts apart"):
                check_packing(model)
        else:
            check_packing(model)
