"""Writes requirements.lock: the exact version of every package that csdraft's environment needs, torch aside.

pip is asked what it would install into an empty environment today. torch is the Makefile's own variable, since its
builds differ by machine; so do the packages of a CUDA build, which come with it.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WITH_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torch", help="its version")
    parser.add_argument("path", type=Path, help="where to write, such as requirements.lock")
    torch, path = vars(parser.parse_args()).values()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        asked = [f"torch=={torch}", "-e", ".[dev,train]"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *asked], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    packages = {package["name"].lower().replace("_", "-"): package["version"] for package in found}
    lines = [f"{name}=={version}" for name, version in sorted(packages.items()) if not WITH_TORCH.match(name)]
    lines = [line for line in lines if not line.startswith("csdraft==")]
    python = ".".join(map(str, sys.version_info[:2]))
    head = f"# Made by `make lock` with Python {python} and torch {torch}; not by hand."
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} packages")


if __name__ == "__main__":
    main()
