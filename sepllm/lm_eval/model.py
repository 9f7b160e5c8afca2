"""lm-eval's Hugging Face model, reading as SepLLM: `hf` with the arguments ``sepllm_config`` and ``decode``, known as ``sepllm``.

What is asked, cut, batched and stopped is lm-eval's. Ours is what a token reads, that no answer depends on the batch it was computed in, and the
share of the keys that was needed.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from sepllm.hf import Attachment, Patterns, SepCache, SepLLMGPTNeoXConfig, attach, read_sepllm_config
from sepllm.hf.attach import reads_as_trained
from sepllm.lm_eval.kv_ratio import StoredKeys, TextRatios, text_ratio
from sepllm.lm_eval.versions import package_versions
from sepllm.pattern import AttentionPattern

logger = logging.getLogger("lm_eval.sepllm")
"""Below lm-eval's, the only loggers that its command line shows."""

Decode = Literal["mask", "sepcache"]

CACHE_OPTIONS = (
    "init_cache_size",
    "sep_cache_size",
    "local_size",
    "cache_size",
    "SEP_ACCUMULATION",
    "USE_MAX_SEP_CACHE",
    "APPLY_PE_SHIFT",
    "compress_prefill",
    "model_type",
)
"""Arguments of `SepCache` that ``--model_args`` may hold."""


