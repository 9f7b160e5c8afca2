"""Perplexity, cache size, time and memory of a model on endless text: full attention, StreamingLLM, SepLLM.

    python -m sepllm.streaming --model FOLDER --text BOOK.txt --methods vanilla streamingllm sepllm --num_eval_tokens 20480

The flags are those of the reference's streaming evaluation and mean the same. A run that was interrupted goes on where its state was
saved last when the same command is given again; so does one that ended, when it is asked for more tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sepllm.hf import attach
from sepllm.streaming.method import METHODS, Method, MethodName
from sepllm.streaming.model import load, separator_ids
from sepllm.streaming.report import Result, Trace, as_json, describe, result_of, table
from sepllm.streaming.stream import Stream, forget
from sepllm.streaming.text import digest, texts_in, texts_of_dataset, token_pairs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL_SIZE = 224


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(_parser().parse_args(argv))
    except (ValueError, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> list[Result]:
    """The figures of every method, which are also printed and written to the output folder."""
    names = _method_names(arguments)
    _check_sizes(arguments, names)
    device = _device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("float16" if device.type == "cuda" else "float32")]
    model, tokenizer = load(arguments.model_name_or_path, dtype=dtype, device=device)
    methods = [_method(name, arguments, tokenizer) for name in names]
    identity = {
        "model": str(arguments.model_name_or_path),
        "configuration": _configuration_identity(model),
        "dtype": str(dtype),
        "text": _text_identity(arguments),
    }
    with attach(model):
        results = [_measured(model, method, _pairs(arguments, tokenizer), arguments, identity) for method in methods]
    _write(arguments, results, device=device, dtype=dtype)
    return results


def _measured(
    model: PreTrainedModel, method: Method, pairs: Iterator[tuple[int, int]], arguments: argparse.Namespace, identity: dict[str, str]
) -> Result:
    """The figures of one method, whose stream is read to its end under a progress bar."""
    folder = arguments.output_dir / method.name
    if arguments.restart:
        forget(folder)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    stream = Stream(model, method, folder, identity=identity, save_every=arguments.save_every)
    done = stream.tally.num_tokens
    print(describe(method) + (f"; goes on after {done} tokens" if done else ""), flush=True)
    with tqdm(total=arguments.num_eval_tokens, initial=done, unit="token", desc=method.name, mininterval=1.0) as bar:
        for tally in stream.read(pairs, arguments.num_eval_tokens):
            bar.set_postfix(ppl=f"{tally.perplexity:.3f}", kv=stream.cache.num_stored(), refresh=False)
            bar.update(tally.num_tokens - bar.n)
    if not stream.tally.num_tokens:
        raise ValueError("No text has two tokens, so nothing can be predicted: give other files with --text.")
    if stream.tally.num_tokens < arguments.num_eval_tokens:
        print(f"The texts end after {stream.tally.num_tokens} tokens.")
    return result_of(stream, arguments.lengths)


def _write(arguments: argparse.Namespace, results: list[Result], *, device: torch.device, dtype: torch.dtype) -> None:
    header = {
        "model": str(arguments.model_name_or_path),
        "text": _text_identity(arguments),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    written = [arguments.output_dir / "results.json", arguments.output_dir / "results.md"]
    written[0].write_text(as_json(header, results), encoding="utf-8")
    written[1].write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so kv.png was not drawn: pip install matplotlib and give the same command again, which only draws.")
    else:
        from sepllm.streaming.picture import draw

        written.append(arguments.output_dir / "kv.png")
        draw({result.method: Trace.read(arguments.output_dir / result.method) for result in results}, written[-1])
    print("written:", *written)


def _method_names(arguments: argparse.Namespace) -> list[MethodName]:
    """Those of ``--methods``, or the one that the reference's three switches choose."""
    switches = (arguments.enable_kv_cache_manager, arguments.enable_SepLLM, arguments.enable_StreamingLLM)
    if arguments.methods:
        if any(switch is not None for switch in switches):
            raise ValueError("--methods and --enable_... both choose the method: give one or the other.")
        return list(dict.fromkeys(arguments.methods))
    manages, is_sepllm, is_streaming = (default if switch is None else switch for switch, default in zip(switches, (True, True, False), strict=True))
    if not manages:
        return ["vanilla"]
    if is_sepllm == is_streaming:
        raise ValueError(
            f"--enable_SepLLM and --enable_StreamingLLM are both {is_sepllm}: set exactly one of them to True, or --enable_kv_cache_manager to False "
            "for full attention."
        )
    return ["sepllm" if is_sepllm else "streamingllm"]


