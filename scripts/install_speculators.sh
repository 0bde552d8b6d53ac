#!/usr/bin/env bash
# Puts the package speculators into a folder of its own, with the transformers that it wants: what tests/heads/test_speculators.py
# compares csdraft with. All else, torch among it, is taken from the environment that runs the tests.
#   scripts/install_speculators.sh FOLDER    then    CSDRAFT_SPECULATORS=FOLDER make slow
set -euo pipefail
: "${1:?name the folder: scripts/install_speculators.sh FOLDER}"
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$1" \
    speculators==0.9.0 hs-connectors==0.9.0 transformers==5.19.0 \
    openai loguru pydantic pydantic-core pydantic-settings python-dotenv annotated-types typing-inspection \
    distro jiter sniffio
