"""Turn a training checkpoint into a folder that transformers loads, and prove it: both models must give the same logits.

usage: python tools/ckpts/convert_neox_to_hf.py --input_dir checkpoints/global_step1000 --output_dir hf/model
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from megatron.config.keys import canonical
from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import END_OF_TEXT
from megatron.launch.inputs import training_prefix
from megatron.model.gpt import build_model
from megatron.training.weights import read_weights, saved_config_files, saved_overrides
from sepllm.hf.bundle import write_bundle
from sepllm.layout import TokenLayout
from tools.ckpts.hf_config import ARCHITECTURES, SpecialTokens, hf_config
from tools.ckpts.hf_tokenizer import hf_tokenizer
from tools.ckpts.mapping import neox_to_hf

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4
"""Largest difference of two fp32 logits that rounding explains."""
EMBEDDINGS = "sequential.0.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    directory: Path
    num_parameters: int
    notes: tuple[str, ...]
    """What somebody who uses the folder should know."""
    largest_difference: float | None
    """Between the logits of the training model and of the folder's; None if they were not compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        converted = convert(
            run_config(options.input_dir, config_files=options.config_file),
            input_dir=options.input_dir,
            output_dir=options.output_dir,
            precision=options.precision,
            architecture=options.architecture,
            save_tokenizer=not options.no_save_tokenizer,
            vocab_is_hf_tokenizer=options.vocab_is_hf_tokenizer,
            pad_token_id=options.pad_token_id,
            verify=not options.no_verify,
            trust=options.trust_input,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for note in converted.notes:
        print(note)
    print(f"{converted.num_parameters:,} parameters are in {converted.directory}.")
    if converted.largest_difference is None:
        return 0
    print(f"Largest difference between the logits of the training model and of that folder: {converted.largest_difference:.2e} (fp32).")
    if converted.largest_difference <= TOLERANCE:
        return 0
    print(f"That is more than {TOLERANCE:g}: the folder does not hold the model that was trained.", file=sys.stderr)
    return 1


def convert(
    config: Config,
    *,
    input_dir: Path,
    output_dir: Path,
    precision: str = "auto",
    architecture: str = "sepllm_gpt_neox",
    save_tokenizer: bool = True,
    vocab_is_hf_tokenizer: bool = False,
    pad_token_id: int | None = None,
    verify: bool = True,
    trust: bool = False,
) -> Converted:
    """Write the folder. ``config`` is that of the run; ``precision`` "auto" is the run's own."""
    state = read_weights(input_dir, model=config.model, trust=trust).state
    if EMBEDDINGS not in state:
        raise ValueError(f"{input_dir} has no {EMBEDDINGS}: the checkpoint lacks its first layer.")
    dtype = DTYPES[config.precision.precision if precision == "auto" else precision]
    state = {name: value.to(dtype) for name, value in state.items()}

    tokenizer = hf_tokenizer(config.tokenizer, vocab_is_hf_tokenizer=vocab_is_hf_tokenizer) if save_tokenizer else None
    described = hf_config(config, architecture=architecture, vocab_rows=state[EMBEDDINGS].shape[0], tokens=special_tokens(tokenizer, pad_token_id))
    save_model(neox_to_hf(state, config.model, architecture=architecture), described, output_dir, dtype=dtype)
    if tokenizer is not None:
        if pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
        tokenizer.save_pretrained(output_dir)
    if architecture == "sepllm_gpt_neox":
        write_bundle(output_dir)
    return Converted(
        directory=output_dir,
        num_parameters=sum(value.numel() for value in state.values()),
        notes=notes(config, described),
        largest_difference=largest_difference(state, config, output_dir) if verify else None,
    )


def notes(config: Config, described: PreTrainedConfig) -> tuple[str, ...]:
    """What the folder says differently from the run, or leaves out."""
    told = [f"hidden_act is {described.hidden_act}: what the run's activation (bias_gelu_fusion included) computes."]
    if config.model.rotary_angles == "fp16":
        told.append("rotary_angles: fp16 has no counterpart in transformers: the folder computes angles in fp32, and is compared so.")
    if config.attention.reset_at_document_end:
        told.append("reset_attention_mask has no counterpart in transformers: give the folder one document a row.")
    return tuple(told)


