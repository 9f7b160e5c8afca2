"""The converter on tiny models: from a checkpoint to a folder that gives the training model's logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from megatron.config.schema import (
    AttentionConfig,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RuntimeConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.data.indexed import IndexedDatasetWriter, best_dtype
from megatron.model.gpt import build_model
from sepllm.hf import SepLLMGPTNeoXForCausalLM
from sepllm.pattern import AttentionPattern, SelfAdjust
from tools.ckpts import convert_neox_to_hf, hf_config, verification
from tools.ckpts.convert_neox_to_hf import Converted, convert, main
from tools.ckpts.saved_config import run_config

VOCABULARY = 48
PATTERN = AttentionPattern(initial_tokens=3, separator_ids=(5, 6), windows=(4, 4))
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "rotary_pct": 1.0,
    "gpt_j_residual": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "norm_epsilon": 1e-6,
}


def run(*, attention: dict[str, object] | None = None, precision: str = "fp32", tokenizer: TokenizerConfig | None = None, **model: object) -> Config:
    shape: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 128,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "no_weight_tying": True,
        "gpt_j_residual": True,
        "activation": "gelu_tanh",
        "init_method_std": 0.2,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": VOCABULARY,
    }
    return Config(
        model=ModelConfig(**shape | model),
        attention=AttentionConfig(**({"prefill": PATTERN, "decode": PATTERN, "mode": "sepllm"} | (attention or {}))),
        tokenizer=tokenizer or TokenizerConfig(),
        data=DataConfig(),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(lr=1e-3, lr_decay_iters=1),
        batch=BatchConfig(train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, data_parallel_size=1),
        precision=PrecisionConfig(precision=precision),
        parallel=ParallelConfig(),
        training=TrainingConfig(train_iters=1),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        launch=LaunchConfig(),
        generation=GenerationConfig(),
        evaluation=EvaluationConfig(),
        runtime=RuntimeConfig(world_size=1, device="cpu"),
    )


FULL = {"prefill": AttentionPattern.full(2), "decode": AttentionPattern.full(2), "mode": "full"}
BIPE = {"use_bipe": True, "bipe_separator_ids": (5, 9)}


def self_adjusting(pattern: AttentionPattern, softmax: SelfAdjust) -> dict[str, object]:
    pattern = replace(pattern, softmax=softmax)
    return {"prefill": pattern, "decode": pattern, "mode": "self_adjust"}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Converted]:
    """Save an initialised model of the run as a checkpoint and convert it."""

    def make(config: Config, **options: object) -> Converted:
        model = build_model(config, device="cpu", dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        (tmp_path / "step").mkdir(exist_ok=True)
        torch.save({"module": model.state_dict()}, tmp_path / "step" / "mp_rank_00_model_states.pt")
        return convert(config, input_dir=tmp_path / "step", output_dir=tmp_path / "hf", **{"save_tokenizer": False} | options)

    return make


MODES: dict[str, dict[str, object]] = {
    "sepllm": {},
    "full": FULL,
    "streaming": {"prefill": replace(PATTERN, separator_ids=()), "decode": replace(PATTERN, separator_ids=()), "mode": "streaming"},
    "per layer": {"prefill": replace(PATTERN, windows=(64, 2)), "decode": replace(PATTERN, windows=(64, 3))},
    "sliding": {"prefill": replace(PATTERN, sliding_width=9), "decode": replace(PATTERN, sliding_width=9)},
    "grid": {
        "prefill": replace(PATTERN, separator_ids=(), intervals=(3, 4)),
        "decode": replace(PATTERN, separator_ids=(), intervals=(3, 4)),
        "mode": "fixllm",
    },
    "padding": {"prefill": replace(PATTERN, padding_id=1), "decode": replace(PATTERN, padding_id=1)},
    "self-adjust": self_adjusting(PATTERN, SelfAdjust(kind="normalised", numerator_bias=0.1, denominator_bias=0.2)),
    "self-adjust, causal extremes": self_adjusting(PATTERN, SelfAdjust(kind="normalised", extremes="causal")),
    "full self-adjust": self_adjusting(replace(AttentionPattern.full(2), initial_tokens=3), SelfAdjust(kind="normalised")),
    "raw self-adjust": self_adjusting(PATTERN, SelfAdjust(kind="raw")),
}


@pytest.mark.parametrize("attention", list(MODES.values()), ids=list(MODES))
def test_the_folder_gives_the_training_models_logits(converted: Callable[..., Converted], attention: dict[str, object]) -> None:
    config = run(attention=attention)
    result = converted(config)
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5
    model = AutoModelForCausalLM.from_pretrained(result.directory)
    assert type(model) is SepLLMGPTNeoXForCausalLM
    assert (model.config.prefill_pattern(), model.config.decode_pattern()) == (config.attention.prefill, config.attention.decode)
    assert (result.directory / "modeling_sepllm_gpt_neox.py").is_file()
    assert result.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{"gpt_j_residual": False}, {"no_weight_tying": False}, {"pos_emb": "learned"}, {"pos_emb": "alibi"}, BIPE, {**BIPE, "pos_emb": "alibi"}],
    ids=str,
)
def test_other_blocks_give_the_same_logits_too(converted: Callable[..., Converted], changes: dict[str, object]) -> None:
    difference = converted(run(**changes)).largest_difference
    assert difference is not None
    assert difference < 1e-5


@pytest.mark.parametrize(("activation", "hidden_act"), [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_the_activation_is_the_one_that_was_trained(converted: Callable[..., Converted], activation: str, hidden_act: str) -> None:
    result = converted(run(activation=activation))
    assert json.loads((result.directory / "config.json").read_text())["hidden_act"] == hidden_act
    assert hidden_act in result.notes[0]


def test_bilevel_positions_go_with_the_folder(converted: Callable[..., Converted]) -> None:
    result = converted(run(**BIPE))
    config = AutoModelForCausalLM.from_pretrained(result.directory).config
    assert (config.USE_BiPE, config.BiPE_seps) == (True, [5, 9])
    table = load_file(result.directory / "model.safetensors")["sepllm_gpt_neox.position_embeddings.weight"]
    assert tuple(table.shape) == (64, 32)


def test_full_attention_converts_to_transformers_own_gpt_neox(converted: Callable[..., Converted]) -> None:
    result = converted(run(attention=FULL), architecture="neox")
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5
    assert type(AutoModelForCausalLM.from_pretrained(result.directory)) is GPTNeoXForCausalLM
    assert "lm_head.weight" in load_file(result.directory / "model.safetensors")


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_llama_and_mistral_blocks_convert_to_themselves(converted: Callable[..., Converted], architecture: str, groups: int) -> None:
    width = 7 if architecture == "mistral" else None
    pattern = replace(AttentionPattern.full(2), sliding_width=width)
    config = run(attention={"prefill": pattern, "decode": pattern, "mode": "full"}, num_kv_heads=groups, **LLAMA)
    result = converted(config, architecture=architecture)
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5


@pytest.mark.parametrize(
    ("config", "architecture", "reasons"),
    [
        (run(), "neox", ["its attention is sepllm, not full"]),
        (run(attention=FULL), "llama", ["norm is layernorm", "activation is gelu_tanh", "gpt_j_residual"]),
        (run(**LLAMA), "sepllm_gpt_neox", ["norm is rmsnorm", "activation is swiglu", "is false; it has both biases"]),
        (run(gpt_j_tied=True), "sepllm_gpt_neox", ["one norm a block"]),
        (run(num_kv_heads=2), "sepllm_gpt_neox", ["num_kv_heads groups the heads"]),
        (run(pos_emb="sinusoidal"), "sepllm_gpt_neox", ["pos_emb is sinusoidal"]),
        (run(attention=MODES["full self-adjust"], **BIPE), "neox", ["its softmax is self-adjusting", "USE_BiPE"]),
    ],
    ids=["sparse neox", "no llama", "no gpt-neox", "tied", "grouped", "positions", "full but not GPT-NeoX's"],
)
def test_every_reason_against_an_architecture_is_given(
    converted: Callable[..., Converted], config: Config, architecture: str, reasons: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"cannot be written as --architecture {architecture}") as error:
        converted(config, architecture=architecture)
    for reason in reasons:
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (run(), "sepllm_gpt_neox"),
        (run(attention=FULL), "sepllm_gpt_neox"),
        (run(attention=FULL, use_bias_in_attn_linear=False), "gpt_neox"),
        (run(attention=FULL, num_kv_heads=2, **LLAMA), "llama"),
        (run(attention=FULL, **LLAMA | {"use_bias_in_attn_linear": True}), "llama"),
        (
            run(
                attention={**FULL, "prefill": replace(FULL["prefill"], sliding_width=7), "decode": replace(FULL["decode"], sliding_width=7)}, **LLAMA
            ),
            "mistral",
        ),
    ],
    ids=["sparse", "full", "no biases", "llama", "llama with biases", "mistral"],
)
def test_unless_told_otherwise_a_model_becomes_what_can_express_it(converted: Callable[..., Converted], config: Config, kind: str) -> None:
    result = converted(config)
    assert json.loads((result.directory / "config.json").read_text())["model_type"] == kind
    assert result.differences is not None
    assert result.differences.is_rounding


def test_llama_blocks_with_a_sparse_pattern_are_refused_with_each_architectures_reason(converted: Callable[..., Converted]) -> None:
    with pytest.raises(ValueError, match="cannot be written as a transformers model") as error:
        converted(run(**LLAMA))
    said = str(error.value)
    assert "- sepllm_gpt_neox: norm is rmsnorm; it has layernorm; activation is swiglu" in said
    assert "- llama: its attention is sepllm, not full\n" in said
    assert "score it with eval.py" in said


def test_a_refusal_names_the_architecture_that_can(converted: Callable[..., Converted]) -> None:
    with pytest.raises(ValueError, match="It can be written as --architecture sepllm_gpt_neox"):
        converted(run(), architecture="neox")


@pytest.mark.parametrize(
    ("trained", "precision", "dtype"),
    [("fp32", "auto", torch.float32), ("fp16", "auto", torch.float16), ("bfloat16", "auto", torch.bfloat16), ("fp16", "bf16", torch.bfloat16)],
)
def test_the_precision_asked_for_is_the_one_saved(converted: Callable[..., Converted], trained: str, precision: str, dtype: torch.dtype) -> None:
    result = converted(run(precision=trained), precision=precision)
    assert {value.dtype for value in load_file(result.directory / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(result.directory).dtype == dtype
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5


def test_the_tokenizer_is_saved_with_its_special_tokens(converted: Callable[..., Converted], tmp_path: Path) -> None:
    vocabulary = {"<pad>": 0, "<|endoftext|>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kept = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json"))
    result = converted(run(tokenizer=kept), save_tokenizer=True, pad_token_id=0)
    loaded = AutoTokenizer.from_pretrained(result.directory)
    assert loaded("b a <|endoftext|>").input_ids == [3, 2, 1]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 1, 0)
    model = AutoModelForCausalLM.from_pretrained(result.directory).config
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (1, 1, 0)
    batch = loaded(["a b a", "b"], padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    assert AutoModelForCausalLM.from_pretrained(result.directory).generate(**batch, max_new_tokens=3).shape == (2, 6)


def test_a_missing_tokenizer_is_an_error_with_the_way_out(converted: Callable[..., Converted]) -> None:
    with pytest.raises(ValueError, match="give --no_save_tokenizer"):
        converted(run(), save_tokenizer=True)


YAML = """{
  "num-layers": 2, "hidden-size": 32, "num-attention-heads": 4, "seq-length": 64, "max-position-embeddings": 64,
  "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25, "no-weight-tying": true, "gpt_j_residual": true,
  "bias-gelu-fusion": true, "model-parallel-size": 2, "pipe-parallel-size": 1, "make_vocab_size_divisible_by": 8, "init_method_std": 0.3,
  "train_batch_size": 1024, "train_micro_batch_size_per_gpu": 32, "gas": 4, "train-iters": 10, "lr-decay-iters": 10,
  "optimizer": {"type": "Adam", "params": {"lr": 0.0006}}, "fp16": {"fp16": true, "enabled": true},
  "tokenizer-type": "HFTokenizer", "vocab-file": "/nowhere/tokenizer.json",
"""
METHOD = """  "separator_token_ids": [5, 6], "prefill_local_window_size": 4, "generate_local_window_size": 6, "init_tok_max_idx": 1,
  "USE_SEP_ATTN_KERNEL_ACCELERATOR": true,
}"""


@pytest.fixture
def pipeline_checkpoint(tmp_path: Path) -> Path:
    """Layer files of two tensor-parallel ranks in fp16 under legacy names, with their configuration, as SepLLM's fork saves them."""
    step = tmp_path / "run" / "global_step7"
    (step / "configs").mkdir(parents=True)
    (step / "configs" / "size.yml").write_text(YAML + METHOD)
    (tmp_path / "run" / "latest").write_text("global_step7")
    config = run_config(step)
    whole = config.model_copy(update={"model": config.model.model_copy(update={"padded_vocab_size": VOCABULARY})})
    layers: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for key, value in build_model(whole, device="cpu").state_dict().items():
        _, place, name = key.split(".", 2)
        for rank in range(2):
            rows_of_one = name.endswith(("attention.dense.weight", "mlp.linear2.weight"))
            is_whole = "norm" in name or name.endswith(("attention.dense.bias", "mlp.linear2.bias"))
            piece = value if is_whole else value.chunk(2, 1 if rows_of_one else 0)[rank]
            legacy = name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
            layers.setdefault((int(place), rank), {})[legacy] = piece.half().clone()
    for (place, rank), state in layers.items():
        torch.save(state, step / f"layer_{place:02}-model_{rank:02}-model_states.pt")
    return tmp_path / "run"


