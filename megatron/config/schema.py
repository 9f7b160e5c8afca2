"""What a run is, in typed, frozen groups. Field names are the YAML keys of GPT-NeoX and SepLLM, except where `keys` says otherwise.

Everything here is resolved: derived values are filled in, contradictions were refused by the loader. Code takes the group it
needs, not the whole configuration.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from sepllm.pattern import AttentionPattern


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ConfigFile(Group):
    name: str
    """Base name of a file the user gave."""
    text: str
    """Its text, as it was. Saved with every checkpoint."""


class ModelConfig(Group):
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    """Key/value heads; equal to the heads unless grouped."""
    intermediate_size: int
    """Rows of linear2's input: the real width of the MLP after rounding and gating (GPT-NeoX's rule, spec of `model.mlp`)."""
    seq_length: int
    """Tokens of one sample."""
    max_position_embeddings: int
    norm: Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    """Of the chosen norm (`layernorm_epsilon`, `rms_norm_epsilon`, `scalenorm_epsilon`)."""
    layernorm_fusion: bool = True
    """The compiled operator (`sepllm.ops.layer_norm`) where the device has one that was tested and it is faster; false: plain torch."""
    use_qk_layernorm: bool = False
    pos_emb: Literal["rotary", "learned", "sinusoidal", "alibi", "rpe", "none"] = "learned"
    rotary_pct: float = 1.0
    """Fraction of each head's dimensions that is rotated."""
    rotary_emb_base: float = 10000.0
    rotary_save_freqs_buffer: bool = False
    """Keep `attention.rotary_emb.inv_freq` in checkpoints, as GPT-NeoX before 2023 did."""
    rope_fusion: bool = True
    """The compiled operator (`sepllm.ops.rotary`) where the device has one that was tested; false: plain torch."""
    rotary_angles: Literal["fp32", "fp16"] = "fp32"
    """fp16 repeats Pythia's own training, whose frequencies DeepSpeed had halved (coarse angles at far positions)."""
    opt_pos_emb_offset: int = 0
    """Added to the index into learned position embeddings."""
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    no_weight_tying: bool = False
    """True: an output matrix of its own. False: the word embeddings serve."""
    gpt_j_residual: bool = False
    """Parallel residual: x + attention(norm1(x)) + mlp(norm2(x))."""
    gpt_j_tied: bool = False
    """With the parallel residual, one norm for both branches."""
    activation: Literal["gelu", "gelu_tanh", "relu", "softsign", "swish", "mish", "silu", "geglu", "reglu", "swiglu", "bilinear", "glu"] = "gelu"
    """`gelu_tanh` is what `activation: gelu` with `bias_gelu_fusion: true` computes."""
    use_bias_in_attn_linear: bool = True
    use_bias_in_mlp: bool = True
    apply_query_key_layer_scaling: bool = False
    attention_softmax_in_fp32: bool = False
    fp16_lm_cross_entropy: bool = False
    init_method: str = "normal"
    output_layer_init_method: str = "scaled_normal"
    init_method_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    num_unique_layers: int | None = None
    """Fewer than `num_layers`: layers share parameters, in `param_sharing_style`."""
    param_sharing_style: Literal["grouped", "spaced"] = "grouped"
    vocab_size: int | None = None
    """Size of the tokenizer. None: not known yet (the tokenizer file is absent; only `--check` goes on)."""
    make_vocab_size_divisible_by: int = 128
    padded_vocab_size: int | None = None
    """Rows of the embedding: `vocab_size` rounded up to a multiple of `make_vocab_size_divisible_by` x `model_parallel_size`."""
    use_mup: bool = False
    mup_width_scale: float = 1.0
    mup_embedding_mult: float = 1.0
    mup_output_temp: float = 1.0
    mup_attn_temp: float = 1.0
    mup_rp_embedding_mult: float = 1.0
    use_bipe: bool = False
    """Bilevel positions (`USE_BiPE`)."""
    bipe_separator_ids: tuple[int, ...] = ()