def run_config(directory: Path, *, config_files: Sequence[Path] | None = None) -> Config:
    """The run's configuration, as if for one device: a model is the same however many trained it.

    By default that saved with the checkpoint, command line included; ``config_files`` take its place.
    """
    overrides = {} if config_files else {canonical(key): value for key, value in saved_overrides(directory).items()}
    config_files = config_files or saved_config_files(directory)
    if not config_files:
        raise ValueError(f"{directory} has no configs/ folder: name the run's YAML files with --config_file.")
    one_device = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "model_parallel_size": 1,
        "pipe_parallel_size": 0,
    }
    return load_config(config_files, overrides=overrides | one_device, world_size=1)


def special_tokens(tokenizer: PreTrainedTokenizerBase | None, pad_token_id: int | None) -> SpecialTokens:
    """The tokenizer's; without one, 0 begins and ends a text, as in GPT-NeoX's tokenizer."""
    end = 0 if tokenizer is None else tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    bos, eos = (end, end) if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return SpecialTokens(bos=bos, eos=eos, pad=pad_token_id)


def save_model(state: dict[str, Tensor], config: PreTrainedConfig, output_dir: Path, *, dtype: torch.dtype) -> None:
    """Save these weights, no more and no fewer than the model has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied: dict[str, str] = model.all_tied_weights_keys  # output matrix: the embedding that serves for it
    model.load_state_dict(state | {name: state[source] for name, source in tied.items()}, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(output_dir, save_original_format=False)


@torch.no_grad()
def largest_difference(state: dict[str, Tensor], config: Config, directory: Path) -> float:
    """Largest absolute difference between the fp32 logits of the training model with these weights and of the saved folder."""
    rows = state[EMBEDDINGS].shape[0]
    model = config.model.model_copy(update={"padded_vocab_size": rows, "rotary_angles": "fp32"})
    config = config.model_copy(update={"model": model})
    ids = _batch(config, rows)
    trained = build_model(config, device="meta", dtype=torch.float32)
    trained.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
    expected = trained.eval()(ids, TokenLayout.from_ids(ids, config.attention.prefill))
    del trained
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return float((loaded(ids, use_cache=False).logits - expected).abs().max())


def _batch(config: Config, rows: int) -> Tensor:
    """Two rows of the run's training text where that is here, else of seeded ids; longer than most windows. ``[2, T]``"""
    length = min(config.model.seq_length, 512)
    prefix = training_prefix(config)
    if prefix is not None:
        documents = IndexedDataset(prefix)
        stream = itertools.chain.from_iterable(documents[place].tolist() for place in range(len(documents)))
        text = torch.tensor(list(itertools.islice(stream, 2 * length)))
        if len(text) == 2 * length and int(text.max()) < rows:
            return text.view(2, length)
    return _seeded_ids(config, rows, length)


def _seeded_ids(config: Config, rows: int, length: int) -> Tensor:
    """Every tenth or so is a separator. ``[2, length]``"""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (2, length), generator=generator)
    separators = torch.tensor(sorted(config.attention.prefill.separator_ids) or [0])
    chosen = separators[torch.randint(len(separators), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.1, chosen, ids)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input_dir", type=Path, required=True, help="global_stepN folder, or the folder above it (its newest checkpoint)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config_file", type=Path, nargs="+", help="YAML files of the run; default: those saved in the checkpoint")
    parser.add_argument("--precision", choices=["auto", "fp16", "bf16", "fp32"], default="auto", help="of the saved weights; auto: the run's")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sepllm_gpt_neox")
    parser.add_argument("--no_save_tokenizer", action="store_true")
    parser.add_argument("--vocab-is-hf-tokenizer", action="store_true", help="vocab_file belongs to a saved transformers tokenizer")
    parser.add_argument("--pad-token-id", type=int)
    parser.add_argument("--no_verify", action="store_true", help="do not compare the two models (it takes twice the memory of fp32 weights)")
    parser.add_argument("--trust_input", action="store_true", help="allow the checkpoint's pickles to run code")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
