from __future__ import annotations

from pathlib import Path

import pytest

from tools.ckpts import convert_gguf_to_hf
from tools.ckpts.convert_gguf_to_hf import main


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input_file", str(tmp_path / "model.gguf"), "--output_dir", str(tmp_path / "hf")]
    monkeypatch.setattr(convert_gguf_to_hf, "find_spec", lambda package: None if package == "gguf" else object())
    assert main(words) == 2
    assert "gguf is not installed, which transformers needs for GGUF files: pip install gguf." in capsys.readouterr().err
    monkeypatch.setattr(convert_gguf_to_hf, "find_spec", lambda package: object())
    assert main(words) == 2
    assert "model.gguf is no file: give a .gguf file." in capsys.readouterr().err
