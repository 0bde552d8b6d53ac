"""All randomness of csdraft comes from the `Sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Sampler"]

MASK64 = (1 << 64) - 1


def mix64(x: int) -> int:
    """SplitMix64's finaliser: a well-mixed 64-bit integer from any integer."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _log_exponential(v: Tensor) -> Tensor:
    """log(-log1p(-v)), in place."""
    return v.neg_().log1p_().neg_().log_()


class Sampler:
    """Draws tokens for all rows of one call.

    Coupled draws use one noise vector for each row and position, which all levels of a cascade share. So a drafter
    often draws the token that the reviewer will draw (Daliri, Musco, Suresh, arXiv 2408.07978). Independent draws use
    new randomness each time. Rules with `draft_probs` need that: with the coupled noise they would be biased.

    Args:
        greedy: whether to choose the argmax, without randomness.
        row_seeds: one integer for each row. Equal seeds give equal noise for every vocabulary width and every device;
            between devices the last bits of a logarithm may differ.
        vocab: the target's number of logits.
        draws: whether levels share their noise.
    """

    def __init__(
        self, greedy: bool, row_seeds: Sequence[int], vocab: int, draws: Literal["coupled", "independent"] = "coupled"
    ):
        self.greedy, self.vocab, self.draws = greedy, vocab, draws
        self.row_seeds = [mix64(int(seed)) for seed in row_seeds]
        self._drawn = [0] * len(self.row_seeds)
        self._noise: dict[tuple[int, int], Tensor] = {}
        self._tokens: dict[torch.device, Tensor] = {}

    @property
    def coupled(self) -> bool:
        return self.draws == "coupled"

    def log_exponential(self, row: int, position: int, device: torch.device) -> Tensor:
        """(vocab,) log E for the token at `position`, E exponential: argmax(log probs - log E) is a draw from probs.

        E = -log1p(-v), v = (hash32(row seed, position, token) + 1/2) / 2^32, finite for every hash.
        """
        known = self._noise.get((row, position))
        return self.noise([(row, position)], device)[0] if known is None or known.device != device else known

    def noise(self, places: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(places, vocab) `log_exponential` for (row, position) places; new ones are computed together."""
        if missing := [place for place in dict.fromkeys(places) if place not in self._noise]:
            self._noise |= zip(missing, _log_exponential(self.hashed(missing, device)), strict=True)
        found = [self._noise[place] for place in places]
        found = [noise if noise.device == device else noise.to(device) for noise in found]
        return torch.stack(found) if len(found) > 1 else found[0][None]

    def fresh_log_exponential(self, row: int, device: torch.device) -> Tensor:
        """(vocab,) log E as above, but new each time, like `uniform`."""
        return _log_exponential(self._hashed([self._new_key(row)], device))[0]

    def hashed(self, places: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(places, vocab) the v of `log_exponential`: the same bits on every device, unlike logarithms."""
        return self._hashed([mix64(self.row_seeds[row] ^ mix64(position)) for row, position in places], device)

    def _hashed(self, keys: Sequence[int], device: torch.device) -> Tensor:
        if device not in self._tokens:
            ids = torch.arange(self.vocab, dtype=torch.int32, device=device)
            self._tokens[device] = ids.mul_(signed32(0x9E3779B1))
        halves = [[signed32(key), signed32(key >> 32)] for key in keys]
        low, high = halves[0]  # one key: plain numbers, without a copy to the device
        if len(keys) > 1:
            table = torch.tensor(halves, dtype=torch.int32, device="cpu").to(device, non_blocking=True)  # (keys, 2)
            low, high = table.T[..., None]  # (keys, 1)
        x = self._tokens[device][None] + low  # (keys, vocab)
        x ^= shifted(x, 16)
        x *= signed32(0x7FEB352D)
        x += high
        x ^= shifted(x, 15)
        x *= signed32(0x846CA68B)
        x ^= shifted(x, 16)
        v = x.to(torch.int64).bitwise_and_(0xFFFFFFFF).to(torch.float32)
        return v.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)

    def forget(self, row: int, before: int) -> None:
        """Frees the noise of a row's committed positions."""
        for key in [key for key in self._noise if key[0] == row and key[1] < before]:
            del self._noise[key]

    def uniform(self, row: int) -> float:
        """A new uniform number in [0, 1). It depends on the row's seed and on how many numbers it drew before."""
        return (self._new_key(row) >> 11) * 2.0**-53

    def _new_key(self, row: int) -> int:
        self._drawn[row] += 1
        return mix64(self.row_seeds[row] + 0xD1B54A32D192ED03 * self._drawn[row])

    def accepts(self, row: int, probability: float) -> bool:
        """True with this probability (above 1: always), by a new uniform number."""
        return self.uniform(row) < probability

    def level_uniform(self, row: int, position: int, level: int) -> float:
        """The uniform number that a lenient reviewer uses at a position; 1 when greedy."""
        if self.greedy:
            return 1.0
        return (mix64(self.row_seeds[row] ^ mix64(position) ^ mix64(~level & MASK64)) >> 11) * 2.0**-53

    def draw(self, row: int, probs: Tensor) -> int:
        """A new draw from (vocab,) probabilities, by inversion in double precision."""
        cumulative = probs.double().cumsum(0)  # (vocab,)
        total = float(cumulative[-1])
        if not total > 0:
            raise ValueError(f"cannot draw from probabilities that sum to {total}; are the logits nan?")
        index = int(torch.searchsorted(cumulative, self.uniform(row) * total, right=True))
        return min(index, int(probs.nonzero()[-1]))
