"""Turn a transformers model (GPT-NeoX and Pythia, Llama, Mistral, sepllm_gpt_neox) into a checkpoint to train on from, and prove it: every
weight comes back bit for bit, and both models give the same logits, padding included.

usage: python tools/ckpts/convert_hf_to_neox.py --input_dir hf/pythia-160m --output_dir checkpoints/pythia-160m

<output_dir>/global_stepN/           what `load: <output_dir>` with `finetune: true` begins from; no optimizer state
    configs/model.yml                shape, initialisation, optimizer: combines with configs/method and configs/run as a size does
    configs/attention.yml            positions and pattern as the folder has them: a method
    configs/run.yml                  tokenizer, load: the least that a run needs
    hf/                              the folder's configuration and tokenizer, for the way back
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import JsonValue
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from megatron.config.schema import Config
from megatron.config.vocabulary import padded_vocab_size
from megatron.model.gpt import build_model
from megatron.training.checkpoint import write_atomically
from megatron.training.manifest import SAVING
from megatron.training.vocabulary import with_rows, without_rows
from megatron.training.weights import load_into, read_weights
from tools.ckpts.hf_folder import copy_small_files, dtype_of, read_config, read_state
from tools.ckpts.mapping import hf_to_neox, neox_to_hf
from tools.ckpts.neox_files import ParallelSizes, write_weights
from tools.ckpts.neox_keys import NeoxKeys, neox_keys
from tools.ckpts.saved_config import HF_FOLDER, run_config
from tools.ckpts.verification import EMBEDDINGS, Differences, compare
from tools.command import until_stopped

PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    step: Path
    """The folder of the checkpoint."""
    num_parameters: int
    """Of the folder's model, without rows that were added."""
    added_rows: int
    """Of the vocabulary, to make it divisible."""
    differences: Differences | None
    """Between the logits of both models; None if they were not compared."""

    @property
    def config_files(self) -> list[Path]:
        """The three files, in the order of a command line."""
        return [self.step / "configs" / f"{name}.yml" for name in ("model", "attention", "run")]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        imported = convert(
            options.input_dir,
            options.output_dir,
            sizes=ParallelSizes(tensor=options.tp, pipeline=options.pp),
            iteration=options.iteration,
            seq_length=options.seq_length,
            divisible_by=options.make_vocab_size_divisible_by,
            verify=not options.no_verify,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    added = f", and {imported.added_rows} rows were added to its vocabulary" if imported.added_rows else ""
    print(f"{imported.num_parameters:,} parameters are in {imported.step}{added}.")
    print(f"Train on from them: python deepy.py train.py {' '.join(map(str, imported.config_files))}")
    if imported.differences is None:
        return 0
    found = imported.differences
    print(f"Every weight comes back bit for bit. Largest difference between logits (fp32): {found.text:.2e}, with padding {found.padding:.2e}.")
    if found.is_rounding:
        return 0
    print("That is more than rounding: the checkpoint does not hold the folder's model.", file=sys.stderr)
    return 1


def convert(
    input_dir: Path,
    output_dir: Path,
    *,
    sizes: ParallelSizes = ParallelSizes(),
    iteration: int = 0,
    seq_length: int | None = None,
    divisible_by: int = 1,
    verify: bool = True,
) -> Imported:
    """Write the checkpoint. Each tensor keeps its dtype.

    ``seq_length``: of the run's samples, by default what the model allows, at most 2048. ``divisible_by``: of the vocabulary's rows on
    each tensor-parallel rank.
    """
    folder = read_config(input_dir)
    keys = neox_keys(folder)
    state = read_state(input_dir)
    step = output_dir / f"global_step{iteration}"
    if step.exists():
        raise ValueError(f"{step} is there already: choose another --output_dir or --iteration.")
    rows = padded_vocab_size(folder.vocab_size, divisible_by, sizes.tensor)
    model = keys.model | {"seq_length": seq_length or min(folder.max_position_embeddings, 2048), "padded_vocab_size": rows}
    model |= {"make_vocab_size_divisible_by": divisible_by, "precision": PRECISIONS[dtype_of(state)]}
    step.mkdir(parents=True)
    try:
        (step / SAVING).touch()
        copy_small_files(input_dir, step / HF_FOLDER)
        _write_configs(step, keys, model, _run_keys(keys, step, output_dir, sizes))
        config = run_config(step)
        weights = _weights(state, config, keys.architecture, vocab_size=folder.vocab_size, source=input_dir)
        num_parameters = sum(value.numel() for value in without_rows(weights, folder.vocab_size).values())
        write_weights(step, weights, config, sizes, iteration=iteration)
        del weights
        differences = _verified(step, config, state, keys.architecture, input_dir, vocab_size=folder.vocab_size) if verify else None
    except BaseException:
        shutil.rmtree(step)  # nothing of use is in it, and it would stand in the way of the next try
        raise
    (step / SAVING).unlink()
    write_atomically(output_dir / "latest", step.name)
    return Imported(step=step, num_parameters=num_parameters, added_rows=rows - folder.vocab_size, differences=differences)


def _weights(state: Mapping[str, Tensor], config: Config, architecture: str, *, vocab_size: int, source: Path) -> dict[str, Tensor]:
    """The training model's weights, checked against its shapes."""
    model = build_model(config, device="meta")
    keys = dict(model.named_parameters())
    weights = hf_to_neox(state, config.model, keys, architecture=architecture)
    if (found := weights[EMBEDDINGS].shape[0]) != vocab_size:
        raise ValueError(f"vocab_size is {vocab_size} in {source / 'config.json'}, but the embedding has {found} rows: correct vocab_size.")
    weights = with_rows(weights, keys[EMBEDDINGS].shape[0])
    load_into(model, weights, source=source, device=torch.device("cpu"))
    return weights


def _verified(step: Path, config: Config, state: Mapping[str, Tensor], architecture: str, folder: Path, *, vocab_size: int) -> Differences:
    """Reads the files back: the same bits under the folder's names, and the same logits."""
    written = read_weights(step, model=config.model).state
    back = neox_to_hf(without_rows(written, vocab_size), config.model, architecture=architecture)
    for name, value in back.items():
        original = state.get(name, state.get(name.replace("lm_head.", "embed_out."), state.get(name.replace("embed_out.", "lm_head."))))
        assert original is not None, name
        if not _same_bits(original, value):
            raise ValueError(f"{name} does not come back from {step} as it is in {folder}: report this.")
    return compare(written, config, folder, rows=vocab_size)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _run_keys(keys: NeoxKeys, step: Path, output_dir: Path, sizes: ParallelSizes) -> dict[str, JsonValue]:
    run: dict[str, JsonValue] = dict(keys.dropout)
    if (step / HF_FOLDER / "tokenizer.json").is_file():
        run |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(step / HF_FOLDER / "tokenizer.json")}
    run |= {"model_parallel_size": sizes.tensor, "pipe_parallel_size": sizes.pipeline}
    return run | {"train_iters": 1, "load": str(output_dir), "finetune": True}


