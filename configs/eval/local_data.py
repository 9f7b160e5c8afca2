"""Rows of a jsonl file for the task files beside it: no hub, no network, no cache.

The folder is the `folder` of a task's `metadata` (`lm_eval --metadata '{"folder": "..."}'`), else the environment variable
SEPLLM_EVAL_DATA. lm-eval calls `load` with `metadata` and `dataset_kwargs` as keyword arguments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import datasets

Row = Mapping[str, object]


def load(
    *,
    file: str,
    split: str,
    folder: str | None = None,
    where: Mapping[str, object] | None = None,
    in_turns: str | None = None,
    **_: object,
) -> datasets.DatasetDict:
    """The rows of ``folder/file`` as the split ``split``; with ``where``, those whose fields have these values.

    ``in_turns``: a field; the first rows of all its values come before the second ones, so that a limit takes some of each.
    """
    folder = folder or os.environ.get("SEPLLM_EVAL_DATA")
    if not folder:
        raise ValueError(f"No folder is named in which to look for {file}: set SEPLLM_EVAL_DATA to the one that holds it.")
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"{path} does not exist: SEPLLM_EVAL_DATA (or `folder`) must name the folder that holds {file}.")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    rows = [row for row in rows if all(row.get(field) == value for field, value in (where or {}).items())]
    if not rows:
        raise ValueError(f"{path} has no rows" + (f" with {dict(where)}." if where else "."))
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows if in_turns is None else _in_turns(rows, in_turns))})


def _in_turns(rows: Sequence[Row], field: str) -> list[Row]:
    turns = {value: count() for value in {row.get(field) for row in rows}}
    return [row for _, row in sorted(((next(turns[row.get(field)]), row) for row in rows), key=lambda pair: pair[0])]
