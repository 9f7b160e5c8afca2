from __future__ import annotations

from pathlib import Path

from tools.demo.report import Run, draw, smooth, table


def make_run(title: str, test_loss: float) -> Run:
    return Run(
        title=title,
        parameters=1234567,
        tokens=2048,
        train_loss={1: 5.0, 2: 4.0},
        valid_loss={2: 4.5},
        test_loss=test_loss,
        kept_share=0.25,
        tokens_per_s=1000.0,
        scores={"word perplexity": 200.0},
        passage="And it came to pass.",
        save=Path("runs/a"),
        converted=Path("runs/a-hf"),
    )


def test_table_shows_every_figure_and_the_difference() -> None:
    text = table([make_run("SepLLM", 4.04), make_run("full", 4.0)], bigram=4.5)
    for figure in ("1,234,567", "2,048", "4.0400", "4.5000", "25.0%", "1,000", "200.000", "+1.00%", "And it came to pass."):
        assert figure in text


def test_smoothing_is_a_trailing_mean() -> None:
    assert smooth([1.0, 3.0, 5.0], width=2) == [1.0, 2.0, 4.0]


def test_picture_is_a_png(tmp_path: Path) -> None:
    path = draw([make_run("SepLLM", 4.04), make_run("full", 4.0)], tmp_path / "loss.png", bigram=4.5)
    assert path.read_bytes().startswith(b"\x89PNG")
