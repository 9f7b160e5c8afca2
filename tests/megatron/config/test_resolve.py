"""GPT-NeoX's derivations: widths, vocabularies, optimizer, schedule, precision, and what passes through to DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.config.loader import LoadedConfig
from megatron.config.optimizer import OPTIMIZERS
from megatron.config.resolve import mlp_width
from megatron.config.schema import OptimizerConfig

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]
ADAM = {"type": "Adam", "params": {"lr": 0.001}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 256),
        ({"intermediate_size": 101}, 102),
        ({"intermediate_size": 100, "multiple_of": 16}, 128),
        ({"expansion_factor": 2.5}, 160),
        ({"intermediate_size": 40960, "multiple_of": 256, "is_gated": True}, 13824),
        ({"intermediate_size": 192, "is_gated": True}, 64),
        ({"is_gated": True}, 85),
    ],
)
def test_mlp_width_follows_gpt_neoxs_rule(options: dict[str, object], expected: int) -> None:
    defaults = {"hidden_size": 64, "intermediate_size": None, "expansion_factor": None, "multiple_of": 1, "is_gated": False}
    assert mlp_width(**(defaults | options)) == expected  # type: ignore[arg-type]


def test_a_gated_activation_makes_the_width_a_third(resolve: Resolve) -> None:
    assert resolve({"activation": "SwiGLU", "intermediate_size": 192}).config.model.intermediate_size == 64
    assert resolve().config.model.intermediate_size == 256


@pytest.mark.parametrize(("size", "shards", "padded"), [(50277, 1, 50304), (50277, 2, 50432), (50277, 4, 50688), (50304, 1, 50304)])
def test_the_vocabulary_is_padded_for_its_shards(size: int, shards: int, padded: int, resolve: Resolve) -> None:
    model = resolve({"model_parallel_size": shards}, world_size=4, vocab_size=size).config.model
    assert (model.vocab_size, model.padded_vocab_size) == (size, padded)


def test_a_saved_padded_vocabulary_is_kept(resolve: Resolve) -> None:
    assert resolve({"padded_vocab_size": 50432}, vocab_size=50277).config.model.padded_vocab_size == 50432


@pytest.mark.parametrize(
    ("keys", "activation"), [({}, "gelu"), ({"bias-gelu-fusion": True}, "gelu_tanh"), ({"bias-gelu-fusion": True, "activation": "relu"}, "relu")]
)
def test_the_fused_gelu_is_the_tanh_one(keys: dict[str, object], activation: str, resolve: Resolve) -> None:
    assert resolve(keys).config.model.activation == activation


@pytest.mark.parametrize(("norm", "epsilon"), [("layernorm", 1e-5), ("rmsnorm", 1e-8), ("scalenorm", 1e-8), ("non_parametric_layernorm", 1e-5)])
def test_each_norm_has_its_epsilon(norm: str, epsilon: float, resolve: Resolve) -> None:
    assert resolve({"norm": norm}).config.model.norm_epsilon == epsilon
    given = {"layernorm_epsilon": 0.1, "rms_norm_epsilon": 0.2, "scalenorm_epsilon": 0.3}
    assert resolve({"norm": norm, **given}).config.model.norm_epsilon == {"rmsnorm": 0.2, "scalenorm": 0.3}.get(norm, 0.1)


def test_heads_share_keys_only_when_asked(resolve: Resolve) -> None:
    assert resolve().config.model.num_kv_heads == 4
    assert resolve({"num_kv_heads": 2}).config.model.num_kv_heads == 2


def test_every_optimizer_of_the_table_can_be_built() -> None:
    torch = pytest.importorskip("torch")
    build = pytest.importorskip("megatron.optim.build")
    for kind, extra in OPTIMIZERS.items():
        config = OptimizerConfig(type=kind, params=dict.fromkeys(extra, False))
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0}]
        assert isinstance(build.build_optimizer(groups, config, torch.device("cpu"), lr=0.1), torch.optim.Optimizer)


def test_without_an_optimizer_block_it_is_gpt_neoxs_adam(resolve: Resolve) -> None:
    loaded = resolve(without=("optimizer",))
    optimizer = loaded.config.optimizer
    assert (optimizer.type, optimizer.betas, optimizer.eps, optimizer.weight_decay) == ("adam", (0.9, 0.999), 1e-8, 0.0)
    assert loaded.config.schedule.lr == 1e-3
    assert any("the learning rate is GPT-NeoX's default" in note for note in loaded.notes)


def test_the_optimizer_block_is_split_into_fields(resolve: Resolve) -> None:
    block = {"type": "AdamW", "params": {"lr": "6e-4", "betas": [0.9, "95e-2"], "eps": "1e-8", "adam_w_mode": False}}
    config = resolve({"optimizer": block, "weight-decay": 0.01}).config
    assert (config.optimizer.type, config.optimizer.betas, config.optimizer.eps) == ("adamw", (0.9, 0.95), 1e-8)
    assert (config.optimizer.weight_decay, config.optimizer.params, config.schedule.lr) == (0.01, {"adam_w_mode": False}, 6e-4)


def test_weight_decay_is_a_tenth_unless_given_in_either_place(resolve: Resolve) -> None:
    assert resolve().config.optimizer.weight_decay == 0.1
    assert resolve({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0}}}).config.optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"optimizer": {"type": "Adan", "params": {"lr": 0.1}}}, "give one of adam, adamw"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}, "optimizer.params.lr is 'fast': give a number."),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "beta": 0.9}}}, "unknown member optimizer.params.beta: did you mean betas?"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "betas": [0.9]}}}, "give two numbers"),
        ({"optimizer": {"type": "Adam", "params": 0.1}}, "optimizer.params is no block"),
        ({"optimizer": {"kind": "Adam"}}, "unknown member optimizer.kind"),
        ({"optimizer": ADAM, "lr": 0.1}, "lr (0.1) and optimizer.params.lr (0.001) differ"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.2}}, "weight-decay": 0.1}, "differ: give one of them"),
    ],
)
def test_optimizer_mistakes(keys: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes(keys))


@pytest.mark.parametrize(
    ("keys", "steps"), [({}, 100), ({"lr-decay-iters": 70}, 70), ({"lr_decay_fraction": 0.555}, 55), ({"lr_decay_fraction": 0.001}, 1)]
)
def test_the_schedule_lasts_as_long_as_the_run_unless_told(keys: dict[str, object], steps: int, resolve: Resolve) -> None:
    assert resolve(keys).config.schedule.lr_decay_iters == steps


def test_epochs_need_the_schedules_length(resolve: Resolve, mistakes: Mistakes) -> None:
    (mistake,) = mistakes({"train_epochs": 2}, without=("train-iters",))
    assert "give lr_decay_iters" in mistake
    training = resolve({"train_epochs": 2, "lr_decay_iters": 50}, without=("train-iters",)).config.training
    assert (training.train_iters, training.train_epochs) == (None, 2)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"precision": "BFloat16"}, "bfloat16"),
        ({"precision": "fp16"}, "fp16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": True}, "precision": "fp16"}, "fp16"),
        ({"fp16": {"fp16": True}}, "fp32"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bfloat16"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bfloat16"),
    ],
)
def test_precision_is_the_enabled_block_else_the_key_else_fp32(keys: dict[str, object], precision: str, resolve: Resolve) -> None:
    assert resolve(keys).config.precision.precision == precision


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled (true) and bf16.enabled (true) contradict"),
        ({"fp16": {"enabled": True}, "precision": "bfloat16"}, "fp16.enabled (true) and precision (bfloat16) contradict"),
        ({"bf16": {"enabled": True}, "precision": "fp32"}, "--set fp16.enabled=false"),
        ({"fp16": {"enabled": "maybe"}}, "fp16.enabled is 'maybe': give true or false."),
        ({"fp16": {"enabled": True, "hysteresis": "two"}}, "fp16.hysteresis is 'two': give a whole number"),
        ({"fp16": {"enabled": True, "initial_scale_powr": 12}}, "did you mean fp16.initial_scale_power?"),
        ({"fp16": {"enabled": True, "loss_scale": 0}, "loss_scale": 128}, "loss_scale (128) and fp16.loss_scale (0) differ"),
        ({"fp16": True}, "give a block in braces"),
        ({"fp16": {"enabled": False}, "precision": "fp16"}, "precision is fp16 and fp16.enabled is false"),
    ],
)
def test_precision_mistakes(keys: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes(keys))


def test_a_block_that_is_not_enabled_is_noted(resolve: Resolve) -> None:
    assert any("the fp16 block has no `enabled: true`" in note for note in resolve({"fp16": {"fp16": True}}).notes)


def test_loss_scale_comes_from_the_block_or_from_the_top(resolve: Resolve) -> None:
    block = {"enabled": True, "loss_scale_window": 500, "initial_scale_power": 12, "hysteresis": 3, "min_loss_scale": 2}
    precision = resolve({"fp16": block}).config.precision
    assert (precision.loss_scale, precision.loss_scale_window, precision.initial_scale_power) == (0.0, 500, 12)
    assert (precision.hysteresis, precision.min_loss_scale) == (3, 2.0)
    top = resolve({"precision": "fp16", "loss_scale": 128, "min_scale": 4, "loss_scale_window": 50, "hysteresis": 1}).config.precision
    assert (top.loss_scale, top.min_loss_scale, top.loss_scale_window, top.hysteresis) == (128.0, 4.0, 50, 1)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"stage": 4}, "zero_optimization.stage is 4: give 0, 1, 2 or 3."),
        ({"stge": 1}, "did you mean zero_optimization.stage?"),
        ({"stage": True}, "give 0, 1, 2 or 3"),
    ],
)
def test_zero_mistakes(block: dict[str, object], words: str, mistakes: Mistakes) -> None:
    assert words in "\n".join(mistakes({"zero_optimization": block}))


def test_generation_reads_the_input_file_when_there_is_one(resolve: Resolve) -> None:
    assert resolve().config.generation.text_gen_type == "unconditional"
    assert resolve({"sample_input_file": "prompts.txt"}).config.generation.text_gen_type == "input-file"
    assert resolve({"sample_input_file": "prompts.txt", "text_gen_type": "interactive"}).config.generation.text_gen_type == "interactive"


def test_a_whole_number_may_be_written_with_an_exponent(resolve: Resolve) -> None:
    assert resolve({"train-iters": "1e3"}).config.training.train_iters == 1000


def test_document_resets_and_other_new_keys_arrive(resolve: Resolve) -> None:
    config = resolve({"reset_attention_mask": True, "rotary_angles": "fp16", "lr_schedule_version": "v1", "allow_fresh_start": True}).config
    assert config.attention.reset_at_document_end
    assert (config.model.rotary_angles, config.schedule.lr_schedule_version, config.checkpoint.allow_fresh_start) == ("fp16", "v1", True)
