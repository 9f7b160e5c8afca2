"""Cut the weights of a checkpoint for other tensor- and pipeline-parallel sizes, and prove that they come back bit for bit.

usage: python tools/ckpts/reshape_checkpoint.py --input_dir checkpoints/mine --output_dir checkpoints/tp2 --tp 2 --pp 2

For programs that load only what was cut for them, GPT-NeoX among them. Training here needs no such step: it loads a checkpoint of any
layout into any other, optimizer included. The new folder has no optimizer state, so it is loaded with `finetune: true` or `no_load_optim: true`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from megatron.config.vocabulary import padded_vocab_size
from megatron.training.checkpoint import write_atomically
from megatron.training.manifest import SAVING
from megatron.training.vocabulary import repadded
from megatron.training.weights import OVERRIDES, engine_state, read_weights, saved_overrides, step_directory
from tools.ckpts.neox_files import ParallelSizes, write_weights
from tools.ckpts.saved_config import HF_FOLDER, run_config
from tools.ckpts.verification import EMBEDDINGS
from tools.command import until_stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshaped:
    step: Path
    """The new ``global_stepN``."""
    num_parameters: int
    rows: int
    """Of the vocabulary as it is padded now."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    sizes = ParallelSizes(tensor=options.tp, pipeline=options.pp)
    try:
        reshaped = reshape(options.input_dir, options.output_dir, sizes, config_files=options.config_file, trust=options.trust_input)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{reshaped.num_parameters:,} parameters are in {reshaped.step}, {reshaped.rows} rows of the vocabulary; every one comes back bit for bit.")
    return 0


def reshape(input_dir: Path, output_dir: Path, sizes: ParallelSizes, *, config_files: Sequence[Path] | None = None, trust: bool = False) -> Reshaped:
    """Write ``<output_dir>/global_stepN``. ValueError where ``sizes`` do not divide the model, or something stands in the way."""
    source = step_directory(input_dir)
    step = output_dir / source.name
    if step.exists():
        raise ValueError(f"{step} is there already: choose another --output_dir.")
    config = run_config(input_dir, config_files=config_files)
    state = read_weights(input_dir, model=config.model, trust=trust).state
    size = config.model.vocab_size
    rows = state[EMBEDDINGS].shape[0] if size is None else padded_vocab_size(size, config.model.make_vocab_size_divisible_by, sizes.tensor)
    if size is not None:
        state = repadded(state, vocab_size=size, rows=rows)
    model = config.model.model_copy(update={"padded_vocab_size": rows})
    step.mkdir(parents=True)
    try:
        (step / SAVING).touch()
        iteration = engine_state(source, trust=trust).get("iteration", 0)
        assert isinstance(iteration, int)
        write_weights(step, state, config.model_copy(update={"model": model}), sizes, iteration=iteration)
        back = read_weights(step, model=model).state
        if back.keys() != state.keys() or not all(torch.equal(back[name], value) for name, value in state.items()):
            raise ValueError(f"The weights do not come back from {step} as they are in {source}: report this.")
        _copy_configs(source, step, sizes)
    except BaseException:
        shutil.rmtree(step)  # nothing of use is in it, and it would stand in the way of the next try
        raise
    (step / SAVING).unlink()
    write_atomically(output_dir / "latest", step.name)
    return Reshaped(step=step, num_parameters=sum(value.numel() for value in state.values()), rows=rows)


def _copy_configs(source: Path, step: Path, sizes: ParallelSizes) -> None:
    """The run's files, and beside them the sizes that the folder is for."""
    for name in ("configs", HF_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, step / name)
    (step / "configs").mkdir(exist_ok=True)
    overrides = saved_overrides(source) | {"model_parallel_size": sizes.tensor, "pipe_parallel_size": sizes.pipeline}
    (step / "configs" / OVERRIDES).write_text(json.dumps(overrides, indent=1), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input_dir", type=Path, required=True, help="a checkpoint of any layout: global_stepN, or the folder above it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=0, help="pipeline stages; 0: one file a rank, 1 and above: a file a layer")
    parser.add_argument("--config_file", type=Path, nargs="+", help="the run's YAML files, where the checkpoint keeps none")
    parser.add_argument("--trust_input", action="store_true", help="let pickles of the checkpoint run code")
    return parser


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))