class AttentionConfig(Group):
    prefill: AttentionPattern
    """Pattern of training and of prompts."""
    decode: AttentionPattern
    """Pattern of tokens generated after keys are cached."""
    core: str = "auto"
    """Which implementation computes it (`sepllm.attention.core_names()`); never changes the mathematics."""
    mode: Literal["full", "streaming", "sepllm", "self_adjust", "fixllm"]
    """What the YAML asked for, in a word; for logs and the converter."""
    print_kv_ratio: bool = False
    print_ratio_intervals: int = 8000
    """Forward passes (micro-batches) between two reports of the ratios."""
    reset_at_document_end: bool = False
    """Attention, initial tokens and positions start anew after each end-of-document token."""


class TokenizerConfig(Group):
    tokenizer_type: str = "GPT2BPETokenizer"
    vocab_file: str | None = None
    merge_file: str | None = None


class DataConfig(Group):
    data_path: str | None = None
    """One prefix, cut by `split`. Excludes the `*_data_paths`."""
    split: str = "969, 30, 1"
    train_data_paths: tuple[str, ...] | None = None
    valid_data_paths: tuple[str, ...] | None = None
    test_data_paths: tuple[str, ...] | None = None
    train_label_data_paths: tuple[str, ...] | None = None
    valid_label_data_paths: tuple[str, ...] | None = None
    test_label_data_paths: tuple[str, ...] | None = None
    train_data_weights: tuple[float, ...] | None = None
    valid_data_weights: tuple[float, ...] | None = None
    test_data_weights: tuple[float, ...] | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    allow_chopped: bool = True
    use_shared_fs: bool = True
    mmap_warmup: bool = False
    num_workers: int = 2
    remote_cache_gb: float = 10.0
    """Most that blocks of remote token files (`s3://...`) take on each machine's disk, in 1e9 bytes."""
    eod_mask_loss: bool = False


class OptimizerConfig(Group):
    type: str = "adam"
    """Lower case. `adam` is decoupled (AdamW), as in DeepSpeed."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    momentum: float = 0.0
    params: dict[str, JsonValue] = {}
    """Members of the block's `params` that none of the fields above holds."""


class ScheduleConfig(Group):
    lr: float
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    lr_decay_iters: int
    """Steps until the rate ends its descent (resolved: `lr_decay_iters`, else `lr_decay_fraction` of the run, else the run)."""
    warmup: float = 0.01
    """Fraction of `lr_decay_iters`."""
    lr_schedule_version: Literal["v1", "v2", "v3"] = "v3"
    """v1: GPT-NeoX until August 2023, what Pythia ran. v2: until May 2026, SepLLM's fork. v3: today's."""
    override_lr_scheduler: bool = False
    use_checkpoint_lr_scheduler: bool = False


class BatchConfig(Group):
    train_batch_size: int
    """Samples of one optimizer step, over all devices."""
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    data_parallel_size: int


class PrecisionConfig(Group):
    precision: Literal["fp32", "fp16", "bfloat16"] = "fp32"
    loss_scale: float = 0.0
    """0: dynamic. fp16 only, like the rest of this group."""
    loss_scale_window: int = 1000
    initial_scale_power: int = 16
    hysteresis: int = 2
    min_loss_scale: float = 1.0
    fp32_allreduce: bool = False


class ParallelConfig(Group):
    pipe_parallel_size: int = 0
    model_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    """Pieces that every sample is cut into, one a device."""
    pipe_partition_method: str = "type:transformer|mlp"
    zero_stage: int = 0
    zero_optimization: dict[str, JsonValue] = {}
    """The YAML's block, without members that DeepSpeed no longer takes."""


class TrainingConfig(Group):
    train_iters: int | None = None
    """Optimizer steps. Exactly one of this and `train_epochs` is set."""
    train_epochs: int | None = None
    seed: int = 1234
    eval_interval: int = 1000
    eval_iters: int = 100
    """Batches per evaluation."""
    exit_interval: int | None = None
    """Exit after a step that this divides, without saving."""
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1
    recompute_granularity: Literal["full", "selective"] = "full"
    """With `checkpoint_activations`: all of a layer is computed again, or only what is cheap (norms, activations)."""
    compile: bool = False
    """`torch.compile` builds the blocks. Worth it where a step is long and runs often: compiling takes minutes."""