@register_model("sepllm")
class SepLLMModel(HFLM):
    """A causal language model of transformers that reads under a pattern, or as it was trained to."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        sepllm_config: str | None = None,
        decode: Decode = "mask",
        token_by_token: bool = False,
        core: str = "auto",
        **arguments: Any,
    ) -> None:
        """``sepllm_config``: one of the reference's training-free YAML files. ``core``: as in `sepllm.attention.attend`.

        ``decode``: tokens that are generated read under the file's pattern (``mask``), or what a SepCache stores (``sepcache``), whose arguments,
        `CACHE_OPTIONS`, may follow. ``token_by_token``: so do, with a SepCache, the tokens of texts that are scored, one after another, instead
        of in one forward pass under the pattern of prompts. All others are those of lm-eval's ``hf``.
        """
        self.cache_options = {name: arguments.pop(name) for name in CACHE_OPTIONS if name in arguments}
        _check_decode(decode, self.cache_options, token_by_token=token_by_token)
        super().__init__(pretrained, **arguments)
        self.sepllm_config, self.decode, self.core = sepllm_config, decode, core
        self.token_by_token = token_by_token
        self.ratios = TextRatios()
        self.attachment: Attachment | None = None
        reads_otherwise = sepllm_config is not None or (decode == "sepcache" and not reads_as_trained(self.model))
        wanted = self._wanted_patterns() if reads_otherwise else None
        self.patterns = wanted or _trained_patterns(self.config)
        """What is read; None where the model says so in ways that are not known here."""
        self._rows: Iterator[tuple[int, Tensor]] = iter(())
        """Of the latest `_model_call`, with their numbers."""
        self._stored: StoredKeys | None = None
        """What its SepCache stored, if it read token by token."""
        if self.patterns is not None and self.patterns.prefill.reference_padding and self.batch_size != 1:
            raise ValueError(
                f"reference_padding is set in {sepllm_config or 'the configuration of the model'}: scores would depend on the padding of a batch. "
                "Leave it out, or set batch_size to 1."
            )
        if wanted is not None:
            self.attachment = attach(self.model, wanted.prefill, decode_pattern=wanted.decode, core=core)
        if decode == "sepcache":
            self._new_cache()  # says now what is wrong with its sizes
        elif self.attachment is None and arguments.get("attn_implementation") == "flash_attention_2":
            logger.warning("flash_attention_2 reads every key. The reference implementation took it for SepCache: that is decode=sepcache here.")

    def get_model_info(self) -> dict[str, Any]:
        """What the results depend on. lm-eval puts it into its results file, when all is done."""
        ratio = self.ratios.mean()
        if ratio is not None:
            logger.info(f"KV {ratio:.2%} of the tokens, mean of {len(self.ratios)} texts")
        ours = {
            "kv_ratio": ratio,
            "kv_texts": len(self.ratios),
            "sepllm_config": self.sepllm_config,
            "prefill": self.patterns and _described(self.patterns.prefill),
            "decode": self.patterns and ("sepcache" if self.decode == "sepcache" else _described(self.patterns.decode)),
            "sep_cache": self.cache_options,
            "token_by_token": self.token_by_token,
            "core": self.core,
            "max_length": self.max_length,
            "versions": package_versions(),
        }
        return super().get_model_info() | {"sepllm": ours}

    def _wanted_patterns(self) -> Patterns:
        """Those of the file; without one, everything."""
        num_layers = self.model.get_decoder().config.num_hidden_layers
        if self.sepllm_config is None:
            return Patterns(AttentionPattern.full(num_layers), AttentionPattern.full(num_layers))
        patterns = read_sepllm_config(self.sepllm_config, num_layers=num_layers)
        if self.decode == "sepcache" and not patterns.prefill.separator_ids and self.cache_options.get("sep_cache_size") != 0:
            raise ValueError(
                f"decode is sepcache, but {self.sepllm_config} has no separators for it to keep: leave sepllm_config out, and they are found in "
                "the tokenizer, or set sep_cache_size=0."
            )
        return patterns

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, V]`` of texts that begin in the first column.

        What fills a row up on the right counts as text: no token of the row is read by, or reads, what comes after it. So nothing hides a text's
        own first token either, which lm-eval may have chosen and which may be the padding id.
        """
        self._rows = enumerate(inps.cpu())
        if self.attachment is None and not self.token_by_token:
            return super()._model_call(inps, attn_mask, labels)
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            if self.token_by_token:
                return self._read_from_cache(inps)
            return self.model(input_ids=inps, attention_mask=torch.ones_like(inps), use_cache=False).logits

    def _read_from_cache(self, inps: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` of texts whose every token reads what a SepCache stores."""
        cache, logits = self._new_cache(), []
        self._stored = StoredKeys(cache)
        for end in range(1, inps.shape[1] + 1):
            mask = torch.ones_like(inps[:, :end])
            logits.append(self.model(input_ids=inps[:, end - 1 : end], attention_mask=mask, past_key_values=cache).logits)
            self._stored.note()
        return torch.cat(logits, 1)

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """lm-eval asks this of each row that `_model_call` read, in order, and knows how long its text is."""
        if self.patterns is not None:
            number, ids = next(self._rows)
            self.ratios.add(self._scored_ratio(number, ids[:inplen]))
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _scored_ratio(self, row: int, ids: Tensor) -> float:
        """r.KV of the text ``ids [S]``, this row of the latest `_model_call`."""
        assert self.patterns is not None
        if self._stored is not None:
            return self._stored.ratio(row, num_steps=len(ids))
        return text_ratio(ids, self.patterns.prefill, pads_by_id=self.attachment is None, attachment=self.attachment)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Texts ``[B, S]``, contexts included. What a row wrote after its own end, while others went on, is replaced by the end of text."""
        stored = None
        if self.decode == "sepcache":
            stored = StoredKeys(self._new_cache())
            generation_kwargs |= {"past_key_values": stored.cache, "logits_processor": LogitsProcessorList([stored])}
        texts = super()._model_generate(context, max_length, stop, **generation_kwargs)
        if self.backend != "causal":
            return texts
        start = context.shape[1]
        for row, ids in enumerate(texts.tolist()):
            num_written = self._num_written(ids[start:], stop)
            texts[row, start + num_written :] = self.eot_token_id
            if stored is not None:
                self.ratios.add(stored.ratio(row, num_rows=len(texts), num_steps=num_written))
            elif self.patterns is not None:
                first = int(generation_kwargs["attention_mask"][row].argmax())
                pattern = self.patterns.decode if num_written > 1 else self.patterns.prefill
                text = ids[first : start + num_written - 1]
                self.ratios.add(text_ratio(text, pattern, pads_by_id=False, attachment=self.attachment))
        return texts

    def _new_cache(self) -> SepCache:
        assert self.patterns is not None
        separators = self.patterns.prefill.separator_ids
        if separators and "model_type" in self.cache_options:
            raise ValueError(
                f"model_type and {self.sepllm_config or 'the configuration of the model'} both say which tokens separate: leave model_type out."
            )
        return SepCache(
            layer_num=self.patterns.prefill.num_layers,
            separator_token_ids=separators or None,
            PADDING_ID=self.tokenizer.pad_token_id,
            tokenizer=None if "model_type" in self.cache_options else self.tokenizer,
            **self.cache_options,
        )

    def _num_written(self, ids: Sequence[int], stop: Sequence[str]) -> int:
        """How many of ``ids`` were written until the first stop string was complete, or padding began; at least one."""
        strings = [string for string in stop if string]

        def is_over(count: int) -> bool:
            text = self.tokenizer.decode(ids[:count])
            return any(string in text for string in strings)

        count = bisect_left(range(len(ids) + 1), True, key=is_over)
        if count > len(ids):
            count = len(ids)
            while count > 1 and ids[count - 1] == self.tokenizer.pad_token_id:
                count -= 1
        return max(count, 1)


def _check_decode(decode: str, cache_options: dict[str, Any], *, token_by_token: bool) -> None:
    if decode not in get_args(Decode):
        raise ValueError(f"decode is {decode}: use {' or '.join(get_args(Decode))}.")
    if cache_options and decode != "sepcache":
        raise ValueError(f"{', '.join(cache_options)} in model_args is SepCache's: add decode=sepcache, or leave it out.")
    if token_by_token and decode != "sepcache":
        raise ValueError("token_by_token reads scored texts from a SepCache: add decode=sepcache, or leave it out.")


def _trained_patterns(config: PreTrainedConfig) -> Patterns | None:
    """What a model reads that was trained as SepLLM, wherever its code came from."""
    if config.model_type != SepLLMGPTNeoXConfig.model_type:
        return None
    known = SepLLMGPTNeoXConfig.from_dict(config.to_dict())
    return Patterns(known.prefill_pattern(), known.decode_pattern())


def _described(pattern: AttentionPattern) -> dict[str, object]:
    return {
        "initial_tokens": pattern.initial_tokens,
        "separator_ids": sorted(pattern.separator_ids),
        "windows": list(pattern.windows),
        "intervals": pattern.intervals and list(pattern.intervals),
    }
