"""The fp16 and bf16 blocks and the precision key as `PrecisionConfig`."""

from __future__ import annotations

from typing import cast

from pydantic import JsonValue

from megatron.config.schema import Config, PrecisionConfig
from megatron.config.settings import Settings, copied
from megatron.config.values import NOT_NEGATIVE, SIZE

FP16_PASSED_ON = ("auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads")
BF16_PASSED_ON = ("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states")
"""Members that go to DeepSpeed unread."""
_FP16_READ = ("enabled", "loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale")
_FP16_STRIPPED = ("fp16", "type")
"""Members of GPT-NeoX that DeepSpeed 0.19 does not take."""
_TOP_LEVEL = {"loss_scale": "loss_scale", "loss_scale_window": "loss_scale_window", "hysteresis": "hysteresis", "min_loss_scale": "min_scale"}
"""Member of the fp16 block -> the top-level key that may give it instead."""

_WORDS = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
"""DeepSpeed's words for a precision -> ours."""


def resolve_precision(settings: Settings) -> PrecisionConfig:
    """The precision, and how fp16 scales its loss."""
    fp16, bf16 = settings.block("fp16") or {}, settings.block("bf16") or {}
    settings.check_members("fp16", fp16, (*_FP16_READ, *FP16_PASSED_ON, *_FP16_STRIPPED))
    settings.check_members("bf16", bf16, ("enabled", *BF16_PASSED_ON))
    fields: dict[str, object] = {}
    for field, key in _TOP_LEVEL.items():
        value = settings.agreed(key, _number_member(settings, fp16, field), f"fp16.{field}")
        fields |= {} if value is None else {field: value}
    power = _number_member(settings, fp16, "initial_scale_power")
    fields |= {} if power is None else {"initial_scale_power": power}
    return copied(settings, PrecisionConfig, precision=_chosen_precision(settings, fp16=fp16, bf16=bf16), **fields)


def accumulation_precision(config: Config) -> str | None:
    """The precision in which the gradients of a step's micro-batches are summed: the model's own, unless data_types.grad_accum_dtype names another.
    None: it names none that DeepSpeed sums in."""
    given = asked_accumulation(config)
    return config.precision.precision if given is None else _WORDS.get(str(given).removeprefix("torch."))


def asked_accumulation(config: Config) -> JsonValue:
    """data_types.grad_accum_dtype as it is given, or None."""
    block = config.deepspeed.get("data_types")
    return block.get("grad_accum_dtype") if isinstance(block, dict) else None


def _chosen_precision(settings: Settings, *, fp16: dict[str, JsonValue], bf16: dict[str, JsonValue]) -> str:
    """The block that is enabled, else the key, else fp32."""
    by_block = {"fp16.enabled": "bfloat16" if fp16.get("type") == "bfloat16" else "fp16"} if _is_enabled(settings, "fp16", fp16) else {}
    by_block |= {"bf16.enabled": "bfloat16"} if _is_enabled(settings, "bf16", bf16) else {}
    key = settings.get("precision", str)
    _check_disabled(settings, key, {"fp16": fp16, "bfloat16": bf16})
    asked = by_block | ({} if key is None else {"precision": key})
    if len(set(asked.values())) > 1:
        named = " and ".join(f"{name} ({value})" if name == "precision" else f"{name} (true)" for name, value in asked.items())
        raise settings.fail(list(asked), f"{named} contradict one another: disable all but one, as in --set fp16.enabled=false.")
    return next(iter(asked.values()), "fp32")


def _check_disabled(settings: Settings, key: str | None, blocks: dict[str, dict[str, JsonValue]]) -> None:
    """Notes a block that turns nothing on, and refuses a `precision` whose block is turned off."""
    for precision, block in blocks.items():
        name = "fp16" if precision == "fp16" else "bf16"
        if key == precision and block.get("enabled") is False:
            text = f"precision is {key} and {name}.enabled is false: set precision to another one, or {name}.enabled to true."
            raise settings.fail(["precision", f"{name}.enabled"], text)
        if block and "enabled" not in block:
            settings.notes.append(f"{settings.place(name)}: the {name} block has no `enabled: true` and turns nothing on.")


def _is_enabled(settings: Settings, name: str, block: dict[str, JsonValue]) -> bool:
    enabled = block.get("enabled", False)
    if not isinstance(enabled, bool):
        raise settings.fail([f"{name}.enabled"], f"{name}.enabled is {enabled!r}: give true or false.")
    return enabled


def _number_member(settings: Settings, fp16: dict[str, JsonValue], member: str) -> float | None:
    """A number of the fp16 block; every one but `loss_scale` is whole."""
    if fp16.get(member) is None:
        return None
    kind = NOT_NEGATIVE if member == "loss_scale" else SIZE
    try:
        return cast("float", kind.read(fp16[member]))
    except ValueError:
        raise settings.fail([f"fp16.{member}"], f"fp16.{member} is {fp16[member]!r}: give {kind.words}.") from None