def _check_sizes(arguments: argparse.Namespace, names: list[MethodName]) -> None:
    """ValueError for what the reference refuses too; `Method` checks the rest."""
    newest = arguments.cache_size - arguments.init_cache_size
    if names == ["streamingllm"] and arguments.local_size not in (None, newest):
        raise ValueError(
            f"local_size ({arguments.local_size}) must be cache_size ({arguments.cache_size}) - init_cache_size ({arguments.init_cache_size}) = "
            f"{newest} for StreamingLLM: leave --local_size out."
        )
    if arguments.num_eval_tokens < 1:
        raise ValueError(f"num_eval_tokens is {arguments.num_eval_tokens}: it counts tokens and must be 1 or more.")
    wrong = [length for length in arguments.lengths if not 0 < length <= arguments.num_eval_tokens]
    if wrong:
        raise ValueError(f"--lengths {wrong[0]}: give numbers of tokens from 1 to num_eval_tokens ({arguments.num_eval_tokens}).")
    missing = [str(path) for path in arguments.text or () if not path.is_file()]
    if missing:
        raise ValueError(f"--text: {', '.join(missing)} is no file.")


def _method(name: MethodName, arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Method:
    if name == "vanilla":
        return Method.vanilla()
    initial, total, shifts = arguments.init_cache_size, arguments.cache_size, arguments.enable_pos_shift
    if name == "streamingllm":
        return Method.streamingllm(initial=initial, total=total, shifts_positions=shifts)
    return Method.sepllm(
        initial=initial,
        separators=arguments.sep_cache_size,
        local=LOCAL_SIZE if arguments.local_size is None else arguments.local_size,
        total=total,
        shifts_positions=shifts,
        separator_ids=separator_ids(arguments.separators, tokenizer),
    )


def _pairs(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    texts = texts_in(arguments.text) if arguments.text else texts_of_dataset(arguments.dataset_name, arguments.task, arguments.split)
    return token_pairs(texts, tokenizer, num_samples=arguments.num_samples)


def _text_identity(arguments: argparse.Namespace) -> str:
    if arguments.text:
        return f"{' '.join(path.name for path in arguments.text)} (sha256 {digest(arguments.text)}), at most {arguments.num_samples} texts"
    return f"{arguments.dataset_name} {arguments.task} {arguments.split}, at most {arguments.num_samples} texts"


def _configuration_identity(model: PreTrainedModel) -> str:
    """A digest of what is saved as config.json, without the release of transformers and the place it came from."""
    values = {key: value for key, value in model.config.to_diff_dict().items() if key not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was given, but this torch sees no CUDA device: give --device cpu, or leave it out.")
    return device


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() == "true"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sepllm.streaming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", "--model", required=True, help="a folder, or a name on the hub: Llama, GPT-NeoX, Falcon, sepllm_gpt_neox, ...")
    add("--methods", nargs="+", choices=METHODS, help="one run each, and one table; StreamingLLM keeps cache_size - init_cache_size newest tokens")
    add("--output_dir", type=Path, default=Path("outputs/debug"))
    texts = parser.add_argument_group("text")
    texts.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="each one text; .jsonl: the field text of each line")
    texts.add_argument("--dataset_name", default="wikitext", help="without --text: what the package datasets loads, by name or from a folder")
    texts.add_argument("--task", default="wikitext-2-raw-v1", help="its configuration; default: none")
    texts.add_argument("--split", default="test")
    texts.add_argument("--num_samples", type=int, default=3_000_000, help="texts at most")
    texts.add_argument("--num_eval_tokens", type=int, default=20480, help="predictions at most")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--cache_size", type=int, default=324, help="c: with more tokens than this, some are dropped")
    cache.add_argument("--init_cache_size", type=int, default=4, help="a: first tokens that stay")
    cache.add_argument("--sep_cache_size", type=int, default=64, help="s: separators that stay; SepLLM only")
    cache.add_argument("--local_size", type=int, help=f"w: newest tokens that stay; SepLLM: {LOCAL_SIZE}, StreamingLLM: c - a")
    cache.add_argument("--separators", nargs="+", default=["tokenizer"], help="tokenizer (those it has), a family (the reference's list), or ids")
    cache.add_argument("--enable_pos_shift", type=_truth, default=True, metavar="BOOL", help="False: stored keys keep the positions they came with")
    for switch, default in (("enable_kv_cache_manager", True), ("enable_SepLLM", True), ("enable_StreamingLLM", False)):
        cache.add_argument(f"--{switch}", type=_truth, metavar="BOOL", help=f"instead of --methods; by default {default}")
    how = parser.add_argument_group("run")
    how.add_argument("--device", help="by default cuda:0 where there is one, else cpu")
    how.add_argument("--dtype", choices=list(DTYPES), help="by default float16 on CUDA, float32 elsewhere")
    how.add_argument("--save_every", type=int, default=10_000, help="tokens between two savings of the state")
    how.add_argument("--restart", action="store_true", help="begin anew, whatever the output folder holds")
    how.add_argument("--lengths", nargs="*", type=int, default=[], help="after how many tokens the table tells the perplexity too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
