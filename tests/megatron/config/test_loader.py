"""Reading, merging, overriding, and mistakes that come together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config.loader import (
    ConfigError,
    LoadedConfig,
    config_from_json,
    config_to_json,
    load_config,
    load_config_with_notes,
    load_launch,
    parse_override,
)

Resolve = Callable[..., LoadedConfig]
Mistakes = Callable[..., tuple[str, ...]]

SIZE = """{
  # the size
  "num-layers": 4, "hidden-size": 64, "num-attention-heads": 4,
  'seq_length': 128, "max-position-embeddings": 128,
}
"""
METHOD = """{
  "train_micro_batch_size_per_gpu": 2,  # per device
  "train-iters": 100,
  "optimizer": {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95],}},
  "fp16": {"enabled": true, "fp16": true},
}
"""


def write(folder: Path, **texts: str) -> list[Path]:
    paths = [folder / f"{name}.yml" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    return paths


def errors(paths: list[Path], **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, world_size=1, **options)  # type: ignore[arg-type]
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    return [line.replace(f"{paths[0].parent}/", "") for line in caught.value.mistakes]


def test_files_with_disjoint_keys_combine_and_keep_their_texts(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, size=SIZE, method=METHOD), world_size=2)
    assert (config.model.num_layers, config.batch.train_batch_size, config.schedule.lr) == (4, 4, 6e-4)
    assert [(file.name, file.text) for file in config.files] == [("size.yml", SIZE), ("method.yml", METHOD)]


def test_a_key_given_in_two_files_names_both_places_whatever_its_hyphens(tmp_path: Path) -> None:
    extra = '{\n"hidden_size": 32}'
    assert errors(write(tmp_path, size=SIZE, method=METHOD, extra=extra)) == [
        "extra.yml:2: hidden_size is given twice (as hidden-size and as hidden_size), first at size.yml:3: remove one."
    ]


def test_a_key_given_twice_in_one_file_is_a_mistake(tmp_path: Path) -> None:
    text = METHOD.replace('"train-iters": 100,', '"train-iters": 100,\n"train-iters": 100,\n')
    assert errors(write(tmp_path, size=SIZE, method=text)) == ["method.yml:4: train_iters is given twice, first at method.yml:3: remove one."]


def test_an_old_name_and_its_new_name_are_one_key(tmp_path: Path) -> None:
    both = '{"gas": 1, "gradient_accumulation_steps": 1}'
    (mistake,) = errors(write(tmp_path, size=SIZE, method=METHOD, both=both))
    assert "gradient_accumulation_steps is given twice (as gas and as gradient_accumulation_steps)" in mistake


def test_a_member_given_twice_in_a_block_is_a_mistake(tmp_path: Path) -> None:
    text = METHOD.replace('"fp16": true}', '\n"enabled": false}')
    assert errors(write(tmp_path, size=SIZE, method=text)) == ["method.yml:6: fp16.enabled is given twice, first at method.yml:5: remove one."]


def test_two_files_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [*write(tmp_path, run=SIZE), *write(tmp_path / "other", run=METHOD)]
    assert errors(paths) == ["2 files are called run.yml: rename one, because checkpoints keep the files by name."]


def test_hyphens_inside_blocks_stay_as_they_are(tmp_path: Path) -> None:
    text = METHOD.replace('"enabled": true', '"loss-scale": 0')
    assert errors(write(tmp_path, size=SIZE, method=text)) == ["method.yml:5: unknown member fp16.loss-scale: did you mean fp16.loss_scale?"]


def test_block_style_yaml_is_as_good(tmp_path: Path) -> None:
    block = "num_layers: 4\nhidden_size: 64\nnum_attention_heads: 4\nseq-length: 128\nmax_position_embeddings: 128\n"
    assert load_config(write(tmp_path, size=block, method=METHOD), world_size=1).model.num_layers == 4


def test_a_missing_comma_names_the_line_that_lacks_it(tmp_path: Path) -> None:
    broken = '{\n  "num-layers": 4,\n  "attention-config": [[["flash"], 4]]  # no comma\n\n  "hidden-size": 64\n}'
    (mistake,) = errors(write(tmp_path, broken=broken))
    assert mistake.startswith("broken.yml:5: not YAML")
    assert 'Line 3 probably lacks a comma at its end: "attention-config": [[["flash"], 4]]' in mistake


@pytest.mark.parametrize(
    ("text", "cause"),
    [('{"num-layers": 4,\n', "closing brace"), ("a:\n\t- 1\n", "tabs"), ("- 1\n", "one mapping"), ("x: [1, 2\ny: 3\n", "not YAML")],
)
def test_other_broken_files_give_line_and_cause(text: str, cause: str, tmp_path: Path) -> None:
    (mistake,) = errors(write(tmp_path, broken=text))
    assert mistake.startswith("broken.yml:")
    assert cause in mistake


def test_a_file_that_is_not_there_is_a_mistake_and_the_others_are_still_read(tmp_path: Path) -> None:
    found = errors([*write(tmp_path, size='{"num_layer": 4}'), tmp_path / "absent.yml"])
    assert any("absent.yml: cannot be read" in line for line in found)
    assert "size.yml:1: unknown key num_layer: did you mean num_layers?" in found


def test_overrides_win_over_files_and_reach_into_blocks(tmp_path: Path) -> None:
    texts = ["fp16.enabled=false", "optimizer.params.lr=1e-3", "hidden-size=128", "gas=3", "wandb_group=null"]
    config = load_config(write(tmp_path, size=SIZE, method=METHOD), world_size=1, overrides=dict(map(parse_override, texts)))
    assert (config.precision.precision, config.schedule.lr, config.model.hidden_size) == ("fp32", 1e-3, 128)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.batch.gradient_accumulation_steps == 3


def test_an_override_may_make_a_block_and_take_a_key_away(tmp_path: Path) -> None:
    overrides = dict(map(parse_override, ["zero_optimization.stage=1", "fp16=null", "bf16.enabled=true"]))
    config = load_config(write(tmp_path, size=SIZE, method=METHOD), world_size=1, overrides=overrides)
    assert (config.parallel.zero_stage, config.precision.precision) == (1, "bfloat16")


def test_mistakes_of_overrides_name_the_override(tmp_path: Path) -> None:
    paths = write(tmp_path, size=SIZE, method=METHOD)
    assert errors(paths, overrides={"train_iter": 3, "hidden_size": "wide", "seed.x": 1, "seed": "a"}) == [
        "--set hidden_size: hidden_size is 'wide': give a whole number of at least 1.",
        "--set train_iter: unknown key train_iter: did you mean train_iters?",
        "--set seed: seed is 'a': give a whole number of at least 0 and at most 4294967295.",
    ]
    assert errors(paths, overrides={"num_layers.x": 1}) == ["--set num_layers.x: num_layers is 4, which has no members: use --set num_layers=VALUE."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a.b=false", ("a.b", False)),
        ("a=1e-3", ("a", "1e-3")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", None)),
        ("a={b: c}", ("a", {"b": "c"})),
    ],
)
def test_an_override_is_read_as_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["a", "=1", "a=[1"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE|not a YAML value"):
        parse_override(text)


def test_all_mistakes_come_at_once_with_their_lines(tmp_path: Path) -> None:
    size = SIZE.replace('"hidden-size": 64', '"hidden-size": 66').replace("128,\n}", "64,\n}")
    method = (
        METHOD.replace("}\n", "").rstrip() + '\n"warmup": "much",\n"roatry_pct": 0.25,\n"moe_num_experts": 8,\n"train_batch_size": 5, "min_lr": 1}'
    )
    found = errors(write(tmp_path, size=size, method=method))
    assert [line.split(": ")[0] for line in found] == [
        "method.yml:6",
        "method.yml:7",
        "method.yml:8",
        "size.yml:3",
        "size.yml:4",
        "method.yml:9, method.yml:4",
        "method.yml:9, method.yml:2",
    ]
    text = "\n".join(found)
    for words in ["a number of at least 0 and at most 1", "did you mean rotary_pct?", "moe_num_experts is 8", "must divide hidden_size (66)"]:
        assert words in text
    for words in ["max_position_embeddings (64) is below seq_length (128)", "min_lr (1) is above", "train_batch_size (5) is not a multiple"]:
        assert words in text


def test_an_empty_configuration_lists_everything_that_is_missing(tmp_path: Path) -> None:
    found = errors(write(tmp_path, empty="# nothing\n"))
    for key in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings"):
        assert any(line.startswith(f"{key} is missing") for line in found)
    assert any("train_iters and train_epochs are both missing" in line for line in found)
    assert any("train_batch_size and train_micro_batch_size_per_gpu are both missing" in line for line in found)


def test_notes_tell_of_numbers_read_as_text_old_names_inert_keys_and_a_missing_tokenizer(tmp_path: Path) -> None:
    extra = '{"save-interval": 10, "save": "out", "min_lr": "1e-5", "onnx_safe": true, "short_seq_prob": 0.1, "vocab_file": "absent.json"}'
    notes = load_config_with_notes(write(tmp_path, size=SIZE, method=METHOD, extra=extra), world_size=1).notes
    text = "\n".join(notes).replace(f"{tmp_path}/", "")
    assert "method.yml:4: YAML reads optimizer.params.lr '6e-4' as text; taken as 0.0006." in text
    assert "extra.yml:1: YAML reads min_lr '1e-5' as text; taken as 1e-05." in text
    assert "extra.yml:1: save-interval is the old name of checkpoint_factor." in text
    assert "no effect: onnx_safe, short_seq_prob (nothing of this project reads it)." in text
    assert "tokenizer not found, skipped: absent.json" in text
    assert len(notes) == len(set(notes))


def test_dates_and_booleans_of_yaml_1_1_do_not_surprise_text_keys(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, size=SIZE, method=METHOD, extra="{wandb_run_name: 2026-01-01}"), world_size=1)
    assert config.logging.wandb_run_name == "2026-01-01"
    (mistake,) = errors(write(tmp_path, size=SIZE, method=METHOD, extra="{wandb_run_name: 12}"))
    assert "in quotes" in mistake


def test_a_configuration_survives_its_json(resolve: Resolve) -> None:
    keys = {"separator_token_ids": [5, 6], "prefill_local_window_size": 8, "fp16": {"enabled": True}, "flops_profiler": {"enabled": True}}
    config = resolve(keys).config
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(("number", "words"), [(".inf", "inf"), ("-.inf", "-inf"), (".nan", "nan"), ("1.0e+999", "inf"), ("1e999", "inf")])
def test_what_json_cannot_hold_is_refused_wherever_it_stands(tmp_path: Path, number: str, words: str) -> None:
    """The workers get their configuration as JSON, in which it would be null."""
    extra = "{\nflops_profiler: {enabled: true,\n profile_step: NUMBER},\nzero_optimization: {stage: 3, offload_param: {buffer_count: [NUMBER]}}}"
    paths = write(tmp_path, size=SIZE, method=METHOD, extra=extra.replace("NUMBER", number))
    assert errors(paths, overrides=dict([parse_override(f"comms_logger.verbose={number}")])) == [
        f"extra.yml:3: flops_profiler.profile_step is {words}: give a finite number.",
        f"extra.yml:4: zero_optimization.offload_param.buffer_count is {words}: give a finite number.",
        f"--set comms_logger.verbose: comms_logger.verbose is {words}: give a finite number.",
    ]


def test_the_launchers_keys_can_be_read_before_devices_are_counted(tmp_path: Path) -> None:
    paths = write(tmp_path, size=SIZE, method=METHOD, extra='{"hostfile": "hosts", "launcher": "SLURM", "account": "me", "num_gpus": 2}')
    launch = load_launch(paths, overrides={"num_gpus": 3})
    assert (launch.hostfile, launch.launcher, launch.launcher_args, launch.num_gpus) == ("hosts", "slurm", "--account=me", 3)


def test_a_json_file_is_yaml_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"num_layers": 1}))
    assert "num_layers is missing" not in "\n".join(errors([tmp_path / "run.json"]))


def test_loading_imports_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    paths = write(tmp_path, size=SIZE, method=METHOD)
    code = (
        "import sys; from megatron.config.loader import load_config; import megatron.config.deepspeed, megatron.config.checks\n"
        f"load_config({[str(path) for path in paths]!r}, world_size=1)\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_whole_models_are_those_of_the_run_on_any_number_of_devices(tmp_path: Path) -> None:
    """As in generate.py: the vocabulary is padded for two shards, and nothing else is left of them."""
    keys = {"model_parallel_size": 2, "sequence_parallel": True, "make_vocab_size_divisible_by": 384, "tokenizer_type": "CharLevelTokenizer"}
    paths = write(tmp_path, size=SIZE, method=METHOD, extra=json.dumps(keys))
    for world_size in (1, 3):
        whole = load_config(paths, world_size=world_size, overrides={"train_batch_size": 64}, holds_whole_models=True)
        assert whole.model.padded_vocab_size == 768
        assert (whole.parallel.model_parallel_size, whole.parallel.sequence_parallel) == (1, False)
        assert (whole.runtime.world_size, whole.batch.data_parallel_size) == (world_size, world_size)


@pytest.mark.parametrize(("steps", "on_one", "on_three"), [({}, 64, 21), ({"gas": 4}, 16, 5), ({"train_micro_batch_size_per_gpu": 2}, 2, 2)])
def test_whole_models_read_a_micro_batch_at_a_time_whatever_a_step_is_made_of(
    steps: dict[str, object], on_one: int, on_three: int, tmp_path: Path
) -> None:
    """64 samples a step do not divide over three devices, which need not divide them to score a model."""
    method = METHOD.replace('"train_micro_batch_size_per_gpu": 2,  # per device', "")
    paths = write(tmp_path, size=SIZE, method=method, run=json.dumps({"train_batch_size": 64, "global_num_gpus": 8} | steps))
    found = [load_config(paths, world_size=count, holds_whole_models=True).batch.train_micro_batch_size_per_gpu for count in (1, 3)]
    assert found == [on_one, on_three]
