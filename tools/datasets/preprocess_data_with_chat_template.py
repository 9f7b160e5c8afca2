"""Conversations to token files and label files, so that only what the assistant says is learned.

    python -m tools.datasets.preprocess_data_with_chat_template --input chats.jsonl --tokenizer-path hf/my-chat-model --output-prefix data/chats

reads a list of {"role": ..., "content": ...} a line, under `conversation`, and writes <prefix>_conversation_document for `train_data_paths` and
<prefix>_conversation_label_document for `train_label_data_paths`. The flags are those of GPT-NeoX's script of this name, less those of reward
models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also from a checkout that is not installed

from tools.command import exit_status
from tools.datasets.conversations import ChatRecipe
from tools.datasets.preprocess import add_common_flags, run

REWARDS = {"for_rm": "--for-rm", "reward_key": "--reward-key", "binary_reward": "--binary-reward"}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    def write() -> None:
        for name, flag in REWARDS.items():
            if getattr(options, name):
                raise ValueError(f"{flag} makes data for reward models and preferences, which this project does not train: leave it out.")
        recipe = ChatRecipe(
            tokenizer_path=options.tokenizer_path,
            keys=tuple(options.jsonl_keys),
            generation_role=options.generation_role,
            only_last=options.only_last,
            has_labels=not options.no_mask,
            ftfy=options.ftfy,
        )
        run(recipe, options)

    return exit_status(write)


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="tools.datasets.preprocess_data_with_chat_template", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--tokenizer-path", required=True, help="folder or hub name of a transformers tokenizer with a chat template")
    flags.add_argument("--jsonl-keys", nargs="+", default=["conversation"], help="fields that hold conversations (default: conversation)")
    flags.add_argument("--no-mask", action="store_true", help="learn everything: no label files")
    flags.add_argument("--generation-role", default="assistant", help="whose turns are learned (default: %(default)s)")
    flags.add_argument("--only-last", action="store_true", help="learn the last turn alone")
    flags.add_argument("--for-rm", action="store_true", help="refused, as are the next two: reward models are not trained here")
    flags.add_argument("--reward-key")
    flags.add_argument("--binary-reward", action="store_true")
    add_common_flags(flags)
    return flags


if __name__ == "__main__":
    sys.exit(main())
