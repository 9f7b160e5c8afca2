from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tools.demo.__main__ import CONFIG, METHODS, ROOT
from tools.demo.post_training import Arm, as_result, draw, is_done, policies, table

ARMS = [
    Arm(method=method.title, policy=policy, train_loss={1: 5.0, 2: 4.0}, test_loss=loss)
    for policy, losses in {"whole": (4.1, 4.0), "descent": (4.04, 3.98)}.items()
    for method, loss in zip(METHODS, losses, strict=True)
]


def test_the_table_compares_with_the_checkpoint_and_with_full_attention_of_the_same_policy() -> None:
    lines = table(ARMS, beginning=4.0, steps=7).splitlines()
    assert lines[0] == "Full-attention checkpoint: held-out perplexity 54.60. 7 steps more:"
    assert [line.split()[-3:] for line in lines[3:]] == [
        ["60.34", "1.105", "1.105"],
        ["54.60", "1.000", "1.000"],
        ["56.83", "1.041", "1.062"],
        ["53.52", "0.980", "1.000"],
    ]


def test_the_result_holds_the_same_figures(tmp_path: Path) -> None:
    result = as_result(ARMS, beginning=4.0, checkpoint_steps=9, steps=7, settings={"train_batch_size": 2, "seq_length": 8})
    assert result.header["tokens"] == 112
    assert result.tables[0].rows[0][2:] == ("60.34", "1.105", "1.105")
    assert result.picture is not None
    result.picture(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_a_continuation_is_done_when_its_last_step_was_evaluated(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 7)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 7, "train/lm_loss": 4.0}\n')
    assert not is_done(tmp_path, 7)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 7, "test/lm_loss": 4.0}\n')
    assert is_done(tmp_path, 7)
    assert not is_done(tmp_path, 8)


def test_the_second_policy_begins_half_way_down() -> None:
    whole, descent = policies(yaml.safe_load((ROOT / CONFIG).read_text()))
    assert whole.settings == ()
    assert descent.settings == ("warmup=0", "optimizer.params.lr=0.00205")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    assert draw(ARMS, tmp_path / "loss.png", beginning=4.0).read_bytes().startswith(b"\x89PNG")


def test_without_the_demos_model_the_command_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.demo import post_training

    monkeypatch.setattr(post_training, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run make demo first"):
        post_training.main([])
