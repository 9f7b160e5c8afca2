from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sepllm.hf import SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM
from sepllm.hf.configuration_sepllm_gpt_neox import prefill_pattern
from sepllm.pattern import AttentionPattern
from tests.tools.sepllm.conftest import MakeTokenizer
from tools.sepllm.scores import Received, attention_weights, load_model
from tools.sepllm.show import main, masks

SENTENCE = "The rain came, and he left. Was it late? It was; so he said: go!"
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3}
MakeModel = Callable[..., SepLLMGPTNeoXForCausalLM]


def sparse_model(**changes: object) -> SepLLMGPTNeoXForCausalLM:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "vocab_size": 400,
        **SHAPE,
        "rotary_pct": 0.5,
        "separator_token_ids": [15, 13],
        "init_tok_max_idx": 1,
        "prefill_local_window_size": 3,
        "eos_token_id": None,
    }
    return SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXConfig(**values | changes)).eval()


def plain_model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=400, intermediate_size=64, **SHAPE, attn_implementation="eager")  # type: ignore[arg-type]
    return GPTNeoXForCausalLM(config).eval()


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes",
    [{}, {"pos_emb": "alibi"}, {"pos_emb": "learned"}, {"streamingLLM": True}, {"USE_ORIGINAL_FULL_ATTEN": True}],
    ids=["rotary", "alibi", "learned", "streaming", "full"],
)
def test_weights_are_the_models_own(changes: dict[str, object]) -> None:
    """That they read what each layer passed on is asserted inside; here, that they are weights of the model's mask."""
    model = sparse_model(**changes)
    ids = torch.randint(0, 30, (20,), generator=torch.Generator().manual_seed(1))
    weights = attention_weights(model, ids)
    drawn = masks(ids, ["token"] * 20, prefill_pattern(model.config), layers=range(3))
    for of_layer, mask in zip(weights, drawn.values(), strict=True):
        assert torch.allclose(of_layer.sum(1), torch.ones(20), atol=1e-5)
        assert np.array_equal(of_layer.numpy() > 0, mask.is_read())


@pytest.mark.parametrize(
    "changes",
    [{"USE_SA_SOFTMAX": True}, {"USE_SA_SOFTMAX_NO_DENO": True}, {"USE_BiPE": True, "BiPE_seps": [13]}],
    ids=["self-adjust", "raw", "BiPE"],
)
def test_other_modes_read_with_these_weights_too(changes: dict[str, object]) -> None:
    """Asserted inside: the weights read what each layer passed on."""
    assert attention_weights(sparse_model(**changes), torch.arange(20)).shape == (3, 20, 20)


def test_weights_of_plain_gpt_neox_are_those_that_transformers_gives() -> None:
    model = plain_model()
    ids = torch.arange(12)
    expected = torch.stack([layer[0].mean(0) for layer in model(ids[None], output_attentions=True).attentions])
    assert torch.equal(attention_weights(model, ids), expected)


def test_full_attention_of_both_models_has_the_same_weights() -> None:
    """The same tensors under transformers' own GPT-NeoX: the definition of what is computed here from q and k."""
    plain = plain_model()
    ours = sparse_model(USE_ORIGINAL_FULL_ATTEN=True, rotary_pct=0.25, intermediate_size=64, use_parallel_residual=True)
    ours.load_state_dict(
        {name.replace("lm_head", "embed_out").replace("gpt_neox.", "sepllm_gpt_neox."): value for name, value in plain.state_dict().items()}
    )
    ids = torch.arange(12)
    assert torch.allclose(attention_weights(ours, ids), attention_weights(plain, ids), atol=1e-6)


def test_a_weight_that_the_layer_does_not_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.sepllm.scores.apply_rotary", lambda x, cosines, sines: x)
    with pytest.raises(AssertionError, match="layer 0 reads otherwise"):
        attention_weights(sparse_model(), torch.arange(12))


def test_what_keys_receive_is_counted_by_kind() -> None:
    weights = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0, 0.5]])
    received = Received.of(weights, weights > 0, ("initial", "separator", "window"))
    assert received.by_key.tolist() == pytest.approx([1.75 / 3, 0.75 / 2, 0.5])
    assert received.share == pytest.approx({"initial": 1.75 / 3, "separator": 0.25, "window": 0.5 / 3})
    assert received.readable == pytest.approx({"initial": 3 / 5, "separator": 1 / 5, "window": 1 / 5})


def test_layers_that_read_the_same_share_a_panel() -> None:
    pattern = AttentionPattern(initial_tokens=1, separator_ids=frozenset([7]), windows=(2, 9, 9, 2, 9))
    ids, texts = torch.arange(9), list("abcdefghi")
    assert list(masks(ids, texts, pattern)) == ["layers 0, 3: n = 2", "layers 1-2, 4: n = 9"]
    drawn = masks(ids, texts, pattern, layers=[3])["layer 3: n = 2"]
    assert drawn.kinds == ("initial", *["window"] * 6, "separator", "window")


def test_fixllm_has_a_grid() -> None:
    pattern = AttentionPattern(initial_tokens=1, intervals=(3,), windows=(2,))
    (drawn,) = masks(torch.arange(9), list("abcdefghi"), pattern).values()
    assert drawn.kinds == ("initial", "window", "window", "grid", "window", "window", "grid", "window", "window")


def test_a_mask_is_drawn_from_flags_alone(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    assert main([SENTENCE, str(tmp_path / "mask.png"), "--tokenizer", str(make_tokenizer()), "--window", "4"]) == 0
    assert is_png(tmp_path / "mask.png")


def test_a_mask_is_drawn_from_a_configuration(make_tokenizer: MakeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"configs/{name}.yml" for name in ("size/160m", "method/sepllm-n64HT", "run/pile")]
    common = [SENTENCE, str(tmp_path / "mask.png"), "--tokenizer", str(make_tokenizer()), "--config", *files]
    assert main(common) == 0
    assert "as long as the sentence" in capsys.readouterr().err
    assert main([*common, "--window", "5", "--layers", "0", "5"]) == 0
    assert capsys.readouterr().err == ""
    assert is_png(tmp_path / "mask.png")


@pytest.mark.parametrize("make", [sparse_model, plain_model])
def test_scores_of_a_converted_folder_are_drawn(
    make: MakeModel, make_tokenizer: MakeTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path)
    make_tokenizer()
    assert main([SENTENCE, str(tmp_path / "scores.png"), "--model", str(tmp_path), "--layers", "0", "2"]) == 0
    assert is_png(tmp_path / "scores.png")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][-2:] == ["layer 0", "layer 2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([SENTENCE], "something has to make tokens"),
        ([SENTENCE, "--layers", "1", "--tokenizer", "bytes"], "there are 1 layers, 0 to 0"),
        (["", "--tokenizer", "bytes"], "has 0 tokens"),
        (["a" * 500, "--tokenizer", "bytes"], "has 500 tokens"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_sentence(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], str(tmp_path / "out.png"), *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        load_model(tmp_path / "nothing")