class CheckpointConfig(Group):
    save: str | None = None
    load: str | None = None
    iteration: int | None = None
    """Which checkpoint of `load` to take. None: the newest complete one."""
    checkpoint_factor: float | None = None
    """Steps between checkpoints (linear) or the base of their powers (log)."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    extra_save_iters: tuple[int, ...] = ()
    keep_last_n_checkpoints: int | None = None
    """Older ones are deleted, those of `extra_save_iters` never."""
    finetune: bool = False
    """Take the weights only and start at iteration 0."""
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_rng: bool = False
    row_biases: Literal["summed", "copied"] = "summed"
    """What the tensor-parallel pieces of another program's checkpoint hold under the parallel residual, as biases of `attention.dense` and
    `mlp.linear2`: addends, as GPT-NeoX saves them, or copies of the whole."""
    allow_fresh_start: bool = False
    """Start from nothing where `load` holds no checkpoint; otherwise that is an error."""
    checkpoint_validation_with_forward_pass: bool = False


class LoggingConfig(Group):
    log_interval: int = 100
    """Steps between console lines."""
    steps_per_print: int = 10
    wall_clock_breakdown: bool = False
    log_dir: str | None = None
    metrics_file: str | None = None
    """JSON lines, one object a step: every metric under its dashboard name. None: `<save>/metrics.jsonl` where `save` is set."""
    tensorboard_dir: str | None = None
    use_wandb: bool = False
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    wandb_project: str = "neox"
    wandb_group: str | None = None
    wandb_run_name: str | None = None
    wandb_team: str | None = None
    wandb_host: str = "https://api.wandb.ai"
    wandb_init_all_ranks: bool = False
    peak_theoretical_tflops: float | None = None
    """Of one device; turns on the MFU and HFU figures."""
    log_param_norm: bool = False
    log_grad_norm: bool = False
    log_grad_pct_zeros: bool = False
    log_optimizer_states: bool = False
    char_level_ppl: bool = False
    progress_bar: bool = False
    """A bar with loss, tokens/s and time left on the first rank's terminal."""


class LaunchConfig(Group):
    launcher: str = "pdsh"
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int | None = None
    num_gpus: int | None = None
    master_port: int = 29500
    master_addr: str | None = None
    force_multi: bool = False
    no_ssh_check: bool = False
    deepspeed_slurm: bool = False
    deepspeed_mpi: bool = False
    distributed_backend: str = "nccl"
    """On a machine without a GPU this is gloo, whatever the YAML says."""
    launcher_args: str = ""


class GenerationConfig(Group):
    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] = "unconditional"
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 0.0
    """0: off."""
    maximum_tokens: int = 64
    prompt_end: str = "\n"
    num_samples: int = 1
    recompute: bool = False
    """True: no KV cache."""
    return_logits: bool = False
    sample_input_file: str | None = None
    sample_output_file: str = "samples.txt"


class EvaluationConfig(Group):
    eval_tasks: tuple[str, ...] | None = None
    eval_results_prefix: str = ""
    eval_num_fewshot: int | None = None
    eval_limit: float | None = None
    eval_batch_size: int | None = None
    eval_task_path: str | None = None
    """Folder with further task files."""


class RuntimeConfig(Group):
    world_size: int
    """Devices that this configuration was resolved for."""
    device: Literal["cuda", "cpu"]


class Config(Group):
    """One resolved run."""

    model: ModelConfig
    attention: AttentionConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    launch: LaunchConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig
    runtime: RuntimeConfig
    deepspeed: dict[str, JsonValue] = {}
    """Members of the DeepSpeed configuration that pass through: activation_checkpointing, comms_logger, flops_profiler, ..."""
    files: tuple[ConfigFile, ...] = ()
    overrides: dict[str, JsonValue] = {}
    """What the command line changed (`--set` and the flags that stand for a key), by key. Saved with every checkpoint, like the files."""