def test_what_the_command_line_changed_is_part_of_the_saved_configuration(pipeline_checkpoint: Path) -> None:
    step = pipeline_checkpoint / "global_step7"
    (step / "configs" / "overrides.json").write_text(json.dumps({"gas": 2, "prefill_local_window_size": 3}))
    assert run_config(step).attention.prefill.windows == (3,) * run_config(step).model.num_layers
    assert set(run_config(step, config_files=[step / "configs" / "size.yml"]).attention.prefill.windows) == {4}


def test_the_command_converts_what_it_finds_in_the_checkpoint(pipeline_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--input_dir", str(pipeline_checkpoint), "--output_dir", str(tmp_path / "hf"), "--no_save_tokenizer", "--pad-token-id", "1"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "Largest difference between the logits" in said.out
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config
    assert (config.prefill_local_window_size, config.generate_local_window_size, config.init_tok_max_idx) == (4, 6, 1)
    assert (config.vocab_size, config.hidden_act, config.dtype, config.pad_token_id) == (VOCABULARY, "gelu_pytorch_tanh", torch.float16, 1)


def test_configuration_files_may_be_several_and_given_by_hand(pipeline_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "size.yml").write_text(YAML + "}")
    (tmp_path / "method.yml").write_text("{" + METHOD)
    files = ["--config_file", str(tmp_path / "size.yml"), str(tmp_path / "method.yml")]
    assert main(["--input_dir", str(pipeline_checkpoint), "--output_dir", str(tmp_path / "hf"), "--no_save_tokenizer", *files]) == 0


def test_a_folder_that_differs_from_the_run_fails_the_command(
    pipeline_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hf_config.ACTIVATIONS, "gelu_tanh", "gelu")
    assert main(["--input_dir", str(pipeline_checkpoint), "--output_dir", str(tmp_path / "hf"), "--no_save_tokenizer"]) == 1
    assert "does not hold the model that was trained" in capsys.readouterr().err


def test_mistakes_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "hf")]) == 1
    assert "name the run's YAML files with --config_file" in capsys.readouterr().err


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, convert_neox_to_hf.__file__, "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    for flag in ("--input_dir", "--config_file", "--output_dir", "--precision", "--no_save_tokenizer", "--vocab-is-hf-tokenizer", "--pad-token-id"):
        assert flag in ended.stdout


def test_the_models_are_compared_on_the_runs_own_text_where_it_is_here(pipeline_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(pipeline_checkpoint)
    length = config.model.seq_length
    with IndexedDatasetWriter(tmp_path / "text", best_dtype(VOCABULARY)) as writer:
        for start in range(0, 4 * length, 10):
            writer.add_document([token % VOCABULARY for token in range(start, start + 10)])
    here = config.model_copy(update={"data": config.data.model_copy(update={"data_path": str(tmp_path / "text")})})
    expected = [token % VOCABULARY for token in range(2 * length)]
    assert verification._ids(here, VOCABULARY).flatten().tolist() == expected
    assert verification._ids(config, VOCABULARY).flatten().tolist() != expected
    assert verification._ids(here, 7).max() < 7, "text of another vocabulary is of no use"