def _write_configs(step: Path, keys: NeoxKeys, model: Mapping[str, JsonValue], run: Mapping[str, JsonValue]) -> None:
    folder = step / "configs"
    folder.mkdir()
    optimizer: dict[str, JsonValue] = {
        "optimizer": {"type": "Adam", "params": {"lr": 1.0e-4, "betas": [0.9, 0.95], "eps": 1.0e-8}},
        "min_lr": 1.0e-5,
        "train_micro_batch_size_per_gpu": 4,
    }
    shape_text = (
        f"# The shape of a {keys.architecture} model of transformers.\n{_yaml(model)}\n# Yours to choose: no folder says how it was trained.\n"
    )
    (folder / "model.yml").write_text(shape_text + _yaml(optimizer), encoding="utf-8")
    (folder / "attention.yml").write_text(
        f"# Positions, and which keys a query reads, as the folder has them.\n{_yaml(keys.attention)}", encoding="utf-8"
    )
    (folder / "run.yml").write_text(
        f"# The least that a run needs: put your own in its place, with load and finetune.\n{_yaml(run)}", encoding="utf-8"
    )


def _yaml(keys: Mapping[str, JsonValue]) -> str:
    """One line a key."""
    flows = {key: yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1] for key, value in keys.items()}
    return "".join(f"{key}: {text}\n" for key, text in flows.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of the transformers model: config.json and its weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that the files are cut for")
    parser.add_argument("--pp", type=int, default=0, help="pipeline stages; 0: one file a rank, 1 and above: a file a layer")
    parser.add_argument("--iteration", type=int, default=0, help="the checkpoint's number: global_stepN")
    parser.add_argument("--seq_length", type=int, help="tokens of a training sample (default: what the model allows, at most 2048)")
    parser.add_argument("--make_vocab_size_divisible_by", type=int, default=1, help="add rows to the vocabulary up to a multiple, on each rank")
    parser.add_argument("--no_verify", action="store_true", help="do not read back and compare (it takes three times the memory of fp32 weights)")
    return parser


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))
