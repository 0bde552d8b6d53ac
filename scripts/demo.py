"""See csdraft at work: a drafter is distilled, then one model generates one text in nine ways. Also `make demo`.

python scripts/demo.py
python scripts/demo.py --target me/large --drafter me/small --prompts prompts.jsonl
"""

import sys

from csdraft.demo import main

if __name__ == "__main__":
    sys.exit(main())
