"""Turn a training checkpoint into a folder that transformers loads, and prove it: both models must give the same logits.

usage: python tools/ckpts/convert_neox_to_hf.py --input_dir checkpoints/global_step1000 --output_dir hf/model
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from megatron.config.schema import Config
from megatron.data.tokenizer import END_OF_TEXT
from megatron.parallel.shards import RowBiases
from megatron.training.vocabulary import without_rows
from megatron.training.weights import read_weights
from sepllm.hf.bundle import write_bundle
from tools.ckpts.hf_config import ARCHITECTURES, SpecialTokens, fitting_architecture, hf_config
from tools.ckpts.hf_tokenizer import hf_tokenizer
from tools.ckpts.mapping import neox_to_hf
from tools.ckpts.saved_config import origin, origin_folder, run_config
from tools.ckpts.verification import EMBEDDINGS, Differences, compare
from tools.command import until_stopped

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    directory: Path
    num_parameters: int
    notes: tuple[str, ...]
    """What somebody who uses the folder should know."""
    differences: Differences | None
    """Between the logits of the training model and of the folder's; None if they were not compared."""

    @property
    def largest_difference(self) -> float | None:
        return None if self.differences is None else self.differences.largest


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
            groups_qkv=options.legacy_gqa,
            row_biases=options.row_biases,
            like=options.like,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for note in converted.notes:
        print(note)
    print(f"{converted.num_parameters:,} parameters are in {converted.directory}.")
    found = converted.differences
    if found is None:
        return 0
    print(
        f"Largest difference between the logits of the training model and of that folder: {found.text:.2e}, with padding {found.padding:.2e} (fp32)."
    )
    if found.is_rounding:
        return 0
    print("That is more than rounding: the folder does not hold the model that was trained.", file=sys.stderr)
    return 1


def convert(
    config: Config,
    *,
    input_dir: Path,
    output_dir: Path,
    precision: str = "auto",
    architecture: str = "auto",
    save_tokenizer: bool = True,
    vocab_is_hf_tokenizer: bool = False,
    pad_token_id: int | None = None,
    verify: bool = True,
    trust: bool = False,
    groups_qkv: bool = False,
    row_biases: RowBiases = "summed",
    like: Path | None = None,
) -> Converted:
    """Write the folder. ``config`` is that of the run; ``precision`` "auto" is the run's own, "keep" that of each tensor.

    ``architecture`` "auto": that of the folder the run began from, which ``like`` names or the checkpoint keeps; else sepllm_gpt_neox; else
    the first that can be this model. ``groups_qkv`` and ``row_biases``: see `read_weights`.
    """
    began = origin(input_dir, like=like)
    if architecture == "auto":
        architecture = fitting_architecture(config, began)
    state = read_weights(input_dir, model=config.model, trust=trust, groups_qkv=groups_qkv, row_biases=row_biases).state
    if EMBEDDINGS not in state:
        raise ValueError(f"{input_dir} has no {EMBEDDINGS}: the checkpoint lacks its first layer.")
    dtype = DTYPES[config.precision.precision if precision in ("auto", "keep") else precision]
    if precision != "keep":
        state = {name: value.to(dtype) for name, value in state.items()}
    rows = state[EMBEDDINGS].shape[0] if began is None else min(began.vocab_size, state[EMBEDDINGS].shape[0])

    tokenizer = hf_tokenizer(config.tokenizer, vocab_is_hf_tokenizer=vocab_is_hf_tokenizer) if save_tokenizer else None
    tokens = special_tokens(tokenizer, pad_token_id, began)
    described = hf_config(config, architecture=architecture, vocab_rows=rows, tokens=tokens)
    written = neox_to_hf(without_rows(state, rows), config.model, architecture=architecture)
    save_model(written, described, output_dir, dtype=dtype)
    if tokenizer is not None:
        if pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
        tokenizer.save_pretrained(output_dir)
    if (kept := origin_folder(input_dir, like=like) / "generation_config.json").is_file():
        shutil.copyfile(kept, output_dir / kept.name)
    if architecture == "sepllm_gpt_neox":
        write_bundle(output_dir)
    return Converted(
        directory=output_dir,
        num_parameters=sum(value.numel() for value in written.values()),
        notes=notes(config, described),
        differences=compare(state, config, output_dir, rows=rows) if verify else None,
    )


def notes(config: Config, described: PreTrainedConfig) -> tuple[str, ...]:
    """What the folder says differently from the run, or leaves out."""
    told = [f"hidden_act is {described.hidden_act}: what the run's activation (bias_gelu_fusion included) computes."]
    if config.model.rotary_angles == "fp16":
        told.append("rotary_angles: fp16 has no counterpart in transformers: the folder computes angles in fp32, and is compared so.")
    if config.attention.reset_at_document_end:
        told.append("reset_attention_mask has no counterpart in transformers: give the folder one document a row.")
    return tuple(told)


def special_tokens(tokenizer: PreTrainedTokenizerBase | None, pad_token_id: int | None, began: PreTrainedConfig | None = None) -> SpecialTokens:
    """The tokenizer's, or those of the model that the run began from; without either, 0 begins and ends a text, as in GPT-NeoX."""
    if began is not None:
        return SpecialTokens(bos=began.bos_token_id, eos=began.eos_token_id, pad=began.pad_token_id if pad_token_id is None else pad_token_id)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input_dir", type=Path, required=True, help="global_stepN folder, or the folder above it (its newest checkpoint)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config_file", type=Path, nargs="+", help="YAML files of the run; default: those saved in the checkpoint")
    parser.add_argument(
        "--precision", choices=["auto", "keep", "fp16", "bf16", "fp32"], default="auto", help="of the weights; auto: the run's; keep: each its own"
    )
    parser.add_argument("--architecture", choices=["auto", *ARCHITECTURES], default="auto", help="auto: sepllm_gpt_neox where it can be this model")
    parser.add_argument("--like", type=Path, help="the transformers folder that the run began from: its vocabulary, special tokens and kind of model")
    parser.add_argument("--no_save_tokenizer", action="store_true")
    parser.add_argument("--vocab-is-hf-tokenizer", action="store_true", help="vocab_file belongs to a saved transformers tokenizer")
    parser.add_argument("--pad-token-id", type=int)
    parser.add_argument("--no_verify", action="store_true", help="do not compare the two models (it takes twice the memory of fp32 weights)")
    parser.add_argument("--legacy_gqa", action="store_true", help="grouped heads are stored as GPT-NeoX did before #1315: q .. q k v a group")
    parser.add_argument(
        "--row_biases",
        choices=["summed", "copied"],
        default="summed",
        help="of tensor-parallel pieces under the parallel residual: addends, as in GPT-NeoX, or copies of the whole",
    )
    parser.add_argument("--trust_input", action="store_true", help="allow the checkpoint's pickles to run code")
    return parser


if __name__ == "__main__":
    raise SystemExit(until_stopped(main))
