"""The contract tests have a clock of their own: schedules that look at it decide alike on every machine."""

from __future__ import annotations

from itertools import count

import pytest

from csdraft.decoding import clock


@pytest.fixture(autouse=True)
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond passes between any two looks at the clock."""
    ticks = count()
    monkeypatch.setattr(clock, "now", lambda: next(ticks) / 1000)
