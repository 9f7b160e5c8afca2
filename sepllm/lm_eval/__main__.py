"""``python -m sepllm.lm_eval``: lm-eval's command line, where ``hf``, its default model, also takes ``sepllm_config`` and ``decode``."""

from __future__ import annotations

import sys

HUGGING_FACE = ("hf", "hf-auto", "huggingface")
"""lm-eval's names of the model that `SepLLMModel` extends."""


def main() -> int:
    """The exit status; 2, and a sentence, where the input is wrong."""
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        import sepllm.lm_eval.model  # noqa: F401  registers the model
    except ModuleNotFoundError as missing:
        print(f"{(missing.name or '').partition('.')[0]} is not installed: pip install 'sepllm[eval]' brings what lm-eval needs.", file=sys.stderr)
        return 2
    setup_logging()
    command = HarnessCLI()
    try:
        arguments = command.parse_args()
        if arguments.command == "run":
            arguments.model = _model(arguments.model, arguments.config)
        command.execute(arguments)
    except (ValueError, FileNotFoundError) as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


def _model(given: str | None, config: str | None) -> str:
    """The model that the command line names, or its ``--config`` file, or lm-eval's default; ours in the place of ``hf``."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    name = given or (EvaluatorConfig.load_yaml_config(config).get("model") if config else None) or HUGGING_FACE[0]
    return "sepllm" if name in HUGGING_FACE else name


if __name__ == "__main__":
    sys.exit(main())
