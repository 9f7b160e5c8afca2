"""Folders of every family go into the training layout and come back with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from megatron.config.loader import load_config
from megatron.model.gpt import build_model
from megatron.training.manifest import find_checkpoint, finished_iterations
from megatron.training.weights import read_weights
from tests.tools.ckpts.conftest import VOCABULARY, SaveFolder, llama, mistral, neox, sepllm_neox
from tools.ckpts import convert_hf_to_neox, convert_neox_to_hf
from tools.ckpts.convert_hf_to_neox import Imported, convert, main
from tools.ckpts.hf_folder import read_config, read_state
from tools.ckpts.neox_files import ParallelSizes
from tools.ckpts.saved_config import run_config


def back(imported: Imported, folder: Path, **options: object) -> Path:
    """The transformers folder that the checkpoint becomes again."""
    convert_neox_to_hf.convert(run_config(imported.step), input_dir=imported.step, output_dir=folder, **{"save_tokenizer": False} | options)
    return folder


def bits(state: dict[str, Tensor], *, is_tied: bool = False) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and bytes of every weight, under the output matrix's name of today; buffers and a second copy of tied matrices aside."""
    weights = {
        name.replace("embed_out.", "lm_head."): value for name, value in state.items() if not name.endswith(("ntion.bias", "masked_bias", "inv_freq"))
    }
    if is_tied:
        weights.pop("lm_head.weight", None)
    return {name: (value.dtype, value.contiguous().view(torch.uint8).flatten().tolist()) for name, value in weights.items()}


def meaning(config: PreTrainedConfig) -> dict[str, object]:
    """Every field of a configuration but those that say who wrote it."""
    noise = ("transformers_version", "architectures", "_name_or_path", "auto_map")
    return {name: value for name, value in config.to_dict().items() if name not in noise}


ROUND_TRIPS = {
    "neox": (neox(), torch.float16, "safetensors", {}),
    "neox, one residual after the other, shards": (neox(use_parallel_residual=False, hidden_act="gelu"), torch.float32, "shards", {}),
    "neox, tied, pickles in parts, layer files": (neox(tie_word_embeddings=True), torch.bfloat16, "bin shards", {"tensor": 2, "pipeline": 1}),
    "neox, pickle, two ranks": (neox(), torch.float16, "bin", {"tensor": 2}),
    "neox without attention biases, four ranks": (neox(attention_bias=False), torch.float32, "safetensors", {"tensor": 4, "pipeline": 2}),
    "llama": (llama(), torch.bfloat16, "safetensors", {}),
    "llama, tied, shards, two ranks": (llama(tie_word_embeddings=True), torch.float32, "shards", {"tensor": 2, "pipeline": 1}),
    "llama, no groups, pickle": (llama(num_key_value_heads=4), torch.float16, "bin", {"tensor": 4, "pipeline": 1}),
    "llama with biases": (llama(attention_bias=True, mlp_bias=True), torch.float32, "safetensors", {"tensor": 2}),
    "mistral": (mistral(), torch.float32, "safetensors", {}),
    "sepllm": (sepllm_neox(), torch.float16, "safetensors", {"tensor": 2, "pipeline": 1}),
    "sepllm, tied, pickle": (sepllm_neox(tie_word_embeddings=True), torch.float32, "bin", {}),
    "sepllm, bilevel positions": (sepllm_neox(USE_BiPE=True, BiPE_seps=[7, 9]), torch.float32, "safetensors", {"tensor": 2, "pipeline": 1}),
}


@pytest.mark.parametrize(("config", "dtype", "form", "sizes"), list(ROUND_TRIPS.values()), ids=list(ROUND_TRIPS))
def test_a_folder_comes_back_with_the_same_bits_and_the_same_configuration(
    save_folder: SaveFolder, tmp_path: Path, config: PreTrainedConfig, dtype: torch.dtype, form: str, sizes: dict[str, int]
) -> None:
    folder = save_folder(config, dtype=dtype, form=form)
    imported = convert(folder, tmp_path / "checkpoint", sizes=ParallelSizes(**sizes), divisible_by=8)
    assert imported.added_rows == -VOCABULARY % (8 * sizes.get("tensor", 1))
    assert imported.differences is not None
    assert imported.differences.largest < 1e-4
    again = back(imported, tmp_path / "hf-out")
    assert bits(read_state(again)) == bits(read_state(folder), is_tied=config.tie_word_embeddings)
    assert meaning(read_config(again)) == meaning(read_config(folder))


