"""A parallel head as a student (arXiv 2410.05589): every placeholder of every entry is compared with the target.

One step trains all placeholders, one for each drafted token. P-EAGLE (arXiv 2602.01469) leaves some out to save
memory; csdraft does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from csdraft.heads.kinds.parallel import Parallel, ParallelOptions
from csdraft.trainers.students import eagle3

__all__ = ["ParallelStudent"]


@dataclass(frozen=True)
class Options(eagle3.Options):
    """Keys of `init.parallel`; `steps` is the number of tokens that it drafts.

    Args:
        blocks: decoder layers.
        mask_token: the token whose embedding placeholders have; None: the target's padding token, else 0.
    """

    blocks: int = 1
    mask_token: int | None = None


class ParallelStudent(eagle3.Eagle3Student):
    """See `HeadKind`."""

    trains, options, head_options = Parallel, Options, ParallelOptions

    def check(self, config: Any, options: Any) -> None:
        super().check(config, options)
        asked, vocab = self._asked(options), config.get_text_config(decoder=True).vocab_size
        if asked.blocks < 1 or not 0 <= (asked.mask_token or 0) < vocab:
            raise ValueError(
                f"init.{self.name}: blocks={asked.blocks}, mask_token={asked.mask_token}; give at least 1 block, and "
                f"one of the target's {vocab} tokens"
            )

    def own_options(self, text: Any, asked: Any, draft_vocab: int) -> Any:
        if asked.mask_token is None:
            asked = replace(asked, mask_token=getattr(text, "pad_token_id", None) or 0)
        return super().own_options(text, asked, draft_vocab)
