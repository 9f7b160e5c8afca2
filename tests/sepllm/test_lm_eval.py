"""lm-eval's requests to tiny models that read as SepLLM: each answer is that of its text alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import sepllm.lm_eval.__main__ as command_line
from sepllm.hf import SepCache, SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM, attach, read_sepllm_config
from sepllm.lm_eval.model import CACHE_OPTIONS, SepLLMModel
from tests.sepllm.byte_tokenizer import END, byte_tokenizer

ROOT = Path(__file__).parents[2]
LAYERS = 2
SLIDING = 3
"""Keys that the tiny Mistral reads: fewer than the windows of the training-free file."""
SHAPE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
SHAPE |= {"max_position_embeddings": 192, "initializer_range": 0.25, "bos_token_id": None, "pad_token_id": END}
SMALL = {"init_cache_size": 2, "sep_cache_size": 4, "local_size": 6, "cache_size": 20, "USE_MAX_SEP_CACHE": True}
PAIRS = [
    ("The house stands", " on a hill, above the sea."),
    ("", "No context, at all."),
    ("Words, words. More words, and others." * 6, " The context is cut on the left."),
    ("x", "y"),
    ("Once, a long time ago. There was", " nobody"),
]
TEXTS = ["It rained, and it rained. " * 10, "", "One. Two, three.", "z"]
CONTEXTS = ["Once upon a time, there was", "In", "A longer context. It goes on, and on, and on, so that others are padded on the left. Yes"]
QUESTIONS = [
    {"question": "What is 1 and 2?", "answer": "1+2=3.\n#### 3"},
    {"question": "How many are 40, and two more, all of them?", "answer": "42.\n#### 42"},
    {"question": "Six?", "answer": "#### 6"},
    {"question": "What is twice 7?", "answer": "2*7=14\n#### 14"},
]
MakeLM = Callable[..., SepLLMModel]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def config_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., str]:
    """``config_file(**changes)``: a training-free file; PADDING_ID is also what begins a text without context."""

    def write(**changes: object) -> str:
        values = {
            "Layer_num": LAYERS,
            "PADDING_ID": END,
            "BATCH_ADAPTIVE_INIT_POS": True,
            "separator_token_ids": tokenizer.encode("., "),
            "init_tok_max_idx": 1,
            "prefill_local_window_size": 5,
            "generate_local_window_size": 4,
        }
        (tmp_path / "sepllm.yml").write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        return str(tmp_path / "sepllm.yml")

    return write


def make_model(kind: str) -> PreTrainedModel:
    """Writes nothing but signs that are one byte. Llama knows no token that ends a text, so that rows of a batch write on; GPT-NeoX does."""
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, eos_token_id=None))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, eos_token_id=None, sliding_window=SLIDING))
    elif kind == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, eos_token_id=END))
    else:
        model = SepLLMGPTNeoXForCausalLM(SepLLMGPTNeoXConfig(**SHAPE, eos_token_id=END, prefill_local_window_size=5))
    with torch.no_grad():
        model.get_output_embeddings().weight[95:] = 0
    return model.eval()


@pytest.fixture
def make_lm(tokenizer: PreTrainedTokenizerFast) -> MakeLM:
    def make(kind: str = "llama", *, batch_size: int = 4, **arguments: object) -> SepLLMModel:
        return SepLLMModel(make_model(kind), tokenizer=tokenizer, batch_size=batch_size, **arguments)  # type: ignore[arg-type]

    return make


def instances(kind: str, arguments: Sequence[tuple[object, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=argument, idx=index) for index, argument in enumerate(arguments)]


def generations(lm: SepLLMModel, contexts: Sequence[str], **arguments: object) -> list[str]:
    wanted = {"until": [], "max_gen_toks": 40, "do_sample": False} | arguments
    return lm.generate_until(instances("generate_until", [(context, wanted) for context in contexts]), disable_tqdm=True)


def close(value: object) -> object:
    return pytest.approx(value, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_log_likelihoods_are_those_of_each_text_alone_in_every_batch_size(
    make_lm: MakeLM, config_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    alone = make_model(kind)
    attach(alone, read_sepllm_config(config_file()).prefill)
    expected = []
    for context, continuation in PAIRS:
        before, after = tokenizer.encode(context) or [END], tokenizer.encode(continuation)
        ids = torch.tensor([(before + after)[-193:]])
        with torch.no_grad():
            table = alone(ids[:, :-1], attention_mask=torch.ones_like(ids[:, 1:])).logits[0].log_softmax(-1)
        expected.append(float(table[-len(after) :].gather(1, torch.tensor(after)[:, None]).sum()))
    ratios = []
    for batch_size in (1, 4):
        lm = make_lm(kind, batch_size=batch_size, sepllm_config=config_file())
        scores = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
        assert [score for score, _ in scores] == close(expected)
        ratios.append(lm.ratios.mean())
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "sepllm_gpt_neox"])
def test_long_texts_score_alike_in_every_batch_size(make_lm: MakeLM, config_file: Callable[..., str], kind: str) -> None:
    arguments = {} if kind == "sepllm_gpt_neox" else {"sepllm_config": config_file()}
    both = [make_lm(kind, batch_size=size, **arguments) for size in (1, 4)]
    scores = [lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True) for lm in both]
    assert scores[0] == close(scores[1])
    assert both[0].ratios.mean() == both[1].ratios.mean()
    assert len(both[0].ratios) == len(both[1].ratios) == 4, "two windows, nothing, and one of each short text"


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("decode", ["mask", "sepcache"])
def test_generated_texts_and_their_ratios_are_those_of_each_context_alone(
    make_lm: MakeLM, config_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, kind: str, decode: str
) -> None:
    """At its stop string the model has made as many passes as it wrote tokens."""
    patterns = read_sepllm_config(config_file())

    def written_alone(context: str, length: int) -> tuple[list[int], float]:
        kept = {"separator_token_ids": patterns.prefill.separator_ids, "PADDING_ID": END, "layer_num": LAYERS} | SMALL
        ids = torch.tensor([tokenizer.encode(context)])
        with attach(make_model(kind), patterns.prefill, decode_pattern=patterns.decode) as alone:
            cache = SepCache(**kept) if decode == "sepcache" else None  # type: ignore[arg-type]
            out = alone.model.generate(ids, past_key_values=cache, max_new_tokens=length, do_sample=False, pad_token_id=END)
            return out[0, ids.shape[1] :].tolist(), alone.kv_ratio()

    whole = [written_alone(context, 40)[0] for context in CONTEXTS]
    stop = tokenizer.decode(whole[0][9])
    texts, ratios = [], []
    for context, ids in zip(CONTEXTS, whole, strict=True):
        until_stop = next((count for count in range(1, 41) if {stop, "<end>"} & set(tokenizer.convert_ids_to_tokens(ids[:count]))), 40)
        texts.append(tokenizer.decode(ids[:until_stop], skip_special_tokens=True).partition(stop)[0])
        ratios.append(written_alone(context, until_stop)[1])
    for batch_size in (1, 4):
        lm = make_lm(kind, batch_size=batch_size, sepllm_config=config_file(), decode=decode, **(SMALL if decode == "sepcache" else {}))
        assert generations(lm, CONTEXTS, until=[stop]) == texts
        assert lm.ratios.mean() == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    assert len({len(text) for text in texts}) > 1, "rows of a batch end at different places"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_ratio_counts_the_keys_that_the_last_token_of_each_text_reads(
    make_lm: MakeLM, config_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    lm = make_lm(kind, sepllm_config=config_file())
    lm.loglikelihood(instances("loglikelihood", PAIRS[3:]), disable_tqdm=True)
    pattern, expected = read_sepllm_config(config_file()).prefill, []
    for pair in PAIRS[3:]:
        ids = tokenizer.encode("".join(pair))[:-1]
        first = max(0, len(ids) - SLIDING) if kind == "mistral" else 0
        read = [pattern.reads(query=len(ids) - 1, key=key, key_id=ids[key]) for key in range(first, len(ids))]
        expected.append(sum(read) / len(ids))
    assert lm.ratios.mean() == pytest.approx(sum(expected) / 2)


def test_a_model_that_reads_everything_scores_as_lm_evals_own(
    make_lm: MakeLM, config_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    theirs = HFLM(make_model("llama"), tokenizer=tokenizer, batch_size=2)
    requests = instances("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for arguments in ({}, {"decode": "sepcache"}, {"sepllm_config": config_file(USE_ORIGINAL_FULL_ATTEN=True)}):
        lm = make_lm(**arguments)
        scores = lm.loglikelihood(requests, disable_tqdm=True)
        assert [score for score, _ in scores] == close([score for score, _ in expected])
        assert lm.ratios.mean() == (1.0 if arguments else None)


def test_texts_are_scored_token_by_token_from_a_sep_cache_in_every_batch_size(make_lm: MakeLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The definition: each token of a text alone, from its own cache."""
    text = PAIRS[2][0]
    ids = torch.tensor([[END, *tokenizer.encode(text)]])
    with attach(make_model("llama")) as alone, torch.no_grad():
        cache = SepCache(layer_num=LAYERS, tokenizer=tokenizer, PADDING_ID=-1, **SMALL)  # type: ignore[arg-type]
        logits = [alone.model(ids[:, place : place + 1], past_key_values=cache).logits[0, 0] for place in range(192)]
        expected = torch.stack(logits).log_softmax(-1).gather(1, ids[0, 1:193, None]).sum()
        ratio = cache.kv_ratio()
    found = []
    for size in (1, 4):
        lm = make_lm(decode="sepcache", token_by_token=True, batch_size=size, **SMALL)
        found.append(lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(tokenizer.decode(ids[0, 1:193]),)]), disable_tqdm=True)[0])
        assert lm.ratios.mean() == pytest.approx(ratio)
        found.extend(score for score, _ in lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True))
    assert found[0] == close(float(expected))
    assert found[: len(found) // 2] == close(found[len(found) // 2 :])


def test_a_model_that_was_trained_as_sepllm_uses_a_sep_cache_as_it_is(make_lm: MakeLM) -> None:
    lm = make_lm("sepllm_gpt_neox", decode="sepcache", **SMALL)
    assert lm.attachment is None
    generations(lm, CONTEXTS, max_gen_toks=20)
    ratio = lm.ratios.mean()
    assert ratio is not None
    assert 0 < ratio < 1


def test_beams_generate_from_a_sep_cache(make_lm: MakeLM) -> None:
    lm = make_lm(decode="sepcache", **SMALL)
    generations(lm, CONTEXTS, num_beams=2, max_gen_toks=20)
    ratio = lm.ratios.mean()
    assert ratio is not None
    assert 0 < ratio < 1


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows for local tasks, and lm-eval without its own tasks, which take ten seconds to index."""
    (tmp_path / "gsm8k.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    monkeypatch.setenv("SEPLLM_EVAL_DATA", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    return tmp_path


@pytest.mark.usefixtures("data")
def test_a_generation_task_with_shots_scores_alike_in_every_batch_size(make_lm: MakeLM) -> None:
    found = []
    for size in (1, 4):
        lm = make_lm(batch_size=size, decode="sepcache", **SMALL)
        results = simple_evaluate(
            model=lm,
            tasks=["local_gsm8k"],
            num_fewshot=2,
            gen_kwargs={"max_gen_toks": 12},
            task_manager=TaskManager(include_path=str(ROOT / "configs" / "eval"), include_defaults=False),
            bootstrap_iters=0,
        )
        answers = [sample["resps"] for sample in sorted(results["samples"]["local_gsm8k"], key=lambda sample: sample["doc_id"])]
        found.append((answers, lm.ratios.mean()))
        assert results["n-shot"] == {"local_gsm8k": 2}
        assert len(answers) == 4
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["hf", "sepllm", None])
def test_the_command_line_is_lm_evals_and_keeps_what_the_scores_depend_on(
    tokenizer: PreTrainedTokenizerFast,
    config_file: Callable[..., str],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
) -> None:
    """A line of SepLLM's README, with tasks from a folder. Without a model it means lm-eval's default, hf."""
    make_model("llama").save_pretrained(data / "model")
    tokenizer.save_pretrained(data / "model")
    words = ["--model", name] if name else []
    words += ["--model_args", f"pretrained={data / 'model'},attn_implementation=eager,sepllm_config={config_file()}", "--tasks", "local_gsm8k"]
    words += ["--device", "cpu", "--batch_size", "70", "--limit", "3", "--include_path", str(ROOT / "configs" / "eval")]
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *words, "--gen_kwargs", "max_gen_toks=8", "--num_fewshot", "1", "--output_path", str(data / "out.json")]
    )
    assert command_line.main() == 0
    assert "local_gsm8k" in capsys.readouterr().out
    (file,) = data.glob("out_*.json")
    saved = json.loads(file.read_text())
    config = saved["config"]
    assert (config["limit"], config["model_dtype"], saved["n-shot"]) == (3, "torch.float32", {"local_gsm8k": 1})
    assert config["sepllm"]["versions"].keys() == {"sepllm", "lm_eval", "torch", "transformers", "datasets"}
    assert 0 < config["sepllm"]["kv_ratio"] < 1
    assert config["sepllm"]["kv_texts"] == 3
    assert config["sepllm"]["prefill"]["windows"] == [5, 5]
    assert config["sepllm"]["decode"]["windows"] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decode": "cache"}, "decode is cache: use mask or sepcache"),
        ({"cache_size": 20}, "cache_size in model_args is SepCache's: add decode=sepcache"),
        ({"decode": "sepcache", "cache_size": 20}, r"must be less than cache_size .20."),
        ({"Layer_num": 3}, "Layer_num is 3 in .*, but the model has 2 layers"),
        ({"streamingLLM": True, "decode": "sepcache"}, "no separators for it to keep"),
        ({"reference_padding": True}, "scores would depend on the padding of a batch"),
        ({"PADDING_ID": 0, "decode": "sepcache", "model_type": "llama"}, "both say which tokens separate"),
        ({"token_by_token": True}, "token_by_token reads scored texts from a SepCache: add decode=sepcache"),
    ],
)
def test_what_is_wrong_with_model_args_is_said(make_lm: MakeLM, config_file: Callable[..., str], arguments: dict[str, object], message: str) -> None:
    of_model = {name: arguments[name] for name in ("decode", "token_by_token", *CACHE_OPTIONS) if name in arguments}
    of_file = {name: value for name, value in arguments.items() if name not in of_model}
    with pytest.raises(ValueError, match=message):
        make_lm(**of_model, **({"sepllm_config": config_file(**of_file)} if of_file else {}))


def test_a_model_that_pads_as_the_reference_is_read_row_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("sepllm_gpt_neox")
    model.config.reference_padding = True
    SepLLMModel(model, tokenizer=tokenizer, batch_size=1)
    with pytest.raises(ValueError, match="reference_padding is set in the configuration of the model: scores would depend on the padding of a batch"):
        SepLLMModel(model, tokenizer=tokenizer, batch_size=4)


def test_mistakes_are_a_sentence_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--config", "nowhere.yml"])
    assert command_line.main() == 2
    assert "nowhere.yml" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    assert command_line.main() == 2
    assert "lm_eval is not installed: pip install 'sepllm[eval]'" in capsys.readouterr().err


PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(TaskManager(include_path=str(ROOT / "configs" / "eval"), include_defaults=False).all_tasks)
    (tasks,) = re.findall(r"^tasks=(.*)$", PAGE, flags=re.MULTILINE)
    assert set(tasks.split(",")) <= known
    lines = re.findall(r"^ *python (-m sepllm\.lm_eval .*)$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        arguments = HarnessCLI().parse_args()
        ours = {"sepllm_config", "decode", "token_by_token", "core", *CACHE_OPTIONS}
        assert set(arguments.model_args) <= {"pretrained", "attn_implementation", *ours}
        SepCache(
            layer_num=1,
            separator_token_ids=[1],
            PADDING_ID=0,
            **{name: arguments.model_args[name] for name in CACHE_OPTIONS if name in arguments.model_args},
        )


def test_the_files_that_the_page_writes_are_the_methods_that_it_names(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    tokenizer.save_pretrained(tmp_path / "models" / "mine")
    script = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)[0].replace("python ", f"{sys.executable} ")
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
    (methods,) = re.findall(r"for method in (.*); do", PAGE)
    read = {method: read_sepllm_config(tmp_path / f"{method}.yml", num_layers=30) for method in methods.split()}
    assert read["full"].prefill.is_full(10**6)
    assert read["sepllm-n64"].decode.windows == (64,) * 30
    assert read["sepllm-n64"].prefill.separator_ids >= set(tokenizer.encode(".,"))
    assert not read["streamingllm-n256"].prefill.has_far_keys or not read["streamingllm-n256"].prefill.separator_ids
    assert read["fixllm-n256"].prefill.intervals == (5,) * 30
    assert {patterns.prefill.initial_tokens for name, patterns in read.items() if name != "full"} == {3}


def test_every_path_of_the_page_exists() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