def test_tensors_of_several_dtypes_keep_theirs(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(llama(), dtype=torch.bfloat16, form="bin")
    state = {name: value.float() if "norm" in name else value for name, value in read_state(folder).items()}
    torch.save(state, folder / "pytorch_model.bin")
    again = back(convert(folder, tmp_path / "checkpoint"), tmp_path / "hf-out", precision="keep")
    assert bits(read_state(again)) == bits(state)


SEPLLM_MODES: dict[str, dict[str, object]] = {
    "full": {"USE_ORIGINAL_FULL_ATTEN": True},
    "streaming": {"streamingLLM": True},
    "per layer": {"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": [2048, 3], "generate_local_window_size": None},
    "longer prompts": {"EXCLUDE_DIAGONAL": False},
    "grid": {"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [3, 4]},
    "self-adjusting": {"USE_SA_SOFTMAX": True, "separator_token_ids": [-1], "prefill_local_window_size": 2048, "SA_Denominator_Bias": 1e-7},
    "raw, causal extremes": {"USE_SA_SOFTMAX_NO_DENO": True, "SA_Extremes": "causal"},
    "padding by id": {"BATCH_ADAPTIVE_INIT_POS": True, "PADDING_ID": 5},
    "sliding, the reference's padding": {"sliding_window_width": 9, "reference_padding": True},
    "learned positions": {"pos_emb": "learned"},
    "alibi": {"pos_emb": "alibi"},
}


@pytest.mark.parametrize("changes", list(SEPLLM_MODES.values()), ids=list(SEPLLM_MODES))
def test_every_mode_of_a_sepllm_folder_becomes_the_same_pattern_and_comes_back(
    save_folder: SaveFolder, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = sepllm_neox(**changes)
    folder = save_folder(config)
    imported = convert(folder, tmp_path / "checkpoint")
    run = run_config(imported.step)
    assert (run.attention.prefill, run.attention.decode) == (config.prefill_pattern(), config.decode_pattern())
    assert imported.differences is not None
    assert imported.differences.largest < 1e-4
    again = read_config(back(imported, tmp_path / "hf-out", verify=False))
    assert (again.prefill_pattern(), again.decode_pattern()) == (config.prefill_pattern(), config.decode_pattern())


def test_the_files_are_those_of_gpt_neox(save_folder: SaveFolder, tmp_path: Path) -> None:
    imported = convert(save_folder(neox(tie_word_embeddings=True)), tmp_path / "out", sizes=ParallelSizes(tensor=2, pipeline=2), iteration=7)
    names = {path.name for path in imported.step.glob("*.pt")}
    layers = {f"layer_{place:02}-model_{rank:02}-model_states.pt" for place in (0, 2, 3, 5, 6) for rank in range(2)}
    assert names == layers | {f"mp_rank_{rank:02}_model_states.pt" for rank in range(4)}
    assert (tmp_path / "out" / "latest").read_text() == "global_step7"
    engine = torch.load(imported.step / "mp_rank_03_model_states.pt", weights_only=True)
    assert (engine["module"], engine["iteration"], engine["mp_world_size"], engine["args"]["num_layers"]) == (None, 7, 2, 2)
    layer = torch.load(imported.step / "layer_02-model_01-model_states.pt", weights_only=True)
    assert layer["attention.query_key_value.weight"].shape == (48, 32)
    assert layer["mlp.linear2.weight"].shape == (32, 24)
    first, last = (torch.load(imported.step / f"layer_{place}-model_00-model_states.pt", weights_only=True) for place in ("00", "06"))
    assert torch.equal(first["word_embeddings.weight"], last["word_embeddings.weight"])


def test_files_are_no_larger_than_their_weights(save_folder: SaveFolder, tmp_path: Path) -> None:
    imported = convert(save_folder(neox()), tmp_path / "out", sizes=ParallelSizes(pipeline=1), verify=False)
    weights = read_weights(imported.step).state
    written = sum(path.stat().st_size for path in imported.step.glob("layer_*.pt"))
    assert written < 4 * sum(value.numel() for value in weights.values()) + 12_000 * len(list(imported.step.glob("layer_*.pt")))


def test_a_run_loads_the_checkpoint_from_its_own_files(save_folder: SaveFolder, tmp_path: Path) -> None:
    imported = convert(save_folder(neox()), tmp_path / "out")
    config = load_config(imported.config_files, world_size=1, device="cpu", vocab_size=VOCABULARY)
    assert (config.checkpoint.load, config.checkpoint.finetune) == (str(tmp_path / "out"), True)
    found = find_checkpoint(config.checkpoint)
    assert found is not None
    assert (found.folder, found.iteration, found.manifest) == (imported.step, 0, None)
    assert set(read_weights(found.folder).state) == set(dict(build_model(config, device="meta").named_parameters()))


def test_model_and_method_combine_with_the_files_of_configs(save_folder: SaveFolder, tmp_path: Path) -> None:
    imported = convert(save_folder(neox()), tmp_path / "out", verify=False)
    configs = Path(__file__).parents[3] / "configs"
    files = [imported.config_files[0], configs / "method" / "sepllm-n64.yml", configs / "run" / "pile.yml"]
    config = load_config(files, world_size=1, device="cpu", vocab_size=VOCABULARY, overrides={"separator_token_ids": [7, 8]})
    assert set(config.attention.prefill.windows) == {64}


def test_the_tokenizer_goes_with_the_checkpoint_and_comes_back(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(neox(), form="safetensors")
    words = {f"w{i}": i for i in range(48)} | {"<|endoftext|>": 48, "<pad>": 49}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), bos_token="w3", eos_token="<|endoftext|>", pad_token="<pad>"
    ).save_pretrained(folder)
    imported = convert(folder, tmp_path / "out", verify=False)
    assert run_config(imported.step).model.vocab_size == VOCABULARY
    again = AutoTokenizer.from_pretrained(back(imported, tmp_path / "hf-out", save_tokenizer=True, verify=False))
    assert (tmp_path / "hf-out" / "generation_config.json").read_text() == (folder / "generation_config.json").read_text()
    assert (again.bos_token, again.eos_token, again.pad_token, again.get_vocab()) == ("w3", "<|endoftext|>", "<pad>", words)


def test_a_model_trained_on_is_cut_like_the_folder_it_began_from(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(llama())
    imported = convert(folder, tmp_path / "out", divisible_by=64)
    trained = tmp_path / "trained"
    imported.step.rename(trained)
    config = run_config(trained)
    for kept in (trained / "hf").iterdir():
        kept.unlink()
    result = convert_neox_to_hf.convert(config, input_dir=trained, output_dir=tmp_path / "a", save_tokenizer=False)
    assert read_config(result.directory).vocab_size == 64
    result = convert_neox_to_hf.convert(config, input_dir=trained, output_dir=tmp_path / "b", save_tokenizer=False, like=folder)
    assert meaning(read_config(result.directory)) == meaning(read_config(folder))


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (llama(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}), ["rope_type is linear"]),
        (llama(head_dim=16, hidden_act="gelu"), ["head_dim is not", "hidden_act is gelu; training has swiglu"]),
        (neox(hidden_act="tanh"), ["hidden_act is tanh"]),
        (sepllm_neox(pos_emb="learned", mup_rp_embedding_mult=2.0), ["mup_rp_embedding_mult is not 1"]),
    ],
    ids=["stretched rope", "two reasons", "activation", "muP"],
)
def test_what_a_run_cannot_be_is_refused_with_every_reason(
    save_folder: SaveFolder, tmp_path: Path, config: PreTrainedConfig, reasons: list[str]
) -> None:
    config.save_pretrained(tmp_path / "hf-in")
    with pytest.raises(ValueError, match="cannot be trained here") as error:
        convert(tmp_path / "hf-in", tmp_path / "out")
    assert all(reason in str(error.value) for reason in reasons)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type is gpt2, and this converts sepllm_gpt_neox, gpt_neox, llama, mistral"):
        convert(tmp_path / "gpt2", tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_weights_that_are_not_of_the_configuration_are_named(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(neox(), form="bin")
    state = read_state(folder)

    def refused(changed: dict[str, Tensor], sentence: str) -> None:
        torch.save(changed, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=sentence):
            convert(folder, tmp_path / sentence[:8])

    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    refused({key: value for key, value in state.items() if key != name}, rf"lack {name}")
    refused(state | {"gpt_neox.extra.weight": torch.ones(1)}, "also hold gpt_neox.extra.weight")
    refused(state | {name: torch.ones(32, 40)}, r"sequential.3.mlp.linear2.weight is \(32, 40\) there and \(32, 48\)")
    refused(state | {"gpt_neox.embed_in.weight": torch.ones(49, 32)}, "vocab_size is 50 .* has 49 rows")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}))
    refused(state, "tie_word_embeddings is true in the folder's config.json, but lm_head.weight differs")


