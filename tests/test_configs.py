"""The configurations we ship: disjoint keys, every combination resolves, parameters as published."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from megatron.config.keys import KEYS, Honoured
from megatron.config.loader import load_config
from megatron.config.schema import Config
from megatron.config.size import model_size
from sepllm.pattern import AttentionPattern, SelfAdjust

CONFIGS = Path(__file__).parents[1] / "configs"
PYTHIA_VOCABULARY = 50277
SIZES = sorted(path.stem for path in (CONFIGS / "size").glob("*.yml"))
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yml"))
LOCAL = {
    "tiny": ("tiny-full", "tiny-sepllm"),
    "demo": ("demo-full", "demo-sepllm"),
}
SEPARATORS = frozenset({15, 13, 32, 2, 28, 27, 209, 186, 187})
PARAMETERS = {
    "14m": 14_067_712,
    "31m": 30_494_720,
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
    "1.4b": 1_414_647_808,
    "1.4b-32heads": 1_414_647_808,
    "2.8b": 2_775_208_960,
    "6.9b": 6_857_302_016,
    "12b": 11_846_072_320,
}
LAYERED = ("H", "HT", "HMT")


def is_for_12_layers(method: str) -> bool:
    return method.split("-bipe")[0].endswith(LAYERED)


COMBINATIONS = [(size, method) for size, method in product(SIZES, METHODS) if size == "160m" or not is_for_12_layers(method)]


def paths(size: str, method: str) -> list[Path]:
    return [CONFIGS / "size" / f"{size}.yml", CONFIGS / "method" / f"{method}.yml", CONFIGS / "run" / "pile.yml"]


def load(size: str, method: str, *, world_size: int = 32) -> Config:
    return load_config(paths(size, method), world_size=world_size, vocab_size=PYTHIA_VOCABULARY)


def test_all_sizes_are_known() -> None:
    assert set(SIZES) == set(PARAMETERS)


@pytest.mark.parametrize(("size", "method"), COMBINATIONS)
def test_files_have_disjoint_keys(size: str, method: str) -> None:
    keys = [key for path in paths(size, method) for key in yaml.safe_load(path.read_text())]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("world_size", [1, 8, 32])
@pytest.mark.parametrize(("size", "method"), COMBINATIONS)
def test_every_combination_resolves_to_pythias_batch(size: str, method: str, world_size: int) -> None:
    batch = load(size, method, world_size=world_size).batch
    assert batch.train_batch_size == 1024
    assert batch.train_micro_batch_size_per_gpu * batch.gradient_accumulation_steps * world_size == 1024


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    assert model_size(load(size, "full").model).total == PARAMETERS[size]


@pytest.mark.parametrize("size", SIZES)
def test_recipe_is_pythias(size: str) -> None:
    config = load(size, "full")
    assert config.schedule.min_lr == pytest.approx(config.schedule.lr / 10)
    assert (config.optimizer.betas, config.optimizer.eps, config.optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert (config.training.train_iters, config.schedule.lr_decay_style, config.schedule.warmup) == (143_000, "cosine", 0.01)
    assert (config.model.pos_emb, config.model.rotary_pct, config.model.activation) == ("rotary", 0.25, "gelu_tanh")
    assert config.parallel.zero_stage == 1


@pytest.mark.parametrize(
    ("method", "mode", "windows"),
    [
        ("sepllm-n64", "sepllm", (64,) * 12),
        ("sepllm-n128", "sepllm", (128,) * 12),
        ("sepllm-n256", "sepllm", (256,) * 12),
        ("sepllm-n64H", "sepllm", (2048, *(64,) * 11)),
        ("sepllm-n64HT", "sepllm", (2048, *(64,) * 10, 2048)),
        ("sepllm-n64HMT", "sepllm", (2048, *(64,) * 4, 2048, *(64,) * 5, 2048)),
        ("sepllm-n128HT", "sepllm", (2048, *(128,) * 10, 2048)),
        ("sepllm-n128HMT", "sepllm", (2048, *(128,) * 4, 2048, *(128,) * 5, 2048)),
        ("sepllm-n256HMT", "sepllm", (2048, *(256,) * 4, 2048, *(256,) * 5, 2048)),
        ("sepllm-n64HT-bipe-rotary", "sepllm", (2048, *(64,) * 10, 2048)),
        ("sepllm-n64HT-bipe-alibi", "sepllm", (2048, *(64,) * 10, 2048)),
    ],
)
def test_sepllm_reads_initial_tokens_separators_and_its_windows(method: str, mode: str, windows: tuple[int, ...]) -> None:
    attention = load("160m", method).attention
    assert attention.mode == mode
    for pattern in (attention.prefill, attention.decode):
        assert (pattern.initial_tokens, pattern.separator_ids) == (3, SEPARATORS)
        assert [min(window, 2048) for window in pattern.windows] == list(windows)


def test_streamingllm_is_a_pattern_without_separators() -> None:
    assert load("160m", "streamingllm-n64").attention.prefill == AttentionPattern(initial_tokens=3, windows=(64,) * 12)


def test_full_attention_reads_everything() -> None:
    assert load("160m", "full").attention.prefill.is_full(2048)


@pytest.mark.parametrize("method", ["sa", "sa-no-denominator"])
def test_self_adjusting_softmax_runs_over_every_causal_key(method: str) -> None:
    pattern = load("160m", method).attention.prefill
    assert isinstance(pattern.softmax, SelfAdjust)
    assert pattern.is_full(2048)


@pytest.mark.parametrize("kind", ["rotary", "alibi"])
def test_bilevel_positions_use_the_same_separators(kind: str) -> None:
    model = load("160m", f"sepllm-n64HT-bipe-{kind}").model
    assert (model.use_bipe, model.pos_emb, set(model.bipe_separator_ids)) == (True, kind, SEPARATORS)


@pytest.mark.parametrize("run", ["post-training", "fine-tuning"])
@pytest.mark.parametrize(("size", "method"), COMBINATIONS)
def test_runs_that_go_on_from_a_checkpoint_take_its_weights_only(size: str, method: str, run: str) -> None:
    config = load_config([*paths(size, method)[:2], CONFIGS / "run" / f"{run}.yml"], world_size=1, vocab_size=PYTHIA_VOCABULARY)
    assert config.checkpoint.finetune
    assert (config.data.train_label_data_paths is not None) == (run == "fine-tuning")


@pytest.mark.parametrize(("base", "method"), [(base, method) for base, methods in LOCAL.items() for method in methods])
@pytest.mark.parametrize("world_size", [1, 2])
def test_local_files_resolve_on_a_cpu(base: str, method: str, world_size: int) -> None:
    overrides = {"separator_token_ids": [5, 6]} if method == "demo-sepllm" else {}
    files = [CONFIGS / "local" / f"{base}.yml", CONFIGS / "local" / f"{method}.yml"]
    config = load_config(files, overrides=overrides, world_size=world_size, device="cpu", vocab_size=8192)
    assert config.batch.data_parallel_size == world_size
    assert config.attention.prefill.is_full(config.model.seq_length) == method.endswith("full")


def test_the_page_gives_keys_and_defaults_as_they_are() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", (CONFIGS / "README.md").read_text().partition("## Keys")[2], flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`(?!\))", row)]
    rules = {name: KEYS[name] for name in names}
    assert len(rules) > 20
    for row in rows:
        name, default = (re.match(r"`(\w+)` \(`?([\w.]+)`?\)", row) or re.match("()()", row)).groups()  # type: ignore[union-attr]
        if not default:
            continue
        rule = rules[name]
        assert isinstance(rule, Honoured)
        if rule.field in ("prefill", "mode"):  # a member of the pattern, whose default is tested with it
            continue
        group = Config.model_fields[rule.group].annotation
        assert str(group.model_fields[rule.field].default).lower().removesuffix(".0") == default, name  # type: ignore[union-attr]
