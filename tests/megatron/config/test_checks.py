"""What keys must be together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.config.checks import NOT_BUILT_YET, check_startable
from megatron.config.loader import LoadedConfig

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]
SEPLLM: dict[str, object] = {"separator_token_ids": [5, 6], "prefill_local_window_size": 8}
FP32_SUMS: dict[str, object] = {"data_types": {"grad_accum_dtype": "fp32"}}
PATHS = {f"{split}_data_paths": ["a", "b"] for split in ("train", "valid", "test")}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num-attention-heads": 5}, "num_attention_heads (5) must divide hidden_size (64): use 1, 2, 4, 8 or 16, or change hidden_size."),
        ({"num_kv_heads": 3}, "num_kv_heads (3) must divide num_attention_heads (4): use 1, 2 or 4."),
        ({"num_kv_heads": 2, "model_parallel_size": 4}, "model_parallel_size (4) must divide num_kv_heads (2)"),
        ({"model_parallel_size": 3}, "model_parallel_size (3) must divide num_attention_heads (4): use 1, 2 or 4, or change num_attention_heads."),
        ({"rotary_pct": 0.2}, "rotates 3 of 16 dimensions"),
        ({"rotary_pct": 2}, "a number of at least 0 and at most 1"),
        ({"master_port": 70000}, "master_port is 70000: give a whole number of at least 1 and at most 65535"),
        ({"seed": 2**32}, "seed is 4294967296: give a whole number of at least 0 and at most 4294967295"),
        ({"seq-length": 256}, "max_position_embeddings (128) is below seq_length (256): raise it to at least 256."),
        ({"num_unique_layers": 3}, "num_unique_layers (3) must divide num_layers (4): use 1, 2 or 4."),
        ({"gpt_j_tied": True}, "set gpt_j_residual to true"),
        ({"train_epochs": 1}, "both given: give exactly one"),
        ({"save": "out"}, "save is given without checkpoint_factor or extra_save_iters"),
        ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, "its powers never grow"),
        ({"min_lr": 0.1}, "min_lr (0.1) is above the learning rate (0.001)"),
        ({"lr_decay_iters": 5, "lr_decay_fraction": 0.5}, "lr_decay_iters and lr_decay_fraction are both given"),
        ({"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True}, "keep one"),
        ({"fp16_lm_cross_entropy": True}, "the precision is fp32: it needs fp16"),
        ({"data_path": "a", **PATHS}, "data_path and train_data_paths are both given"),
        ({"train_data_paths": ["a"]}, "valid_data_paths and test_data_paths missing"),
        ({"train_data_paths": "a"}, 'a list of texts, such as ["a", "b"]'),
        ({**PATHS, "train_data_weights": [1.0]}, "train_data_weights has 1 entries but train_data_paths has 2: give one weight per path."),
        ({**PATHS, "train_data_weights": [2, -1]}, "a list of numbers of at least 0, such as [0.5, 0.5]"),
        ({**PATHS, "train_data_weights": [0, 0]}, "train_data_weights gives a no sample: leave it out of train_data_paths, or weigh it more."),
        ({**PATHS, "valid_data_weights": [1, 0.0]}, "valid_data_weights gives b no sample"),
        (
            {"data_path": ["a"]},
            "give one prefix as text; lists of them are train_data_paths, valid_data_paths and test_data_paths.",
        ),
        ({**PATHS, "valid_label_data_paths": ["a"]}, "give one label file per path"),
        ({"attention-config": [[["global"], 3]]}, "attention_config describes 3 layers but num_layers is 4"),
        ({"attention-config": "flash"}, "give a list of [types, repeats]"),
        ({"attention-config": ["flash"]}, "give a list of [types, repeats]"),
        ({**SEPLLM, "USE_BiPE": True}, "BiPE_seps lists no separator ids"),
        ({**SEPLLM, "USE_BiPE": True, "BiPE_seps": [-1]}, "BiPE_seps lists no separator ids"),
        ({**SEPLLM, "USE_BiPE": True, "BiPE_seps": [5], "pos-emb": "learned"}, "bilevel positions need pos_emb rotary or alibi"),
        ({**SEPLLM, "USE_BiPE": True, "BiPE_seps": [5], "rope_fusion": True}, "set rope_fusion to false"),
        ({"USE_ORIGINAL_FULL_ATTEN": True, "USE_BiPE": True, "BiPE_seps": [5]}, "set USE_BiPE to false"),
        ({**SEPLLM, "separator_token_ids": [5, 512]}, "separator_token_ids holds 512, which the vocabulary of 512 tokens lacks"),
        ({**SEPLLM, "USE_BiPE": True, "BiPE_seps": [5, 9999]}, "BiPE_seps holds 9999"),
        ({**SEPLLM, "BATCH_ADAPTIVE_INIT_POS": True, "PADDING_ID": 600}, "PADDING_ID holds 600"),
        ({"padded_vocab_size": 128}, "the tokenizer has 512 tokens but the model's vocabulary (padded_vocab_size) has 128"),
        ({"account": "me"}, "set launcher to slurm"),
        ({"bf16": {"enabled": True}, **FP32_SUMS}, "is fp32 and the precision is bfloat16: without ZeRO, DeepSpeed 0.19 sums"),
        ({"precision": "fp16", **FP32_SUMS}, "is fp32 and the precision is fp16"),
        ({"data_types": {"grad_accum_dtype": "bfloat16"}}, "is bfloat16 and the precision is fp32"),
        ({"data_types": {"grad_accum_dtype": "fp8"}, "zero_optimization": {"stage": 1}}, "grad_accum_dtype is 'fp8': give fp32, fp16 or bf16."),
    ],
)
def test_what_contradicts_is_named_with_a_remedy(keys: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes(keys, world_size=12))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"zero_optimization": {"stage": 2}, "pipe_parallel_size": 2}, "zero_optimization.stage 2 does not work with pipe_parallel_size 2"),
        ({"pipe_parallel_size": 2, "precision": "bfloat16"}, "cannot load (bfloat16), or its gradient norm counts tied embeddings twice (fp16)"),
        ({"pipe_parallel_size": 2, "pipe_partition_method": "type:conv"}, "a pattern that is found in one of EmbeddingPipe, Parallel"),
        ({"pipe_parallel_size": 2, "pipe_partition_method": "even"}, "pipe_partition_method is 'even': give uniform, parameters, or type:"),
        ({"pipe_parallel_size": 2, "num-layers": 1}, "pipe_parallel_size (2) is above num_layers (1)"),
        ({"pipe_parallel_size": 2, "deepspeed_extra_args": {"pipeline": {"activation_checkpoint_interval": 1}}}, "checkpoint_activations is"),
        ({"compile": True, "zero_optimization": {"stage": 3}}, "use stage 2, or set compile to false"),
        ({"compile": True, "checkpoint_activations": True, "recompute_granularity": "selective"}, "set recompute_granularity to full"),
        ({"model_parallel_size": 4}, "needs a multiple of 4 devices and there are 2"),
        ({"model_parallel_size": 2, "seq-length": 31, "sequence_parallel": True}, "cuts seq_length (31) into 2 pieces, which do not divide it"),
        ({"model_parallel_size": 2, "zero_optimization": {"stage": 3}}, "nothing reads what ZeRO 3 saves of sharded weights"),
        ({"model_parallel_size": 2, "precision": "bfloat16"}, "clips by the norm of the first shard alone: set zero_optimization.stage to 1"),
        ({"model_parallel_size": 2, "compile": True, "attention-dropout": 0.1}, "set compile to false, or attention_dropout"),
        ({"context_parallel_size": 2, "pipe_parallel_size": 2}, "context_parallel_size (2) does not work with pipe_parallel_size above 1"),
        ({"context_parallel_size": 2, "seq-length": 126}, "seq_length (126) must be a multiple of 2 x context_parallel_size (2)"),
        ({"context_parallel_size": 2, "seq-length": 126}, "use seq_length 128"),
        ({"context_parallel_size": 2, "core": "sdpa"}, "core sdpa computes whole sequences only"),
    ],
)
def test_parallel_layouts_that_do_not_work_are_refused(keys: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes(keys, world_size=2))


@pytest.mark.parametrize("others", [{}, {"zero_optimization": {"stage": 3}}, {"compile": True}, {"checkpoint_activations": True}, SEPLLM])
def test_pieces_of_a_sequence_start_with_every_engine(others: dict[str, object], resolve: Resolve) -> None:
    config = resolve({"context_parallel_size": 2, **others}, world_size=4).config
    assert not check_startable(config, has_fp16=True)
    assert config.batch.data_parallel_size == 2


@pytest.mark.parametrize("config", [[[["flash"], 4]], [[["global"], "all"]], [[["flash", "global"], 2]], [[["flash"], 1], [["global"], 3]]])
def test_global_and_flash_layers_are_the_same(config: object, resolve: Resolve) -> None:
    assert resolve({"attention-config": config}).config.attention == resolve().config.attention


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pos-emb": "rpe"}, "pos_emb rpe"),
        ({"use_mup": True}, "use_mup"),
        ({"num_unique_layers": 2}, "num_unique_layers"),
        ({"text_gen_type": "precompute"}, "text_gen_type precompute"),
    ],
)
def test_what_is_still_to_come_resolves_and_its_start_names_it(keys: dict[str, object], words: str, resolve: Resolve) -> None:
    reasons = check_startable(resolve(keys, world_size=2).config, has_fp16=True)
    assert any(words in reason for reason in reasons)
    assert all(any(reason == sentence for _, sentence in NOT_BUILT_YET) for reason in reasons)


def test_every_mode_starts(resolve: Resolve) -> None:
    grid = {"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5] * 4}
    bilevel, adjusted = {**SEPLLM, "USE_BiPE": True, "BiPE_seps": [5]}, {**SEPLLM, "USE_SA_SOFTMAX": True}
    for keys in ({}, SEPLLM, grid, {**SEPLLM, "streamingLLM": True}, bilevel, adjusted, {**bilevel, **adjusted, "pos-emb": "alibi"}):
        assert check_startable(resolve(keys).config, has_fp16=False) == []


def test_a_run_without_its_tokenizer_resolves_and_does_not_start(resolve: Resolve) -> None:
    loaded = resolve({"tokenizer-type": "HFTokenizer", "vocab-file": "absent.json"})
    assert (loaded.config.model.vocab_size, loaded.config.model.padded_vocab_size) == (None, None)
    assert any("tokenizer not found, skipped: absent.json" in note for note in loaded.notes)
    (reason,) = check_startable(loaded.config, has_fp16=True)
    assert "absent.json" in reason
