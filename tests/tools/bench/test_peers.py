"""Other frameworks' models have this project's weights and give its losses and gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron.config.schema import Config
from tools.bench import peers
from tools.bench.arms import ALL_ARMS, PEER_ARMS, Trainee, config_of, refusal
from tools.bench.peers import INSTALL, NEEDS, absence, litgpt_weights

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
HAS_LITGPT = absence("litgpt") is None
INSTALLED = ["transformers", pytest.param("litgpt", marks=pytest.mark.skipif(not HAS_LITGPT, reason=f"optional: {INSTALL}"))]


def small(dtype: str = "fp32") -> Config:
    return config_of("14m", length=96, window=16, batch=2, dtype=dtype, separator_ids=(1, 2), vocab_size=200)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(0, 12, (2, 97), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("framework", INSTALLED)
def test_peer_with_our_weights_gives_our_loss_and_gradient(framework: str, text: torch.Tensor) -> None:
    loss, gradient = Trainee(ALL_ARMS[framework], small(), CPU).check(text)
    ours, wanted = Trainee(ALL_ARMS["full"], small(), CPU).check(text)
    assert abs(loss - ours) < 1e-4
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("framework", INSTALLED)
@pytest.mark.parametrize("recipe", ["", "_autocast"])
def test_peer_in_bf16_is_as_near_as_bf16_is(framework: str, recipe: str, text: torch.Tensor) -> None:
    peer = Trainee(ALL_ARMS[framework + recipe], small("bf16"), CPU)
    kinds = {parameter.dtype for parameter in peer.contender.module.parameters()}
    assert kinds == {torch.float32 if recipe else torch.bfloat16}
    loss, gradient = peer.check(text)
    ours, wanted = Trainee(ALL_ARMS["full"], small("bf16"), CPU).check(text)
    assert abs(loss - ours) < 1e-2
    assert (gradient - wanted).norm() < 5e-2 * wanted.norm()


@pytest.mark.parametrize("framework", INSTALLED)
def test_step_of_a_peer_with_a_rate_is_ours(framework: str, text: torch.Tensor) -> None:
    """Same AdamW, same groups with and without decay, same clipping: the losses of the next steps agree."""
    peer, ours = (Trainee(ALL_ARMS[name], small(), CPU) for name in (framework, "full"))
    losses = [(peer.step(text, lr=1e-3).loss, ours.step(text, lr=1e-3).loss) for _ in range(4)]
    assert [theirs for theirs, _ in losses] == pytest.approx([mine for _, mine in losses], abs=2e-4)
    assert losses[-1][0] < losses[0][0] - 0.1


def test_rows_of_qkv_go_from_one_order_to_the_other_and_back() -> None:
    model = small().model
    heads, width = model.num_attention_heads, model.hidden_size
    value = torch.arange(3 * width, dtype=torch.float32)
    name = "sequential.2.attention.query_key_value.bias"
    (theirs,) = litgpt_weights({name: value}, model).values()
    first_head = value.view(heads, 3, -1)[0]
    assert torch.equal(theirs[: width // heads], first_head[0])
    assert torch.equal(theirs[width : width + width // heads], first_head[1])
    assert torch.equal(theirs.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(), value)


def test_framework_that_is_absent_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    reason = refusal(ALL_ARMS["litgpt"], small(), batch=1, memory_bytes=2**30)
    assert reason == f"litgpt and lightning and torchmetrics: not installed; {INSTALL}"


def test_command_that_installs_names_a_file_with_every_package_pinned() -> None:
    path = ROOT / INSTALL.split()[-1]
    pinned = re.findall(r"^([\w-]+)==[\d.]+$", path.read_text(), flags=re.MULTILINE)
    assert set(NEEDS["litgpt"]) <= set(pinned)


def test_every_peer_computes_full_attention() -> None:
    assert {arm.pattern for arm in PEER_ARMS} == {"full"}
    assert all(ALL_ARMS[arm.framework].is_peer for arm in PEER_ARMS)
