"""Compare csdraft with plain generate and with transformers' own assisted decoding, side by side in one run.

python scripts/benchmark.py                                  # all methods on the shipped pair
python scripts/benchmark.py --suite short                    # with claims that pass or fail
python scripts/benchmark.py --target me/large --drafter me/small --prompts prompts.jsonl --dtype bfloat16
"""

import sys

from csdraft.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
