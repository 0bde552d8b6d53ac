"""See csdraft at work: one model, six ways to generate, one text. Also `make demo`.

python scripts/demo.py
python scripts/demo.py --target me/large --drafter me/small --prompts prompts.jsonl
"""

import sys

from csdraft.demo import main

if __name__ == "__main__":
    sys.exit(main())
