"""Keep a target's largest logits on disk, to train without its forward; the same command continues after a kill.

accelerate launch scripts/cache_logits.py dataset=out/smol/written max_length=512 k=64 output_dir=out/smol/logits
"""

from csdraft.data.target_cache import CacheArguments, cache_logits
from csdraft.trainers.command import run_script

if __name__ == "__main__":
    run_script(__doc__, CacheArguments, cache_logits)
