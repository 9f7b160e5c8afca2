"""The whole model: names, sizes, parity with transformers, caching, checkpointing, positions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron.config.loader import ConfigError
from megatron.config.schema import Config, ModelConfig
from megatron.config.size import model_size
from megatron.model import gpt, passes
from megatron.model.cache import KeyValueCache
from megatron.model.gpt import GPTModel, build_model, cross_entropy, parameter_count
from megatron.model.init import initialise
from megatron.model.recompute import Recompute
from sepllm.layout import TokenLayout
from sepllm.ops import linear
from sepllm.pattern import AttentionPattern, SelfAdjust, Softmax, Standard

MakeConfig = Callable[..., ModelConfig]
MakeRun = Callable[..., Config]

PYTHIA = {
    "14m": (6, 128, 4, 50304, 14_067_712),
    "31m": (6, 256, 8, 50304, 30_494_720),
    "70m": (6, 512, 8, 50304, 70_426_624),
    "160m": (12, 768, 12, 50304, 162_322_944),
    "410m": (24, 1024, 16, 50304, 405_334_016),
    "1b": (16, 2048, 8, 50304, 1_011_781_632),
    "1.4b": (24, 2048, 16, 50304, 1_414_647_808),
    "2.8b": (32, 2560, 32, 50304, 2_775_208_960),
    "6.9b": (32, 4096, 32, 50432, 6_857_302_016),
    "12b": (36, 5120, 40, 50688, 11_846_072_320),
}
"""Layers, width, heads, padded vocabulary, published number of parameters."""

LLAMA = {
    "norm": "rmsnorm",
    "norm_epsilon": 1e-5,
    "rotary_pct": 1.0,
    "activation": "swiglu",
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "gpt_j_residual": False,
}

SEPARATORS = frozenset({5, 6, 7})
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


POSITIONS: dict[str, dict[str, object]] = {name: {"pos_emb": name} for name in ("rotary", "learned", "sinusoidal", "alibi", "none")}
POSITIONS |= {f"bilevel {name}": {"pos_emb": name, "use_bipe": True, "bipe_separator_ids": (6, 8)} for name in ("rotary", "alibi")}


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 90, (rows, length))


def text_ids(rows: int, length: int) -> Tensor:
    """A third of these are separators, of the pattern or of segments."""
    return torch.randint(5, 17, (rows, length))


def full_layout(ids: Tensor, config: ModelConfig, **options: object) -> TokenLayout:
    return TokenLayout.from_ids(ids, AttentionPattern.full(config.num_layers), **options)


def random_model(config: ModelConfig, **options: object) -> GPTModel:
    """A model whose every parameter, biases and norms included, is random."""
    model = GPTModel(config, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm." in name and not name.endswith("bias") else 0))
    return model


@dataclass
class Batch:
    ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    layout: TokenLayout


def random_batch(config: ModelConfig, *, rows: int = 2, length: int = 20) -> Batch:
    text = random_ids(rows, length + 1)
    ids = text[:, :-1]
    return Batch(ids, text[:, 1:], (torch.rand(rows, length) < 0.8).float(), full_layout(ids, config))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_models_have_the_published_number_of_parameters(name: str, make_config: MakeConfig) -> None:
    layers, width, heads, vocabulary, total = PYTHIA[name]
    config = make_config(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_kv_heads=heads,
        intermediate_size=4 * width,
        padded_vocab_size=vocabulary,
    )
    assert parameter_count(config) == model_size(config).total == total


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_emb": "learned", "no_weight_tying": False},
        {"pos_emb": "alibi", "gpt_j_tied": True, "use_qk_layernorm": True},
        {"use_bipe": True, "bipe_separator_ids": (6,)},
        {"norm": "scalenorm", "use_bias_in_mlp": False},
        {**LLAMA, "num_kv_heads": 2},
        {"norm": "non_parametric_layernorm", "activation": "geglu", "use_bias_in_attn_linear": False},
    ],
)
def test_size_arithmetic_without_torch_agrees_with_the_model(changes: dict[str, object], make_config: MakeConfig) -> None:
    config = make_config(**changes)
    assert model_size(config).total == parameter_count(config)


@pytest.mark.parametrize("position", ["rotary", "learned", "bilevel rotary"])
def test_state_dict_has_gpt_neox_names(position: str, make_config: MakeConfig) -> None:
    block = {
        *("input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight", "post_attention_layernorm.bias"),
        *("attention.query_key_value.weight", "attention.query_key_value.bias", "attention.dense.weight", "attention.dense.bias"),
        *("mlp.linear1.weight", "mlp.linear1.bias", "mlp.linear2.weight", "mlp.linear2.bias"),
    }
    expected = {"sequential.0.word_embeddings.weight", "sequential.5.norm.weight", "sequential.5.norm.bias", "sequential.6.final_linear.weight"}
    expected |= {f"sequential.{place}.{name}" for place in (2, 3) for name in block}
    if position != "rotary":
        expected.add("sequential.0.position_embeddings.weight")
    assert set(GPTModel(make_config(**POSITIONS[position])).state_dict()) == expected


def test_llama_options_leave_only_matrices_and_scales(make_config: MakeConfig) -> None:
    names = set(GPTModel(make_config(**LLAMA)).state_dict())
    assert not [name for name in names if name.endswith("bias")]
    assert "sequential.2.input_layernorm.scale" in names
    assert "sequential.5.norm.scale" in names


def test_saved_frequencies_are_written_and_never_read(make_config: MakeConfig) -> None:
    model = random_model(make_config(rotary_save_freqs_buffer=True))
    plain = GPTModel(make_config())
    weights = model.state_dict()
    saved = {name: tensor for name, tensor in weights.items() if name not in plain.state_dict()}
    assert set(saved) == {"sequential.2.attention.rotary_emb.inv_freq", "sequential.3.attention.rotary_emb.inv_freq"}
    torch.testing.assert_close(saved.popitem()[1], 10000.0 ** -torch.tensor([0.0, 1 / 3, 2 / 3]))
    model.load_state_dict(weights)
    model.load_state_dict(plain.state_dict())


def test_tied_model_has_no_output_matrix_and_uses_the_embeddings(make_config: MakeConfig) -> None:
    tied, untied = random_model(make_config(no_weight_tying=False)), random_model(make_config())
    weights = tied.state_dict()
    assert "sequential.6.final_linear.weight" not in weights
    untied.load_state_dict(weights | {"sequential.6.final_linear.weight": weights["sequential.0.word_embeddings.weight"]})
    ids = random_ids(2, 9)
    layout = full_layout(ids, tied.config)
    torch.testing.assert_close(tied(ids, layout), untied(ids, layout), rtol=0, atol=0)


def neox_name(name: str, config: ModelConfig) -> str:
    """transformers' name of one of our parameters."""
    _, place, rest = name.split(".", 2)
    if place == "0":
        return "gpt_neox.embed_in.weight"
    if int(place) == config.num_layers + 3:
        return "gpt_neox.final_layer_norm." + rest.split(".")[-1]
    if int(place) == config.num_layers + 4:
        return "lm_head.weight"
    rest = rest.replace("mlp.linear1", "mlp.dense_h_to_4h").replace("mlp.linear2", "mlp.dense_4h_to_h")
    return f"gpt_neox.layers.{int(place) - 2}.{rest}"


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "serial"])
@pytest.mark.parametrize("activation", [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")], ids=["erf", "tanh"])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_full_attention_equals_transformers_gpt_neox(parallel: bool, activation: tuple[str, str], rotary_pct: float, make_config: MakeConfig) -> None:
    config = make_config(gpt_j_residual=parallel, activation=activation[0], rotary_pct=rotary_pct, hidden_size=64)
    ours = random_model(config)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_act=activation[1],
            use_parallel_residual=parallel,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_pct},
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    )
    theirs.load_state_dict({neox_name(name, config): tensor for name, tensor in ours.state_dict().items()})
    batch = random_batch(config)
    logits = theirs(batch.ids).logits
    torch.testing.assert_close(ours(batch.ids, batch.layout), logits, rtol=1e-5, atol=1e-5)
    ours.loss(batch).backward()
    cross_entropy(logits, batch.labels, batch.loss_mask).backward()
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[neox_name(name, config)], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def llama_weights(ours: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Our weights under transformers' LLaMA names."""
    config = ours.config
    head_size = config.hidden_size // config.num_attention_heads
    q_rows, kv_rows = config.num_attention_heads * head_size, config.num_kv_heads * head_size
    for name, tensor in ours.state_dict().items():
        _, place, rest = name.split(".", 2)
        layer = f"model.layers.{int(place) - 2}"
        if place == "0":
            yield "model.embed_tokens.weight", tensor
        elif int(place) == config.num_layers + 3:
            yield "model.norm.weight", tensor
        elif int(place) == config.num_layers + 4:
            yield "lm_head.weight", tensor
        elif rest == "attention.query_key_value.weight":
            if config.num_kv_heads == config.num_attention_heads:
                tensor = tensor.view(config.num_kv_heads, 3, head_size, -1).transpose(0, 1).flatten(0, 2)
            for part, rows in zip("qkv", tensor.split([q_rows, kv_rows, kv_rows]), strict=True):
                yield f"{layer}.self_attn.{part}_proj.weight", rows
        elif rest == "attention.dense.weight":
            yield f"{layer}.self_attn.o_proj.weight", tensor
        elif rest == "mlp.linear1.weight":
            up, gate = tensor.chunk(2)
            yield f"{layer}.mlp.up_proj.weight", up
            yield f"{layer}.mlp.gate_proj.weight", gate
        elif rest == "mlp.linear2.weight":
            yield f"{layer}.mlp.down_proj.weight", tensor
        else:
            yield f"{layer}.{rest.replace('.scale', '.weight')}", tensor


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_llama_options_equal_transformers_llama(num_kv_heads: int, make_config: MakeConfig) -> None:
    config = make_config(**LLAMA, num_kv_heads=num_kv_heads)
    ours = random_model(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            intermediate_size=96,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    theirs.load_state_dict(dict(llama_weights(ours)))
    ids = random_ids(2, 21)
    torch.testing.assert_close(ours(ids, full_layout(ids, config)), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS.values(), ids=list(POSITIONS))
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(
    "softmax", [Standard(), SelfAdjust(kind="normalised"), SelfAdjust(kind="raw")], ids=lambda it: getattr(it, "kind", "standard")
)
def test_decoding_with_a_cache_equals_reading_the_whole_text(
    position: dict[str, object], num_kv_heads: int, softmax: Softmax, make_config: MakeConfig
) -> None:
    model = random_model(make_config(**position, num_kv_heads=num_kv_heads)).eval()
    pattern = AttentionPattern(initial_tokens=2, separator_ids=SEPARATORS, windows=(4, 9), softmax=softmax)
    ids = text_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = KeyValueCache(model.config.num_layers)
    with torch.no_grad():
        whole = model(ids, TokenLayout.from_ids(ids, pattern, attention_mask=mask))
        layout = TokenLayout.from_ids(ids[:, :11], pattern, attention_mask=mask[:, :11])
        parts = [model(ids[:, :11], layout, cache=cache)]
        for start, stop in ((11, 12), (12, 13), (13, 17), (17, 24)):
            layout = layout.extend(ids[:, start:stop])
            parts.append(model(ids[:, start:stop], layout, cache=cache))
    assert cache.length == 24
    text = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[text], whole[text], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS.values(), ids=list(POSITIONS))
def test_left_padding_does_not_move_a_text(position: dict[str, object], make_config: MakeConfig) -> None:
    model = random_model(make_config(**position)).eval()
    ids = text_ids(1, 12)
    padded = torch.cat([torch.full((1, 5), 6), ids], 1)
    layout = full_layout(padded, model.config, attention_mask=torch.arange(17)[None] >= 5)
    torch.testing.assert_close(model(padded, layout)[:, 5:], model(ids, full_layout(ids, model.config)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "alibi"])
def test_positions_tell_the_order_of_tokens_and_none_does_not(position: str, make_config: MakeConfig) -> None:
    ids = random_ids(1, 12)
    swapped = ids[:, [1, 0, *range(2, 12)]]
    for name, tells in ((position, True), ("none", False)):
        model = random_model(make_config(pos_emb=name, num_layers=1)).eval()
        last, last_swapped = (model(text, full_layout(text, model.config))[:, -1] for text in (ids, swapped))
        assert torch.allclose(last, last_swapped, atol=1e-5) != tells, name


def test_slopes_go_to_the_device_without_waiting_for_it(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each forward pass would end what the device still does of the last step before it begins."""
    waits = []

    class Slopes(list):
        def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:
            waits.append(not non_blocking)
            return torch.tensor(self, device=device)

    slopes_of = passes.alibi_slopes
    monkeypatch.setattr(passes, "alibi_slopes", lambda heads: Slopes(slopes_of(heads).tolist()))
    model, ids = random_model(make_config(pos_emb="alibi")), random_ids(1, 9)
    model(ids, full_layout(ids, model.config))
    assert waits == [False]


def test_learned_positions_start_at_the_offset(make_config: MakeConfig) -> None:
    plain, shifted = random_model(make_config(pos_emb="learned")), random_model(make_config(pos_emb="learned", opt_pos_emb_offset=2))
    weights = plain.state_dict()
    table = "sequential.0.position_embeddings.weight"
    shifted.load_state_dict(weights | {table: weights[table].roll(2, 0)})
    ids = random_ids(1, 9)
    layout = full_layout(ids, plain.config)
    torch.testing.assert_close(shifted(ids, layout), plain(ids, layout), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("chunks", [[10], [4, 1, 5], [1] * 10], ids=str)
def test_bilevel_positions_are_embedded_by_place_and_rotated_or_biased_by_segment(
    position: str, chunks: list[int], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden positions, given by hand to a model without BiPE."""
    golden = json.loads((GOLDEN / "bipe.json").read_text())
    ids, intra, inter = torch.tensor(golden["ids"]).clamp(max=30), torch.tensor(golden["intra"]), torch.tensor(golden["inter"])
    config = make_config(pos_emb=position, use_bipe=True, bipe_separator_ids=(30,))
    model, plain = random_model(config).eval(), GPTModel(make_config(pos_emb=position)).eval()
    weights = model.state_dict()
    table = weights.pop("sequential.0.position_embeddings.weight")
    plain.load_state_dict(weights)
    plain.sequential["0"].register_forward_hook(lambda _module, _given, hidden: hidden + table[intra])
    with monkeypatch.context() as patch:
        patch.setattr(TokenLayout, "key_positions", property(lambda _layout: inter))
        expected = plain(ids, full_layout(ids, config))
    cache, parts = KeyValueCache(2), []
    layout = full_layout(ids[:, :0], config)
    for new in ids.split(chunks, 1):
        layout = layout.extend(new)
        parts.append(model(new, layout, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


def test_segments_and_not_the_text_must_fit_the_table(make_config: MakeConfig) -> None:
    model = GPTModel(make_config(use_bipe=True, bipe_separator_ids=(6,), max_position_embeddings=8))
    fitting, too_long = torch.tensor([[9] * 7 + [6] + [9] * 8]), torch.tensor([[9] * 16])
    model(fitting, full_layout(fitting, model.config))
    with pytest.raises(ValueError, match="Position 15 has no embedding: max_position_embeddings is 8"):
        model(too_long, full_layout(too_long, model.config))


def test_bilevel_positions_start_anew_in_packed_documents(make_config: MakeConfig) -> None:
    model = random_model(make_config(use_bipe=True, bipe_separator_ids=(6, 8))).eval()
    first, second = text_ids(1, 9), text_ids(1, 12)
    first[0, -1] = 0
    packed = torch.cat([first, second], 1)
    together = model(packed, full_layout(packed, model.config, document_end_id=0))
    alone = [model(ids, full_layout(ids, model.config)) for ids in (first, second)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_text_longer_than_the_learned_table_is_refused(make_config: MakeConfig) -> None:
    model = GPTModel(make_config(pos_emb="learned", max_position_embeddings=8))
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="Position 8 has no embedding: max_position_embeddings is 8"):
        model(ids, full_layout(ids, model.config))
    padded = full_layout(ids, model.config, attention_mask=torch.arange(9)[None] >= 1)
    model(ids, padded)


@pytest.mark.parametrize("is_selective", [False, True])
@pytest.mark.parametrize("core", ["auto", "sdpa", "dense"])
@pytest.mark.parametrize("interval", [1, 3])
def test_activation_checkpointing_gives_the_same_gradients(interval: int, core: str, is_selective: bool, make_config: MakeConfig) -> None:
    config = make_config(num_layers=4, hidden_dropout=0.1)
    plain, checkpointed = (
        random_model(config, core=core),
        GPTModel(config, core=core, recompute=Recompute(num_layers=interval, is_selective=is_selective)),
    )
    checkpointed.load_state_dict(plain.state_dict())
    batch = random_batch(config)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model.loss(batch).backward()
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_selective_checkpointing_adds_the_bias_of_zero_3s_linear_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts its own function in the place of torch's, which adds the bias over the product that is kept."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    test_activation_checkpointing_gives_the_same_gradients(interval=1, core="auto", is_selective=True, make_config=make_config)


@pytest.mark.parametrize("changes", [{}, {"gpt_j_residual": False}, {"pos_emb": "learned"}, {"no_weight_tying": False}], ids=str)
def test_blocks_write_over_nothing_but_what_selective_checkpointing_keeps(
    changes: dict[str, object], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again may write over tensors that were kept with it already done."""
    counter, run_blocks = CountOperators(), gpt.run_blocks

    def counted(*given: Any, **named: Any) -> Tensor:
        with counter:
            return run_blocks(*given, **named)

    monkeypatch.setattr(gpt, "run_blocks", counted)
    model = random_model(make_config(hidden_dropout=0.1, **changes))
    model.loss(random_batch(model.config))
    assert {name for name in counter.counts if name.split(".")[1].endswith("_")} == {"aten.bernoulli_.float", "aten.div_.Scalar"}, "masks of dropout"


def test_activation_checkpointing_computes_the_blocks_again(make_config: MakeConfig) -> None:
    model = random_model(make_config(), recompute=Recompute(num_layers=1, is_selective=False))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.sequential["2"].mlp.linear1.register_forward_hook(count)
    model.loss(random_batch(model.config)).backward()
    assert calls == 2


@pytest.mark.parametrize(("core", "attention"), [("auto", "sepllm.sep_attention.default"), ("chunked", "sepllm_attention_chunked.chunked.default")])
@pytest.mark.parametrize("product", ["aten.addmm.default", "mkldnn._linear_pointwise.default"])
def test_selective_checkpointing_computes_no_product_and_no_attention_again(
    product: str, core: str, attention: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "_is_fast_here", lambda: product.startswith("mkldnn"))
    counts = {}
    for name, recompute in (("plain", None), ("selective", Recompute(num_layers=1, is_selective=True))):
        model, counter = random_model(make_config(), core=core, recompute=recompute), CountOperators()
        with counter:
            model.loss(random_batch(model.config)).backward()
        counts[name] = counter.counts
    kept = (product, "aten.mm.default", attention, "sepllm.rotate_packed.default")
    assert all(counts["selective"][operator] == counts["plain"][operator] > 0 for operator in kept)
    layers, gelu = model.config.num_layers, "sepllm.bias_gelu.default"
    assert (counts["plain"][gelu], counts["selective"][gelu]) == (2 * layers, 3 * layers)


@pytest.mark.parametrize("recompute", [None, Recompute(num_layers=1, is_selective=False)])
def test_compiled_blocks_give_the_same_loss_and_gradients_and_are_built_once_for_all_layers(
    recompute: Recompute | None, make_config: MakeConfig
) -> None:
    config = make_config(num_layers=3)
    plain, compiled = random_model(config), GPTModel(config, recompute=recompute)
    compiled.load_state_dict(plain.state_dict())
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_blocks(backend="aot_eager")
    for _ in range(2):
        batch = random_batch(config)
        losses = [model.loss(batch) for model in (plain, compiled)]
        for model, loss in zip((plain, compiled), losses, strict=True):
            model.zero_grad()
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0])
        expected = gradients(plain)
        for name, gradient in gradients(compiled).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_sparse_pattern_changes_the_answer_and_every_layer_has_its_own_window(make_config: MakeConfig) -> None:
    model = random_model(make_config())
    ids = random_ids(1, 30)
    answers = [
        model(ids, TokenLayout.from_ids(ids, AttentionPattern(initial_tokens=1, separator_ids=SEPARATORS, windows=windows)))
        for windows in ((4, 4), (4, 40), (40, 4), (40, 40))
    ]
    differences = [(first - second).abs().max() for index, first in enumerate(answers) for second in answers[:index]]
    assert min(differences) > 1e-3
    torch.testing.assert_close(answers[3], model(ids, full_layout(ids, model.config)))


def test_cross_entropy_is_the_masked_mean() -> None:
    logits, labels, mask = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
    losses = [-logits[b, t].log_softmax(0)[labels[b, t]] for b in range(2) for t in range(5) if mask[b, t]]
    torch.testing.assert_close(cross_entropy(logits, labels, mask), torch.stack(losses).mean())
    assert cross_entropy(logits, labels, torch.zeros_like(mask)) == 0


def test_cross_entropy_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits, labels, mask = torch.randn(1, 64, 50).half(), torch.randint(0, 50, (1, 64)), torch.ones(1, 64)
    assert cross_entropy(logits, labels, mask) == cross_entropy(logits.float(), labels, mask)
    assert cross_entropy(logits, labels, mask, in_fp32=False) != cross_entropy(logits, labels, mask)


def test_forward_refuses_a_layout_of_another_text(make_config: MakeConfig) -> None:
    model = GPTModel(make_config())
    ids = random_ids(1, 9)
    layout = full_layout(ids, model.config)
    with pytest.raises(ValueError, match=r"ids is \(1, 8\) but the layout has 9 queries"):
        model(ids[:, :8], layout)
    with pytest.raises(ValueError, match="10 columns, 1 of them new, but the cache holds 0"):
        model(ids[:, :1], layout.extend(ids[:, :1]))
    with pytest.raises(ValueError, match="3 windows but num_layers is 2"):
        model(ids, TokenLayout.from_ids(ids, AttentionPattern.full(3)))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_built_model_has_the_initial_weights_of_its_seed_in_the_runs_precision(precision: str, dtype: torch.dtype, make_run: MakeRun) -> None:
    run = make_run({"precision": {"precision": precision}, "training": {"seed": 7}})
    expected = GPTModel(run.model)
    initialise(expected, run.model, seed=7)
    for built in (build_model(run), build_model(run, device="cpu", dtype=dtype)):
        for name, parameter in built.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, expected.get_parameter(name).to(dtype)), name


def test_built_model_takes_core_and_checkpointing_from_the_run(make_run: MakeRun) -> None:
    model = build_model(make_run({"attention": {"core": "dense"}, "training": {"checkpoint_activations": True, "checkpoint_num_layers": 2}}))
    assert model.recompute == Recompute(num_layers=2, is_selective=False)
    assert model.core == "dense"
    assert build_model(make_run({"training": {"checkpoint_num_layers": 2}})).recompute is None
    selective = build_model(make_run({"training": {"checkpoint_activations": True, "recompute_granularity": "selective"}}))
    assert selective.recompute == Recompute(num_layers=1, is_selective=True)


def test_model_says_which_core_computed_each_layer(make_run: MakeRun) -> None:
    run = make_run()
    ids = torch.zeros(1, 9, dtype=torch.int64)
    for core, expected in (("auto", "native"), ("dense", "dense")):
        model = GPTModel(run.model, core=core)
        assert model.attention_cores == ()
        model(ids, full_layout(ids, run.model))
        assert model.attention_cores == (expected,) * run.model.num_layers


def test_building_on_the_meta_device_allocates_nothing(make_run: MakeRun) -> None:
    with torch.device("meta"):
        inside = build_model(make_run())
    for model in (inside, build_model(make_run(), device="meta")):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_building_what_is_not_built_is_refused_and_a_parallel_run_is_not(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="pos_emb rpe: relative position buckets are not built yet"):
        build_model(make_run(pos_emb="rpe"))
    build_model(make_run({"parallel": {"pipe_parallel_size": 2, "zero_stage": 3}}))


def test_model_works_on_the_meta_device(make_config: MakeConfig) -> None:
    with torch.device("meta"):
        model = GPTModel(make_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    initialise(model, model.config, seed=1)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_runs_in_its_dtype(dtype: torch.dtype, make_config: MakeConfig) -> None:
    model = random_model(make_config(**LLAMA, num_kv_heads=2)).to(dtype)
    batch = random_batch(model.config)
    assert model(batch.ids, batch.layout).dtype == dtype
    loss = model.loss(batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {dtype}
