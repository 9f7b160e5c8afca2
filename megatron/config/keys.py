"""Every flat YAML key: which field of which group it ends in, or why it has no effect, or why it is refused.

This is the only place that knows a legacy name. A key that would change the result is never inert.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pydantic import JsonValue

from megatron.config.values import (
    ANYTHING,
    BLOCK,
    COUNT,
    FLAG,
    FRACTION,
    NOT_NEGATIVE,
    NUMBER,
    PORT,
    PREFIX,
    SIZE,
    SIZES,
    TEXT,
    TEXTS,
    WEIGHTS,
    WHOLE,
    WHOLES,
    Kind,
    choice,
    number,
    whole,
    words,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Honoured:
    """The key decides `Config.<group>.<field>`."""

    group: str
    field: str
    kind: Kind
    is_copied: bool
    """True: the value is the field. False: the field is worked out from it (and others) in `resolve` or `pattern`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inert:
    """The key is accepted and listed; it changes no result."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The key asks for something that is not offered. Values in `accepted` (and null) ask for nothing and are taken in silence."""

    reason: str
    accepted: tuple[JsonValue, ...] = (False,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """The key repeats what other keys decide, as saved configurations do: it must agree with `Config.<group>.<field>`."""

    group: str
    field: str
    kind: Kind


Rule = Honoured | Inert | Refused | Confirmed

ALIASES: dict[str, str] = {"gas": "gradient_accumulation_steps", "save_interval": "checkpoint_factor"}
"""Old name -> the name of today."""

INITIALISATIONS = (
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
)
ACTIVATIONS = ("gelu", "relu", "softsign", "swish", "mish", "silu", "geglu", "reglu", "swiglu", "bilinear", "glu")
GATED_ACTIVATIONS = ("geglu", "reglu", "swiglu", "bilinear", "glu")
CORES = ("auto", "dense", "sdpa", "chunked", "native", "flex", "fused_triton")
TOKENIZERS = ("GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer", "CharLevelTokenizer", "TiktokenTokenizer")
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm", "torchrun")


def _copied(group: str, **kinds: Kind) -> dict[str, Rule]:
    return {key: Honoured(group=group, field=key, kind=kind, is_copied=True) for key, kind in kinds.items()}


def _worked_out(group: str, field: str, **kinds: Kind) -> dict[str, Rule]:
    return {key: Honoured(group=group, field=field, kind=kind, is_copied=False) for key, kind in kinds.items()}


def _inert(reason: str, keys: str) -> dict[str, Rule]:
    return {key: Inert(reason=reason) for key in words(keys)}


def _refused(reason: str, keys: str, *, accepted: tuple[JsonValue, ...] = (False,)) -> dict[str, Rule]:
    return {key: Refused(reason=reason, accepted=accepted) for key in words(keys)}


def _confirmed(group: str, field: str, **kinds: Kind) -> dict[str, Rule]:
    return {key: Confirmed(group=group, field=field, kind=kind) for key, kind in kinds.items()}


_MODEL: dict[str, Rule] = {
    **_copied(
        "model",
        num_layers=COUNT,
        hidden_size=COUNT,
        num_attention_heads=COUNT,
        seq_length=COUNT,
        max_position_embeddings=COUNT,
        norm=choice("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"),
        use_qk_layernorm=FLAG,
        pos_emb=choice("rotary", "learned", "sinusoidal", "alibi", "rpe", "none"),
        rotary_pct=FRACTION,
        rotary_emb_base=number(minimum=1),
        rotary_save_freqs_buffer=FLAG,
        rotary_angles=choice("fp32", "fp16"),
        opt_pos_emb_offset=SIZE,
        rpe_num_buckets=COUNT,
        rpe_max_distance=COUNT,
        no_weight_tying=FLAG,
        gpt_j_residual=FLAG,
        gpt_j_tied=FLAG,
        use_bias_in_attn_linear=FLAG,
        use_bias_in_mlp=FLAG,
        apply_query_key_layer_scaling=FLAG,
        attention_softmax_in_fp32=FLAG,
        fp16_lm_cross_entropy=FLAG,
        init_method=choice(*INITIALISATIONS),
        output_layer_init_method=choice(*INITIALISATIONS),
        init_method_std=NOT_NEGATIVE,
        hidden_dropout=FRACTION,
        attention_dropout=FRACTION,
        num_unique_layers=COUNT,
        param_sharing_style=choice("grouped", "spaced"),
        make_vocab_size_divisible_by=COUNT,
        use_mup=FLAG,
        mup_width_scale=NUMBER,
        mup_embedding_mult=NUMBER,
        mup_output_temp=NUMBER,
        mup_attn_temp=NUMBER,
        mup_rp_embedding_mult=NUMBER,
        rope_fusion=FLAG,
        layernorm_fusion=FLAG,
    ),
    **_worked_out("model", "num_kv_heads", num_kv_heads=COUNT),
    **_worked_out("model", "intermediate_size", intermediate_size=COUNT, expansion_factor=number(minimum=0), mlp_multiple_of=COUNT),
    **_worked_out("model", "activation", activation=choice(*ACTIVATIONS), bias_gelu_fusion=FLAG),
    **_worked_out("model", "padded_vocab_size", padded_vocab_size=COUNT),
    **_worked_out("model", "norm_epsilon", layernorm_epsilon=NOT_NEGATIVE, rms_norm_epsilon=NOT_NEGATIVE, scalenorm_epsilon=NOT_NEGATIVE),
    **_worked_out("model", "use_bipe", USE_BiPE=FLAG),
    **_worked_out("model", "bipe_separator_ids", BiPE_seps=WHOLES),
}

_ATTENTION: dict[str, Rule] = {
    **_copied("attention", core=choice(*CORES), print_ratio_intervals=COUNT),
    **_worked_out("attention", "print_kv_ratio", PRINT_KV_RATIO=FLAG),
    **_worked_out("attention", "reset_at_document_end", reset_attention_mask=FLAG),
    **_worked_out(
        "attention",
        "mode",
        USE_ORIGINAL_FULL_ATTEN=FLAG,
        streamingLLM=FLAG,
        USE_SEP_ATTN_KERNEL_ACCELERATOR=FLAG,
        USE_SA_SOFTMAX=FLAG,
        USE_SA_SOFTMAX_NO_DENO=FLAG,
        USE_FIXED_SEP_INTERVALs=FLAG,
    ),
    **_worked_out(
        "attention",
        "prefill",
        separator_token_ids=WHOLES,
        PADDING_ID=SIZE,
        init_tok_max_idx=whole(minimum=-1),
        prefill_local_window_size=COUNT,
        USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS=FLAG,
        prefill_loc_win_size_list=WHOLES,
        fixed_sep_intervals_list=WHOLES,
        sliding_window_width=SIZE,
        BATCH_ADAPTIVE_INIT_POS=FLAG,
        EXCLUDE_DIAGONAL=FLAG,
        reference_padding=FLAG,
        SA_Numerator_Bias=NUMBER,
        SA_Denominator_Bias=NUMBER,
        SA_Extremes=choice("read", "causal"),
        attention_config=ANYTHING,
    ),
    **_worked_out(
        "attention",
        "decode",
        generate_local_window_size=COUNT,
        USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS=FLAG,
        generate_win_loc_size_list=WHOLES,
    ),
}

_DATA: dict[str, Rule] = {
    **_copied(
        "data",
        data_path=PREFIX,
        split=TEXT,
        train_data_paths=TEXTS,
        valid_data_paths=TEXTS,
        test_data_paths=TEXTS,
        train_label_data_paths=TEXTS,
        valid_label_data_paths=TEXTS,
        test_label_data_paths=TEXTS,
        train_data_weights=WEIGHTS,
        valid_data_weights=WEIGHTS,
        test_data_weights=WEIGHTS,
        weight_by_num_documents=FLAG,
        weighted_sampler_alpha=NUMBER,
        pack_impl=choice("packed", "pack_until_overflow", "unpacked"),
        allow_chopped=FLAG,
        use_shared_fs=FLAG,
        mmap_warmup=FLAG,
        num_workers=SIZE,
        remote_cache_gb=NOT_NEGATIVE,
        eod_mask_loss=FLAG,
    ),
    **_copied("tokenizer", tokenizer_type=choice(*TOKENIZERS), vocab_file=TEXT, merge_file=TEXT),
}

_TRAINING: dict[str, Rule] = {
    **_worked_out("optimizer", "type", optimizer=BLOCK),
    **_worked_out("optimizer", "weight_decay", weight_decay=NOT_NEGATIVE),
    **_worked_out("schedule", "lr", lr=NOT_NEGATIVE),
    **_worked_out("schedule", "lr_decay_iters", lr_decay_iters=COUNT, lr_decay_fraction=FRACTION),
    **_copied("optimizer", gradient_clipping=NOT_NEGATIVE),
    **_copied(
        "schedule",
        min_lr=NOT_NEGATIVE,
        lr_decay_style=choice("constant", "linear", "cosine", "exponential"),
        warmup=FRACTION,
        lr_schedule_version=choice("v1", "v2", "v3"),
        override_lr_scheduler=FLAG,
        use_checkpoint_lr_scheduler=FLAG,
    ),
    **_worked_out("batch", "train_batch_size", train_batch_size=COUNT),
    **_worked_out("batch", "train_micro_batch_size_per_gpu", train_micro_batch_size_per_gpu=COUNT),
    **_worked_out("batch", "gradient_accumulation_steps", gradient_accumulation_steps=COUNT),
    **_worked_out("precision", "precision", precision=choice("fp32", "fp16", "bfloat16"), fp16=BLOCK, bf16=BLOCK),
    **_worked_out("precision", "loss_scale", loss_scale=NOT_NEGATIVE),
    **_worked_out("precision", "loss_scale_window", loss_scale_window=COUNT),
    **_worked_out("precision", "hysteresis", hysteresis=COUNT),
    **_worked_out("precision", "min_loss_scale", min_scale=SIZE),
    **_copied("precision", fp32_allreduce=FLAG),
    **_copied(
        "parallel",
        pipe_parallel_size=SIZE,
        model_parallel_size=COUNT,
        sequence_parallel=FLAG,
        context_parallel_size=COUNT,
        pipe_partition_method=TEXT,
    ),
    **_worked_out("parallel", "zero_optimization", zero_optimization=BLOCK),
    **_copied(
        "training",
        train_iters=SIZE,
        train_epochs=COUNT,
        seed=whole(minimum=0, maximum=2**32 - 1),
        eval_interval=COUNT,
        eval_iters=SIZE,
        exit_interval=COUNT,
        checkpoint_activations=FLAG,
        checkpoint_num_layers=COUNT,
        recompute_granularity=choice("full", "selective"),
        compile=FLAG,
    ),
    **_copied(
        "checkpoint",
        save=TEXT,
        load=TEXT,
        iteration=SIZE,
        checkpoint_factor=number(minimum=1),
        checkpoint_scale=choice("linear", "log"),
        extra_save_iters=SIZES,
        keep_last_n_checkpoints=COUNT,
        finetune=FLAG,
        no_load_optim=FLAG,
        no_load_rng=FLAG,
        no_save_rng=FLAG,
        row_biases=choice("summed", "copied"),
        allow_fresh_start=FLAG,
        checkpoint_validation_with_forward_pass=FLAG,
    ),
}

_LOGGING: dict[str, Rule] = _copied(
    "logging",
    log_interval=COUNT,
    steps_per_print=COUNT,
    wall_clock_breakdown=FLAG,
    log_dir=TEXT,
    metrics_file=TEXT,
    tensorboard_dir=TEXT,
    use_wandb=FLAG,
    wandb_mode=choice("online", "offline", "disabled"),
    wandb_project=TEXT,
    wandb_group=TEXT,
    wandb_run_name=TEXT,
    wandb_team=TEXT,
    wandb_host=TEXT,
    wandb_init_all_ranks=FLAG,
    peak_theoretical_tflops=NOT_NEGATIVE,
    log_param_norm=FLAG,
    log_grad_norm=FLAG,
    log_grad_pct_zeros=FLAG,
    log_optimizer_states=FLAG,
    char_level_ppl=FLAG,
    progress_bar=FLAG,
)

_LAUNCH: dict[str, Rule] = {
    **_copied(
        "launch",
        launcher=choice(*LAUNCHERS),
        hostfile=TEXT,
        include=TEXT,
        exclude=TEXT,
        num_nodes=WHOLE,
        num_gpus=WHOLE,
        master_port=PORT,
        master_addr=TEXT,
        force_multi=FLAG,
        no_ssh_check=FLAG,
        deepspeed_slurm=FLAG,
        deepspeed_mpi=FLAG,
        distributed_backend=TEXT,
    ),
    **_worked_out("launch", "launcher_args", launcher_args=TEXT, account=TEXT, comment=TEXT),
}

_AFTERWARDS: dict[str, Rule] = {
    **_copied(
        "generation",
        temperature=NOT_NEGATIVE,
        top_k=SIZE,
        top_p=FRACTION,
        maximum_tokens=COUNT,
        prompt_end=TEXT,
        num_samples=COUNT,
        recompute=FLAG,
        return_logits=FLAG,
        sample_input_file=TEXT,
        sample_output_file=TEXT,
    ),
    **_worked_out("generation", "text_gen_type", text_gen_type=choice("unconditional", "input-file", "interactive", "precompute")),
    **_copied(
        "evaluation",
        eval_tasks=TEXTS,
        eval_results_prefix=TEXT,
        eval_num_fewshot=SIZE,
        eval_limit=NOT_NEGATIVE,
        eval_batch_size=COUNT,
        eval_task_path=TEXT,
    ),
}

_ENGINE: dict[str, Rule] = {
    **_worked_out(
        "deepspeed",
        "activation_checkpointing",
        partition_activations=FLAG,
        synchronize_each_layer=FLAG,
        contiguous_checkpointing=FLAG,
        checkpoint_in_cpu=FLAG,
        profile_backward=FLAG,
    ),
    **{
        key: Honoured(group="deepspeed", field=key, kind=kind, is_copied=True)
        for key, kind in {
            "prescale_gradients": FLAG,
            "gradient_predivide_factor": NUMBER,
            "communication_data_type": TEXT,
            "zero_allow_untested_optimizer": FLAG,
            "dump_state": FLAG,
            "flops_profiler": BLOCK,
            "activation_checkpointing": BLOCK,
            "comms_logger": BLOCK,
            "tensorboard": BLOCK,
            "wandb": BLOCK,
            "csv_monitor": BLOCK,
            "checkpoint": BLOCK,
            "data_types": BLOCK,
            "data_efficiency": BLOCK,
        }.items()
    },
    **_worked_out("deepspeed", "*", deepspeed_extra_args=BLOCK),
}

_CONFIRMED: dict[str, Rule] = {
    **_confirmed("batch", "train_micro_batch_size_per_gpu", batch_size=COUNT),
    **_confirmed("optimizer", "gradient_clipping", clip_grad=NOT_NEGATIVE),
    **_confirmed("optimizer", "type", optimizer_type=TEXT),
    **_confirmed("parallel", "zero_stage", zero_stage=SIZE),
    **_confirmed("runtime", "world_size", world_size=COUNT, global_num_gpus=COUNT),
    **_confirmed("model", "num_layers", Layer_num=COUNT),
}

_INERT: dict[str, Rule] = {
    **_inert(
        "the attention and norm kernels are chosen by `core` and by the device; the mathematics is the same",
        "scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion rmsnorm_fusion bias_dropout_fusion detect_nvlink_pairs",
    ),
    **_inert(
        "block masks are written in closed form for each batch, in the kernel's own block size, and no batch compiles anything anew",
        "RECOMPILE_SEP_ATTN_KERNEL _DEFAULT_SPARSE_BLOCK_SIZE",
    ),
    **_inert("initial weights never depend on the parallel layout here", "use_cpu_initialization"),
    **_inert("GPT-NeoX and SepLLM declare it and never read it", "no_save_optim use_bias_in_norms prefill_k generate_k gmlp_attn_dim"),
    **_inert(
        "saved configurations carry it; it is worked out anew",
        "save_iters is_pipe_parallel dynamic_loss_scale params_dtype do_train do_valid do_test",
    ),
    **_inert("saved configurations carry it; it describes the run that saved it", "user_script config_files git_hash rank local_rank"),
    **_inert(
        "set the member of the same name inside the zero_optimization block, which decides",
        "zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size",
    ),
    **_inert("DeepSpeed is always the engine", "deepspeed deepscale deepscale_config deepspeed_activation_checkpointing lazy_mpu_init"),
    **_inert("GPT-NeoX never starts it; SIGTERM saves and exits instead", "adlr_autoresume adlr_autoresume_interval"),
    **_inert("nothing of this project reads it", "short_seq_prob onnx_safe"),
    **_inert(
        "the gradient noise scale is not computed (GPT-NeoX's own code for it does not run)",
        "log_gradient_noise_scale gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload",
    ),
    **_inert(
        "no profiler is built in; wall_clock_breakdown and flops_profiler are",
        "profile profile_step_start profile_step_stop memory_profiling memory_profiling_path",
    ),
    **_inert(
        "only experts, which are refused, read it",
        " ".join(
            f"moe_{name}"
            for name in words(
                "expert_interval top_k router_type lbl_in_fp32 loss_coeff aux_loss_coeff z_loss_coeff use_residual jitter_eps min_capacity "
                "token_dropping train_capacity_factor eval_capacity_factor capacity_factor create_moe_param_group type glu expert_parallel_size"
            )
        )
        + " enable_expert_tensor_parallelism expert_interval",
    ),
    **_inert(
        "only preference training, which is refused, reads it",
        "dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight kto_beta kl_impl kl_div_beta z_loss "
        "fp32_reinforce reinforce_leave_one_out",
    ),
    **_inert(
        "only Mamba and RWKV layers, which are refused, read it",
        "mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params mamba_use_bias_in_conv "
        "mamba_use_bias_in_linears dim_att head_size ffn_dim",
    ),
    **_inert("only muP's set-up runs read it", "coord_check save_base_shapes base_shapes_file mup_init_scale"),
}

_REMOVED_FROM_DEEPSPEED = "DeepSpeed 0.19 has removed it: take the key out"
_REFUSED: dict[str, Rule] = {
    **_refused("mixtures of experts are not offered: leave it at 1", "moe_num_experts num_experts", accepted=(1, 0)),
    **_refused(
        "Transformer Engine is not offered: take the key out",
        "te_columnparallel te_rowparallel te_layernorm_mlp te_mha te_fp8_format te_fp8_wgrad te_fp8_amax_history_len te_fp8_amax_compute_algo "
        "te_fp8_margin te_fp8_mha",
    ),
    **_refused(
        "only pretraining and fine-tuning on tokens are offered (no DPO, KTO, RM or REINFORCE): use `normal`", "train_impl", accepted=("normal",)
    ),
    **_refused("only plain token data are offered (no preference or online data): use `gpt2`", "dataset_impl", accepted=("gpt2",)),
    **_refused(
        "preference training is not offered: use train_data_paths (with train_label_data_paths for masked text)",
        "train_reward_data_paths valid_reward_data_paths test_reward_data_paths pos_train_data_paths pos_valid_data_paths pos_test_data_paths "
        "neg_train_data_paths neg_valid_data_paths neg_test_data_paths pos_train_label_data_paths pos_valid_label_data_paths "
        "pos_test_label_data_paths neg_train_label_data_paths neg_valid_label_data_paths neg_test_label_data_paths precompute_model_name",
        accepted=(False, []),
    ),
    **_refused(
        "the legacy sparse attention kernels are not offered: use SepLLM's separator_token_ids or sliding_window_width",
        "sparsity_config sparse_attention",
        accepted=(False, {}),
    ),
    **_refused("soft prompts are not offered: take the key out", "soft_prompt_tuning", accepted=(False, {}, {"enabled": False})),
    **_refused(
        "GPT-NeoX has it no more: write LLaMA's MLP as activation: swiglu, with intermediate_size three times its width",
        "mlp_type",
        accepted=("regular",),
    ),
    **_refused("bitsandbytes is not offered: use optimizer.type Adam, with ZeRO to save memory", "use_bnb_optimizer"),
    **_refused(
        "Comet is not offered: use use_wandb, tensorboard_dir or metrics_file",
        "use_comet comet_workspace comet_project comet_experiment_name comet_tags comet_others",
    ),
    **_refused("checkpoints are not uploaded: copy `save` after the run", "s3_path s3_chunk_size s3_sync_interval"),
    **_refused(
        "DeepSpeed's autotuning is not offered: `--check` estimates memory", "autotuning autotuning_run", accepted=(False, {}, {"enabled": False})
    ),
    **_refused(
        "it has been removed (a row-parallel output layer is wrong in GPT-NeoX): use column",
        "output_layer_parallelism",
        accepted=("column",),
    ),
    **_refused("only the .bin/.idx pair is read: use mmap, and convert older files", "data_impl", accepted=("mmap", "infer")),
    **_refused("the rate follows lr_decay_style, warmup and min_lr: take the DeepSpeed scheduler out", "scheduler"),
    **_refused("DeepSpeed 0.19 has removed apex AMP: use fp16 or bf16", "amp", accepted=(False, {}, {"enabled": False})),
    **_refused(
        _REMOVED_FROM_DEEPSPEED,
        "curriculum_learning elasticity sparse_gradients compression_training eigenvalue nebula quantize_training progressive_layer_drop "
        "graph_harvesting",
        accepted=(False, {}, {"enabled": False}),
    ),
}

KEYS: dict[str, Rule] = {
    **_MODEL,
    **_ATTENTION,
    **_DATA,
    **_TRAINING,
    **_LOGGING,
    **_LAUNCH,
    **_AFTERWARDS,
    **_ENGINE,
    **_CONFIRMED,
    **_INERT,
    **_REFUSED,
}
"""Canonical key -> what becomes of it."""

DEEPSPEED_BLOCKS = frozenset(
    words(
        "activation_checkpointing aio checkpoint comms_logger communication_data_type compile csv_monitor data_efficiency data_types "
        "dataloader_drop_last disable_allgather disable_python_gc dump_state flops_profiler gradient_allreduce_op gradient_predivide_factor "
        "hybrid_engine log_level memory_breakdown pipeline prescale_gradients seq_parallel_communication_data_type tensor_parallel tensorboard "
        "torch_autocast use_data_before_expert_parallelism wandb weight_quantization zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer"
    )
)
"""Members of a DeepSpeed configuration that `deepspeed_extra_args` may hold. DeepSpeed itself takes unknown names in silence."""


def canonical(key: str) -> str:
    """Today's name of a top-level key: hyphens are underscores, old names are mapped."""
    name = key.replace("-", "_")
    return ALIASES.get(name, name)


def nearest(key: str, known: list[str] | None = None) -> str | None:
    """The known key most like this one, upper and lower case aside."""
    by_lower = {name.lower(): name for name in (known if known is not None else [*KEYS, *ALIASES])}
    matches = difflib.get_close_matches(key.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
