"""lm-eval's scores of models that read as SepLLM: ``python -m sepllm.lm_eval`` is lm-eval's own command line with more ``--model_args``.

For programs: importing `sepllm.lm_eval.model` makes the model ``sepllm`` known to ``lm_eval.simple_evaluate``. Needs ``sepllm[eval]``.
"""
