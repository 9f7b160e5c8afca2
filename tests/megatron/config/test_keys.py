"""The table of keys: complete, and pointing at fields that exist."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.config.keys import ALIASES, KEYS, Confirmed, Honoured, Inert, Refused, canonical, nearest
from megatron.config.loader import LoadedConfig
from megatron.config.schema import Config, Group

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]

GPT_NEOX = """
pipe_parallel_size model_parallel_size pipe_partition_method sequence_parallel moe_num_experts moe_expert_interval moe_top_k num_layers
hidden_size num_attention_heads num_kv_heads intermediate_size seq_length max_position_embeddings sliding_window_width norm layernorm_epsilon
rms_norm_epsilon scalenorm_epsilon layernorm_fusion rmsnorm_fusion use_qk_layernorm pos_emb rotary_pct rotary_emb_base
rotary_save_freqs_buffer rpe_num_buckets rpe_max_distance opt_pos_emb_offset no_weight_tying gpt_j_residual gpt_j_tied
output_layer_parallelism attention_config sparsity_config make_vocab_size_divisible_by activation
scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_gelu_fusion bias_dropout_fusion rope_fusion init_method
output_layer_init_method init_method_std use_bias_in_attn_linear use_bias_in_mlp use_bias_in_norms apply_query_key_layer_scaling
attention_softmax_in_fp32 fp16_lm_cross_entropy precision num_unique_layers param_sharing_style optimizer use_bnb_optimizer
zero_optimization min_lr lr_decay_style lr_decay_iters lr_decay_fraction warmup override_lr_scheduler use_checkpoint_lr_scheduler
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gas train_iters train_epochs eval_interval eval_iters save load
checkpoint_factor checkpoint_scale extra_save_iters keep_last_n_checkpoints finetune no_load_optim no_load_rng no_save_rng no_save_optim
s3_path s3_chunk_size checkpoint_validation_with_forward_pass exit_interval fp16 bf16 loss_scale loss_scale_window min_scale hysteresis
gradient_clipping weight_decay hidden_dropout attention_dropout checkpoint_activations checkpoint_num_layers partition_activations
synchronize_each_layer contiguous_checkpointing checkpoint_in_cpu profile_backward data_path train_data_paths valid_data_paths
test_data_paths train_label_data_paths valid_label_data_paths test_label_data_paths train_reward_data_paths valid_reward_data_paths
test_reward_data_paths pos_train_data_paths neg_train_data_paths train_data_weights valid_data_weights test_data_weights
weight_by_num_documents weighted_sampler_alpha data_impl pack_impl allow_chopped dataset_impl split use_shared_fs mmap_warmup num_workers
seed eod_mask_loss tokenizer_type vocab_file merge_file train_impl dpo_beta kto_beta kl_impl use_mup mup_width_scale mup_embedding_mult
mup_output_temp mup_attn_temp mup_rp_embedding_mult mup_init_scale coord_check save_base_shapes base_shapes_file log_interval
steps_per_print wall_clock_breakdown use_wandb wandb_project wandb_group wandb_run_name wandb_team wandb_host wandb_init_all_ranks
tensorboard_dir log_dir use_comet comet_workspace comet_project comet_experiment_name comet_tags comet_others peak_theoretical_tflops
log_param_norm log_grad_norm log_grad_pct_zeros log_optimizer_states log_gradient_noise_scale profile profile_step_start profile_step_stop
memory_profiling memory_profiling_path distributed_backend launcher hostfile include exclude num_nodes num_gpus master_port master_addr
force_multi deepspeed_slurm deepspeed_mpi no_ssh_check comment account deepspeed_extra_args text_gen_type temperature top_k top_p
maximum_tokens prompt_end num_samples recompute return_logits sample_input_file sample_output_file eval_tasks eval_results_prefix
char_level_ppl adlr_autoresume adlr_autoresume_interval soft_prompt_tuning global_num_gpus world_size iteration user_script config_files
padded_vocab_size params_dtype git_hash mlp_multiple_of expansion_factor use_cpu_initialization context_parallel_size lr batch_size
clip_grad deepspeed save_interval zero_allow_untested_optimizer save_iters detect_nvlink_pairs fp32_allreduce prescale_gradients
gradient_predivide_factor sparse_gradients amp curriculum_learning dump_state flops_profiler communication_data_type autotuning
sparse_attention data_efficiency tensorboard wandb csv_monitor elasticity comms_logger compression_training checkpoint data_types scheduler
"""
SEPLLM = """
separator_token_ids PADDING_ID prefill_k generate_k prefill_local_window_size generate_local_window_size
USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS prefill_loc_win_size_list generate_win_loc_size_list
init_tok_max_idx USE_ORIGINAL_FULL_ATTEN streamingLLM USE_SEP_ATTN_KERNEL_ACCELERATOR RECOMPILE_SEP_ATTN_KERNEL BATCH_ADAPTIVE_INIT_POS
PRINT_KV_RATIO print_ratio_intervals USE_BiPE BiPE_seps EXCLUDE_DIAGONAL _DEFAULT_SPARSE_BLOCK_SIZE USE_SA_SOFTMAX USE_SA_SOFTMAX_NO_DENO
SA_Numerator_Bias SA_Denominator_Bias Layer_num USE_FIXED_SEP_INTERVALs fixed_sep_intervals_list
"""
OURS = """
core lr_schedule_version rotary_angles allow_fresh_start metrics_file wandb_mode progress_bar eval_num_fewshot eval_limit eval_batch_size
eval_task_path reset_attention_mask reference_padding launcher_args SA_Extremes row_biases
"""


@pytest.mark.parametrize("key", (GPT_NEOX + SEPLLM + OURS).split())
def test_every_key_is_honoured_inert_or_refused(key: str) -> None:
    assert canonical(key) in KEYS


def test_honoured_and_confirmed_keys_end_in_fields_that_exist() -> None:
    for key, rule in KEYS.items():
        if isinstance(rule, Honoured | Confirmed):
            group = Config.model_fields[rule.group].annotation
            if rule.group == "deepspeed":
                continue
            assert isinstance(group, type)
            assert issubclass(group, Group)
            assert rule.field in group.model_fields, key


def test_every_field_that_a_user_may_set_has_a_key() -> None:
    """Fields without a key are worked out from others or belong to the loader."""
    worked_out = {
        "optimizer": {"betas", "eps", "momentum", "params"},
        "parallel": {"zero_stage"},
        "precision": {"initial_scale_power"},
        "model": {"vocab_size"},
        "batch": {"data_parallel_size"},
        "runtime": {"world_size", "device"},
    }
    named = {(rule.group, rule.field) for rule in KEYS.values() if isinstance(rule, Honoured)}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            missing = {inner for inner in field.annotation.model_fields if (name, inner) not in named}
            assert missing == worked_out.get(name, set()), name


def test_reasons_are_sentences_without_a_stop() -> None:
    for rule in KEYS.values():
        if isinstance(rule, Inert | Refused):
            assert rule.reason
            assert not rule.reason.endswith(".")


def test_old_names_lead_to_keys() -> None:
    assert all(name in KEYS and old not in KEYS for old, name in ALIASES.items())


@pytest.mark.parametrize(
    ("key", "expected"),
    [("roatry_pct", "rotary_pct"), ("padding_id", "PADDING_ID"), ("streamingllm", "streamingLLM"), ("train_iter", "train_iters"), ("zzzz", None)],
)
def test_the_nearest_key_is_found_in_any_case(key: str, expected: str | None) -> None:
    assert nearest(key) == expected


def test_keys_are_case_sensitive(mistakes: Mistakes) -> None:
    assert mistakes({"Padding_ID": 0}) == ("run.yml:12: unknown key Padding_ID: did you mean PADDING_ID?",)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("moe-num-experts", 8, "experts"),
        ("attention-config", [[["mamba"], 4]], "'mamba', which is not offered"),
        ("attention-config", [[["rwkv"], "all"]], "'rwkv', which is not offered"),
        ("attention-config", [[["gmlp"], "all"]], "'gmlp', which is not offered"),
        ("attention-config", [[["global", "local"], 2]], "'local', which is not offered"),
        ("train_impl", "dpo", "DPO, KTO, RM or REINFORCE"),
        ("sparsity_config", {"block": 16}, "separator_token_ids or sliding_window_width"),
        ("te_layernorm_mlp", True, "Transformer Engine"),
        ("norm", "te_layernorm", "one of layernorm, rmsnorm"),
        ("autotuning", {"enabled": True}, "autotuning"),
        ("soft_prompt_tuning", {"enabled": True, "num_tokens": 10}, "soft prompts"),
        ("optimizer", {"type": "SM3", "params": {"lr": 0.1}}, "SM3 is not offered"),
        ("optimizer", {"type": "madgrad_wd", "params": {"lr": 0.1}}, "MADGRAD is not offered"),
        ("optimizer", {"type": "OneBitAdam", "params": {"lr": 0.1}}, "one-bit optimizers"),
        ("use_bnb_optimizer", True, "bitsandbytes"),
        ("use_comet", True, "tensorboard_dir"),
        ("s3_path", "s3://bucket", "copy `save`"),
        ("output_layer_parallelism", "row", "use column"),
        ("data_impl", "lazy", "use mmap"),
        ("dataset_impl", "pairwise", "use `gpt2`"),
        ("sparse_attention", {"mode": "fixed"}, "not offered"),
        ("curriculum_learning", {"enabled": True}, "DeepSpeed 0.19 has removed it"),
        ("amp", {"enabled": True}, "use fp16 or bf16"),
        ("elasticity", {"enabled": True}, "DeepSpeed 0.19 has removed it"),
        ("scheduler", {"type": "WarmupLR"}, "lr_decay_style"),
    ],
)
def test_what_is_refused_is_refused_by_name_with_the_remedy(key: str, value: object, words: str, mistakes: Mistakes) -> None:
    (mistake,) = mistakes({key: value})
    assert words in mistake
    assert mistake.startswith("run.yml:")


def test_refused_keys_that_ask_for_nothing_are_taken(resolve: Resolve) -> None:
    keys = {
        "moe_num_experts": 1,
        "train_impl": "normal",
        "sparsity_config": {},
        "use_bnb_optimizer": False,
        "s3_path": None,
        "output-layer-parallelism": "column",
    }
    assert resolve(keys).notes == resolve().notes


def test_saved_keys_that_repeat_a_result_must_agree(resolve: Resolve, mistakes: Mistakes) -> None:
    agreeing = {"batch_size": 2, "clip_grad": 1.0, "zero_stage": 0, "world_size": 1, "global_num_gpus": 1, "optimizer_type": "Adam", "Layer_num": 4}
    resolve(agreeing)
    (mistake,) = mistakes({"batch_size": 3})
    assert mistake == "run.yml:12: batch_size is 3 but the other keys and the devices make it 2: take batch_size out, or make them agree."
    assert "global_num_gpus is 4" in mistakes({"global_num_gpus": 4})[0]
