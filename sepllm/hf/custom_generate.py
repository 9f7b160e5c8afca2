"""Generation from a SepCache as transformers' ``custom_generate`` wants it: for models that are not attached to, arguments of both in one call.

    model.generate(**inputs, custom_generate="folder", trust_remote_code=True, init_cache_size=4, cache_size=512, USE_MAX_SEP_CACHE=True)

`sepllm.hf.bundle.write_custom_generate` writes the folder.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sepllm.hf.attach import attach, attachment_of, reads_as_trained
from sepllm.hf.cache import SepCache


def generate(
    model: PreTrainedModel, inputs: Tensor | None = None, *, past_key_values: SepCache | None = None, **kwargs: object
) -> Tensor | ModelOutput:
    """What ``model.generate`` returns, with the keys in a `SepCache`: ``past_key_values``, or a new one from its own arguments among ``kwargs``.

    Separators follow from ``separator_token_ids`` and ``PADDING_ID``, from the ``tokenizer``, or from the type of the model.
    """
    names = set(inspect.signature(SepCache).parameters) - {"tokenizer"}
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if past_key_values is None:
        settings.setdefault("layer_num", model.get_decoder().config.num_hidden_layers)
        if kwargs.get("tokenizer") is None:
            settings.setdefault("model_type", model.config.model_type)
        past_key_values = SepCache(**settings, tokenizer=kwargs.get("tokenizer"))  # type: ignore[arg-type]
    elif settings:
        raise ValueError(f"past_key_values is given, and {', '.join(sorted(settings))} of another cache: leave one of them out.")
    with nullcontext() if reads_as_trained(model) or attachment_of(model) is not None else attach(model):
        return model.generate(inputs, past_key_values=past_key_values, **kwargs)
