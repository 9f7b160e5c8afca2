"""SepLLM models for transformers. Importing this package makes `sepllm_gpt_neox` known to AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sepllm.hf.attach import Attachment, attach, attachment_of, detach
from sepllm.hf.cache import SepCache
from sepllm.hf.complete import complete
from sepllm.hf.configuration_sepllm_gpt_neox import SepLLMGPTNeoXConfig
from sepllm.hf.modeling_sepllm_gpt_neox import SepLLMGPTNeoXForCausalLM, SepLLMGPTNeoXModel, SepLLMGPTNeoXPreTrainedModel
from sepllm.hf.sepllm_config import Patterns, read_sepllm_config

AutoConfig.register("sepllm_gpt_neox", SepLLMGPTNeoXConfig, exist_ok=True)
AutoModel.register(SepLLMGPTNeoXConfig, SepLLMGPTNeoXModel, exist_ok=True)
AutoModelForCausalLM.register(SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM, exist_ok=True)

__all__ = [
    "Attachment",
    "Patterns",
    "SepCache",
    "SepLLMGPTNeoXConfig",
    "SepLLMGPTNeoXForCausalLM",
    "SepLLMGPTNeoXModel",
    "SepLLMGPTNeoXPreTrainedModel",
    "attach",
    "attachment_of",
    "complete",
    "detach",
    "read_sepllm_config",
]