def test_a_folder_that_lacks_files_is_named(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(neox(), form="shards")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-.*, which model.safetensors.index.json lists"):
        convert(folder, tmp_path / "out")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        convert(folder, tmp_path / "out")


def test_heads_that_the_ranks_do_not_divide_are_refused_and_leave_nothing(save_folder: SaveFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"query_key_value.weight has 2 heads or rows to share, which 4 tensor-parallel ranks"):
        convert(save_folder(llama()), tmp_path / "out", sizes=ParallelSizes(tensor=4))
    assert finished_iterations(tmp_path / "out") == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_that_is_there_is_not_written_over(save_folder: SaveFolder, tmp_path: Path) -> None:
    folder = save_folder(neox())
    convert(folder, tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match="global_step0 is there already"):
        convert(folder, tmp_path / "out")


def test_the_command_says_what_it_did(save_folder: SaveFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(neox())
    assert main(["--input_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--tp", "2", "--make_vocab_size_divisible_by", "16"]) == 0
    said = capsys.readouterr().out
    assert "14 rows were added to its vocabulary" in said
    assert "Every weight comes back bit for bit. Largest difference between logits (fp32): " in said
    assert f"python deepy.py train.py {tmp_path}/out/global_step0/configs/model.yml" in said
    assert main(["--input_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_another_model_in_the_files_fails_the_command(
    save_folder: SaveFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert_hf_to_neox.neox_keys.__globals__["ACTIVATIONS"], "gelu_pytorch_tanh", ("relu", False))
    assert main(["--input_dir", str(save_folder(neox())), "--output_dir", str(tmp_path / "out")]) == 1
    assert "does not hold the folder's model" in capsys.readouterr().err


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, convert_hf_to_neox.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--input_dir" in done.stdout
