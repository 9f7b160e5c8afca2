"""Streams against a definition that keeps unrotated keys in plain lists, and against published traces."""

from __future__ import annotations

import json
import re
import shlex
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, FalconConfig, GPTNeoXConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from sepllm.cache import CacheBudget, CachePolicy, TokenHistory
from sepllm.hf import SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM, attach
from sepllm.streaming import Method, Stream, StreamCache
from sepllm.streaming import __main__ as command
from sepllm.streaming import stream as module
from sepllm.streaming.model import as_gpt_neox, separator_ids
from sepllm.streaming.picture import draw_end
from sepllm.streaming.report import Trace, result_of
from sepllm.streaming.stream import LOSSES, STORED
from sepllm.streaming.text import texts_in, token_pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")
TRACES: list[dict[str, Any]] = json.loads((ROOT / "tests" / "golden" / "streaming.json").read_text(encoding="utf-8"))
SEPARATORS = (3, 4)
LAYERS, VOCAB = 2, 40

_SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "initializer_range": 0.25}
_SHARED |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_GLU = _SHARED | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": (8, lambda: LlamaConfig(**_GLU)),
    "gpt_neox": (4, lambda: GPTNeoXConfig(**_SHARED, intermediate_size=48, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5})),
    "falcon": (8, lambda: FalconConfig(**_SHARED, new_decoder_architecture=False, multi_query=True, parallel_attn=True)),
}
"""Rotated dimensions of a head, and the configuration."""
SEPLLM = Method.sepllm(initial=2, separators=3, local=5, total=16, separator_ids=SEPARATORS)
STREAMING = Method.streamingllm(initial=2, total=12)
UNSHIFTED = Method.sepllm(initial=2, separators=3, local=5, total=16, separator_ids=SEPARATORS, shifts_positions=False)


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind][1](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.to(dtype)


def random_text(length: int, *, share: float = 0.3) -> list[int]:
    """A text of which this share are separators."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (length,), generator=generator)
    return torch.where(torch.rand(length, generator=generator) < share, 3, ids).tolist()


def pairs_of(text: list[int]) -> Iterator[tuple[int, int]]:
    return pairwise(text)


def logged(folder: Path, name: str) -> list[float]:
    return [float(line) for line in (folder / name).read_text().splitlines()]


def streamed(model: PreTrainedModel, method: Method, folder: Path, text: list[int], *, save_every: int = 10_000) -> Stream:
    with attach(model):
        stream = Stream(model, method, folder, identity={}, save_every=save_every)
        for _ in stream.read(pairs_of(text), len(text) - 1):
            pass
    return stream


def turned(x: Tensor, positions: Tensor, dims: int) -> Tensor:
    """``[..., S, H]`` with the first ``dims`` dimensions rotated by ``positions [S]``, half by half."""
    angle = positions[:, None] * 10000.0 ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    first, second, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat([torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def still_stored(stored: list[int], text: list[int], method: Method) -> list[int]:
    """Places that stay once more than c are stored."""
    if len(stored) <= method.total:
        return stored
    newest = len(stored) - method.local
    separators = [place for place in stored[:newest] if place >= method.initial and text[place] in method.separator_ids]
    return [place for place in stored if place < method.initial] + separators[-method.separators :] + stored[newest:]


@torch.no_grad()
def defined_losses(kind: str, text: list[int], method: Method) -> tuple[list[float], list[int]]:
    """Losses and cache sizes of a model of transformers that is handed, token by token, the stored keys at their slots."""
    model, dims = make_model(kind), CONFIGS[kind][0]
    raw: list[dict[int, Tensor]] = [{} for _ in range(LAYERS)]
    values: list[dict[int, Tensor]] = [{} for _ in range(LAYERS)]
    came_at: dict[int, int] = {}
    stored: list[int] = []
    losses, sizes = [], []
    for place in range(len(text) - 1):
        slots = torch.tensor([slot if method.shifts_positions else came_at[p] for slot, p in enumerate(stored)], dtype=torch.float64)
        cache = DynamicCache()
        for layer in range(LAYERS if stored else 0):
            keys = turned(torch.cat([raw[layer][p] for p in stored], 2), slots, dims)
            cache.update(keys, torch.cat([values[layer][p] for p in stored], 2), layer)
        came_at[place] = len(stored)
        ids, position = torch.tensor([[text[place]]]), torch.tensor([[len(stored)]])
        logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True).logits[0].float()
        losses.append(float(cross_entropy(logits, torch.tensor(text[place + 1 : place + 2]))))
        for layer in range(LAYERS):
            raw[layer][place] = turned(cache.layers[layer].keys[:, :, -1:], -position[0].double(), dims)
            values[layer][place] = cache.layers[layer].values[:, :, -1:]
        stored = still_stored([*stored, place], text, method)
        sizes.append(len(stored))
    return losses, sizes


@pytest.mark.parametrize("case", TRACES, ids=lambda case: case["name"])
def test_the_policy_reads_and_keeps_what_the_published_traces_do(case: dict[str, Any]) -> None:
    sizes = case["params"]
    is_streaming = sizes.get("mode") == "streaming"
    budget = CacheBudget(initial=sizes["a"], separators=0 if is_streaming else sizes["s"], local=sizes["w"], total=sizes["c"] + 1)
    policy = CachePolicy(
        budget=budget,
        separator_ids=frozenset(() if is_streaming else sizes["seps"]),
        accumulates=sizes.get("accumulate", True),
        is_bounded=sizes.get("use_max", True),
    )
    history = TokenHistory(policy=policy)
    for token, expected in zip(case["ids"], case["steps"], strict=True):
        step = history.advance(torch.tensor([[token]]), is_text=None, positions=None, compresses="after reading")
        assert step.reads.places[0].tolist() == expected["attended"]
        assert history.stored is not None
        assert history.stored.places[0].tolist() == expected["kept"]
        assert sizes["c"] + int(history.stored.growth) == expected["cache_size"]


@pytest.mark.parametrize("case", [case for case in TRACES if not {"use_max", "accumulate"} & set(case["params"])], ids=lambda case: case["name"])
def test_methods_tell_tokens_the_positions_of_the_published_traces(case: dict[str, Any]) -> None:
    sizes = case["params"]
    if sizes.get("mode") == "streaming":
        method = Method.streamingllm(initial=sizes["a"], total=sizes["c"])
        assert method.local == sizes["w"]
    else:
        method = Method.sepllm(initial=sizes["a"], separators=sizes["s"], local=sizes["w"], total=sizes["c"], separator_ids=tuple(sizes["seps"]))
    cache = StreamCache(method, num_layers=1)
    for token, expected in zip(case["ids"], case["steps"], strict=True):
        positions = cache.begin_pass(torch.tensor([[token]]))
        cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
        cache.end_pass()
        assert positions is not None
        assert positions.tolist() == [[expected["query_position"]]]
        step = cache.histories[0].step
        assert step is not None
        assert step.reads.places[0].tolist() == expected["attended"]
        assert cache.num_stored() == len(expected["kept"])


@pytest.mark.parametrize("method", [SEPLLM, STREAMING], ids=lambda method: method.name)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_losses_and_sizes_are_those_of_the_definition(kind: str, method: Method, tmp_path: Path) -> None:
    text = random_text(301)
    stream = streamed(make_model(kind), method, tmp_path, text)
    losses, sizes = defined_losses(kind, text, method)
    torch.testing.assert_close(torch.tensor(logged(tmp_path, LOSSES)), torch.tensor(losses), rtol=0.0, atol=3e-5)
    assert logged(tmp_path, STORED) == sizes
    assert stream.tally.perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("method", [UNSHIFTED, Method.vanilla()], ids=["unshifted", "vanilla"])
def test_losses_without_shifted_positions_are_those_of_the_definition(method: Method, tmp_path: Path) -> None:
    text = random_text(101)
    streamed(make_model("llama"), method, tmp_path, text)
    losses, sizes = defined_losses("llama", text, method)
    torch.testing.assert_close(torch.tensor(logged(tmp_path, LOSSES)), torch.tensor(losses), rtol=0.0, atol=3e-5)
    assert logged(tmp_path, STORED) == sizes


@pytest.mark.parametrize("method", [SEPLLM, STREAMING, Method.vanilla()], ids=lambda method: method.name)
def test_a_stream_that_was_interrupted_goes_on_bit_for_bit(method: Method, tmp_path: Path) -> None:
    text, model = random_text(201), make_model("llama", torch.float32)
    whole = streamed(model, method, tmp_path / "whole", text, save_every=70)
    with attach(model):
        reading = Stream(model, method, tmp_path / "parts", identity={}, save_every=70).read(pairs_of(text), 200)
        assert [next(reading).num_tokens for _ in range(3)] == [64, 70, 134], "killed after the first saving"
        reading.close()
    resumed = Stream(model, method, tmp_path / "parts", identity={}, save_every=70)
    assert resumed.tally.num_tokens == 70
    parts = streamed(model, method, tmp_path / "parts", text, save_every=70)
    assert parts.tally.nll_sum == whole.tally.nll_sum
    assert parts.tally.perplexity == whole.tally.perplexity
    assert parts.tally.stored_sum == whole.tally.stored_sum
    for name in (LOSSES, STORED):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert streamed(model, method, tmp_path / "parts", text, save_every=70).tally == parts.tally, "nothing is left to read"


def test_a_saving_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = random_text(101), make_model("llama", torch.float32)

    def half_a_file(state: dict[str, Any], path: Path) -> None:
        if state["tally"]["num_tokens"] > 40:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save(state, path)

    save = torch.save
    monkeypatch.setattr(module.torch, "save", half_a_file)
    with pytest.raises(OSError, match="No space"):
        streamed(model, SEPLLM, tmp_path, text, save_every=40)
    assert Stream(model, SEPLLM, tmp_path, identity={}).tally.num_tokens == 40


def test_a_folder_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = random_text(31), make_model("llama", torch.float32)
    streamed(model, SEPLLM, tmp_path, text)
    with pytest.raises(ValueError, match=r"holds a run with method .* use another --output_dir"):
        Stream(model, STREAMING, tmp_path, identity={})
    monkeypatch.setattr(module, "FORMAT", "3")
    with pytest.raises(ValueError, match=r"format of state.pt 2, not 3: use another --output_dir, or --restart"):
        Stream(model, SEPLLM, tmp_path, identity={})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model None, not other"):
        Stream(model, SEPLLM, tmp_path, identity={"model": "other"})
    with pytest.raises(ValueError, match=r"holds 30 tokens already, more than num_eval_tokens \(20\)"):
        next(Stream(model, SEPLLM, tmp_path, identity={}).read(pairs_of(text), 20))


@pytest.mark.parametrize("method", [SEPLLM, STREAMING], ids=lambda method: method.name)
def test_the_cache_takes_no_more_memory_however_long_the_text(method: Method, tmp_path: Path) -> None:
    stream = streamed(make_model("llama", torch.float32), method, tmp_path, random_text(601), save_every=20)
    allocated = [mark.allocated_bytes for mark in stream.tally.marks]
    assert max(allocated[5:]) == max(allocated[:5])
    assert stream.tally.stored_largest == method.total
    assert stream.tally.token_bytes == LAYERS * 2 * 2 * 8 * 4, "keys and values of two heads of eight floats"


def test_the_measured_size_of_a_full_cache_is_the_sawtooth_of_the_paper(tmp_path: Path) -> None:
    stream = streamed(make_model("llama", torch.float32), SEPLLM, tmp_path, random_text(401, share=0.5), save_every=100)
    trace, least = Trace.read(tmp_path), SEPLLM.initial + SEPLLM.separators + SEPLLM.local
    assert trace.period() == SEPLLM.total - least + 1
    assert trace.mean() == (least + SEPLLM.total) / 2
    result = result_of(stream, lengths=(100, 400))
    assert result.perplexity_at[400] == pytest.approx(stream.tally.perplexity)
    assert [stretch.end_tokens for stretch in result.course] == [100, 200, 300, 400]
    assert result.course[0].perplexity == pytest.approx(result.perplexity_at[100])
    assert sum(stretch.ms_per_token for stretch in result.course) / 4 == pytest.approx(result.ms_per_token)


def test_a_constant_size_has_no_period(tmp_path: Path) -> None:
    streamed(make_model("llama", torch.float32), STREAMING, tmp_path, random_text(61))
    trace = Trace.read(tmp_path)
    assert trace.period() is None
    assert set(trace.sizes[STREAMING.total :]) == {STREAMING.total}


def test_the_picture_gives_a_constant_size_the_mean_that_it_shows() -> None:
    axes = Figure().add_subplot()
    draw_end(axes, "streamingllm", Trace(sizes=array("q", [*range(1, 25), *[24] * 40])), shown=20)
    (label,) = axes.get_legend_handles_labels()[1]
    assert label == "streamingllm: mean 24.0"


def test_methods_refuse_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="must be less than cache_size"):
        Method.sepllm(initial=4, separators=64, local=256, total=324, separator_ids=(3,))
    with pytest.raises(ValueError, match="sep_cache_size is 0"):
        Method.sepllm(initial=4, separators=0, local=256, total=324, separator_ids=(3,))
    with pytest.raises(ValueError, match="init_cache_size is 12 and cache_size 12"):
        Method.streamingllm(initial=12, total=12)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<end>": 0, ".": 3, ",": 4, "w1": 1, "w2": 2} | {f"w{number}": number for number in range(5, VOCAB)}
    words_of = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_of, eos_token="<end>")


def test_each_text_is_read_up_to_its_last_token_but_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w5 w6\nw7")
    (tmp_path / "b.jsonl").write_text('{"text": "w8 ."}\n\n{"text": ""}\n{"text": "w9 w10"}\n')
    texts = list(texts_in([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    assert texts == ["w5 w6\nw7", "w8 .", "", "w9 w10"]
    assert list(token_pairs(texts, tokenizer)) == [(5, 6), (6, 7), (8, 3), (9, 10)]
    assert list(token_pairs(texts, tokenizer, num_samples=2)) == [(5, 6), (6, 7), (8, 3)]


def test_separators_come_from_the_tokenizer_a_family_or_the_command_line(tokenizer: PreTrainedTokenizerFast) -> None:
    assert separator_ids(["tokenizer"], tokenizer) == (3, 4)
    assert separator_ids(["7", "9"], tokenizer) == (7, 9)
    assert set(separator_ids(["llama"], tokenizer)) >= {13, 11, 262}
    assert 128000 not in separator_ids(["llama"], tokenizer)
    with pytest.raises(ValueError, match="give tokenizer, one of llama, pythia"):
        separator_ids(["mamba"], tokenizer)


def sepllm_gpt_neox(**changes: object) -> SepLLMGPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "rotary_pct": 0.5}
    return SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXConfig(**{**shape, "USE_ORIGINAL_FULL_ATTEN": True, "initializer_range": 0.2, **changes})).eval()


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_trained_model_of_ours_comes_as_gpt_neox_with_its_weights(is_tied: bool) -> None:
    trained = sepllm_gpt_neox(tie_word_embeddings=is_tied, hidden_act="gelu_pytorch_tanh", use_parallel_residual=True)
    ids = torch.tensor([[5, 6, 3, 7]])
    plain = as_gpt_neox(trained)
    assert plain.config.model_type == "gpt_neox"
    torch.testing.assert_close(plain(ids).logits, trained(ids).logits, rtol=0.0, atol=1e-5)


def test_a_model_with_other_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="its positions are alibi"):
        as_gpt_neox(sepllm_gpt_neox(pos_emb="alibi"))


@pytest.fixture
def folders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A folder with a model and a text."""
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = {3: ".", 4: ","}
    (tmp_path / "text.txt").write_text(" ".join(words.get(token, f"w{token}") for token in random_text(161)))
    return tmp_path


def run(folder: Path, *words: str, output: str = "out") -> int:
    flags = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--output_dir", str(folder / output), "--device", "cpu"]
    return command.main([*flags, "--init_cache_size", "2", "--sep_cache_size", "3", "--cache_size", "16", *words])


def test_the_command_compares_the_methods_in_one_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "vanilla", "streamingllm", "sepllm", "--local_size", "5", "--num_eval_tokens", "150", "--lengths", "50", "100"]
    assert run(folders, *words, "--save_every", "40") == 0
    first = capsys.readouterr().out
    results = json.loads((folders / "out" / "results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["vanilla", "streamingllm", "sepllm"]
    assert [result["num_tokens"] for result in results] == [150] * 3
    assert [(result["stored_largest"], result["local"]) for result in results] == [(150, None), (16, 14), (16, 5)]
    expected = streamed(make_model("llama", torch.float32), SEPLLM, folders / "own", random_text(161)[:151])
    assert results[2]["perplexity"] == pytest.approx(expected.tally.perplexity)
    assert set(results[2]["perplexity_at"]) == {"50", "100"}
    table = (folders / "out" / "results.md").read_text()
    assert table in first
    assert re.search(r"\| sepllm +\| +2 \| +3 \| +5 \| +16 \|", table)
    assert (folders / "out" / "kv.png").read_bytes().startswith(b"\x89PNG")
    assert run(folders, *words, "--save_every", "40") == 0
    assert "goes on after 150 tokens" in capsys.readouterr().out
    assert json.loads((folders / "out" / "results.json").read_text())["results"] == results, "nothing was read anew"
    assert run(folders, "--methods", "sepllm", "--local_size", "5", "--num_eval_tokens", "20", "--restart") == 0


def test_the_switches_of_the_reference_choose_the_method(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--num_eval_tokens", "30", "--num_samples", "5"]
    assert run(folders, *few, "--enable_SepLLM", "False", "--enable_StreamingLLM", "True", "--local_size", "14", output="streaming") == 0
    assert (folders / "streaming" / "streamingllm" / LOSSES).exists()
    assert run(folders, *few, "--local_size", "5", "--enable_pos_shift", "True", output="sepllm") == 0
    assert (folders / "sepllm" / "sepllm" / LOSSES).exists()
    assert run(folders, *few, "--enable_kv_cache_manager", "False", "--enable_SepLLM", "False", "--enable_pos_shift", "False", output="full") == 0
    assert (folders / "full" / "vanilla" / LOSSES).exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--enable_SepLLM", "False"], "are both False: set exactly one"),
        (["--enable_SepLLM", "True", "--methods", "vanilla"], "give one or the other"),
        (["--enable_SepLLM", "False", "--enable_StreamingLLM", "True", "--local_size", "5"], r"local_size \(5\) must be cache_size \(16\)"),
        (["--methods", "sepllm"], "must be less than cache_size"),
        (["--methods", "vanilla", "--lengths", "99999999"], "--lengths 99999999"),
        (["--methods", "vanilla", "--num_eval_tokens", "0"], "num_eval_tokens is 0"),
        (["--methods", "vanilla", "--text", "missing.txt"], "missing.txt is no file"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], sentence: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folders, *words) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_without_matplotlib_the_command_says_what_to_do(folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], object] = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    assert run(folders, "--methods", "streamingllm", "--num_eval_tokens", "20") == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (folders / "out" / "kv.png").exists()


def test_a_text_without_two_tokens_is_refused(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "text.txt").write_text("w5")
    assert run(folders, "--methods", "vanilla") == 2
    assert "No text has two tokens" in capsys.readouterr().err


def test_books_of_pg19_are_asked_for_as_files(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", str(folders / "model"), "--dataset_name", "pg19", "--output_dir", str(folders), "--methods", "vanilla"]) == 2
    assert "--text" in capsys.readouterr().err


@pytest.mark.parametrize("line", re.findall(r"^ {4}python -m sepllm\.streaming (.*(?:\n {8}.*)*)$", PAGE, re.MULTILINE))
def test_commands_of_the_document_are_understood(line: str) -> None:
    words = shlex.split(line.replace("\\\n", " "))
    understood = repr(command._parser().parse_args(words))
    assert all(word in understood for word in words if not word.startswith("-"))
