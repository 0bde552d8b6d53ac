"""Keep a target's hidden states on disk, to train heads without its forward; the same command continues after a kill.

accelerate launch scripts/cache_features.py dataset=out/smol/written max_length=512 output_dir=out/features
"""

from csdraft.data.target_cache import FeatureArguments, cache_features
from csdraft.trainers.command import run_script

if __name__ == "__main__":
    run_script(__doc__, FeatureArguments, cache_features)
