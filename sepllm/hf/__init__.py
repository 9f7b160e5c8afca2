"""SepLLM models for transformers. Importing this package makes `sepllm_gpt_neox` known to AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sepllm.hf.configuration_sepllm_gpt_neox import SepLLMGPTNeoXConfig
from sepllm.hf.modeling_sepllm_gpt_neox import SepLLMGPTNeoXForCausalLM, SepLLMGPTNeoXModel, SepLLMGPTNeoXPreTrainedModel

AutoConfig.register("sepllm_gpt_neox", SepLLMGPTNeoXConfig, exist_ok=True)
AutoModel.register(SepLLMGPTNeoXConfig, SepLLMGPTNeoXModel, exist_ok=True)
AutoModelForCausalLM.register(SepLLMGPTNeoXConfig, SepLLMGPTNeoXForCausalLM, exist_ok=True)

__all__ = ["SepLLMGPTNeoXConfig", "SepLLMGPTNeoXForCausalLM", "SepLLMGPTNeoXModel", "SepLLMGPTNeoXPreTrainedModel"]
