"""The order of tokens, bit for bit: every case of tests/golden/data/data_golden.json."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.config.schema import DataConfig
from megatron.data.blend import BlendedDataset, samples_of_parts, split_bounds, weights_by_num_documents
from megatron.data.build import build_datasets, sample_counts
from megatron.data.gpt_dataset import IGNORED_LABEL, GPTDataset, read_samples
from megatron.data.index_builder import blend_index
from megatron.data.index_cache import masked_sequences
from megatron.data.indexed import CODES, IndexedDataset, IndexedDatasetWriter
from megatron.data.loader import Places
from megatron.data.packing import SampleRequest, build_index, num_epochs

FOLDER = Path(__file__).parents[2] / "golden" / "data"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "data_golden.json").read_text())


def sha256(data: bytes | NDArray) -> str:
    """Of the bytes of a file, or of an array written as compact JSON."""
    return hashlib.sha256(data if isinstance(data, bytes) else json.dumps(data.tolist(), separators=(",", ":")).encode()).hexdigest()


def open_case(case: dict[str, Any], *, labels: bool = False) -> GPTDataset:
    """The samples of a golden case, its index built without a cache."""
    tokens = IndexedDataset(FOLDER / case.get("data", "sft_text"))
    first, last = case.get("documents", [0, len(tokens)])
    request = SampleRequest(
        first_document=first,
        last_document=last,
        seq_length=case["seq_length"],
        num_samples=case["num_samples"],
        num_epochs=case.get("num_epochs_given"),
        seed=case.get("seed", 1234),
        pack_impl="pack_until_overflow" if "starts" in case else "packed",
        allow_chopped=case.get("allow_chopped", True),
    )
    label = IndexedDataset(FOLDER / "sft_label") if labels else None
    is_masked = masked_sequences(label, case["seq_length"] + 1) if label is not None and "starts" in case else None
    if "num_epochs" in case:
        assert num_epochs(request, tokens.sizes) == case["num_epochs"]
    return GPTDataset(tokens, build_index(request, tokens.sizes, is_masked=is_masked), seq_length=request.seq_length, labels=label)


@pytest.mark.parametrize("name", GOLDEN["fixtures"])
def test_fixture_is_read_and_written_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    expected = GOLDEN["fixtures"][name]
    read = IndexedDataset(FOLDER / name)
    assert read.sizes.tolist() == expected["sizes"]
    assert read.dtype == CODES[expected["dtype_code"]]
    with IndexedDatasetWriter(tmp_path / name, read.dtype) as writer:
        for sequence in range(len(read)):
            writer.add_document(read[sequence].tolist())
    assert sha256((tmp_path / f"{name}.bin").read_bytes()) == expected["bin_sha256"]
    assert sha256((tmp_path / f"{name}.idx").read_bytes()) == expected["idx_sha256"]


@pytest.mark.parametrize("seed", GOLDEN["mt19937"])
def test_both_shuffles_come_from_one_generator(seed: str) -> None:
    generator = np.random.RandomState(int(seed))
    first, second = np.arange(20, dtype=np.int32), np.arange(7, dtype=np.uint32)
    generator.shuffle(first)
    generator.shuffle(second)
    assert [first.tolist(), second.tolist()] == GOLDEN["mt19937"][seed]["shuffle20_then7"]


@pytest.mark.parametrize("case", GOLDEN["packed"], ids=lambda case: case["tag"])
def test_packed_samples_are_gpt_neoxs(case: dict[str, Any]) -> None:
    dataset = open_case(case)
    index = dataset.index
    assert len(dataset) == case["len"]
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        assert sha256(getattr(index, name)) == case[f"{name}_sha256"], name
        if name in case:
            assert getattr(index, name).tolist() == case[name]
    rows = read_samples(dataset, range(len(dataset))).text
    assert rows[: len(case["first"])].tolist() == case["first"]
    assert rows[-len(case["last"]) :].tolist() == case["last"]
    assert rows.dtype == np.int64
    assert sha256(rows) == case["samples_sha256"]


def test_label_rows_follow_their_text_rows() -> None:
    case = GOLDEN["labels_packed"]
    dataset = open_case(case, labels=True)
    assert len(dataset) == case["len"]
    rows = read_samples(dataset, range(len(dataset)))
    assert rows.label is not None
    assert [list(pair) for pair in zip(rows.text.tolist(), rows.label.tolist(), strict=True)] == case["rows"]


@pytest.mark.parametrize("case", GOLDEN["pack_until_overflow"], ids=lambda case: f"{case['seq_length']}-{case['labels']}-{case['allow_chopped']}")
def test_pack_until_overflow_takes_gpt_neoxs_packs(case: dict[str, Any]) -> None:
    index = open_case(case, labels=case["labels"]).index
    assert index.doc_idx.tolist() == case["doc_idx"]
    assert index.sample_idx.tolist() == case["starts"]
    assert index.shuffle_idx.tolist() == case["shuffle_idx"]


@pytest.mark.parametrize("case", GOLDEN["pack_until_overflow"], ids=lambda case: f"{case['seq_length']}-{case['labels']}-{case['allow_chopped']}")
def test_pack_until_overflow_rows_are_gpt_neoxs_without_the_next_packs_first_token(case: dict[str, Any]) -> None:
    dataset = open_case(case, labels=case["labels"])
    assert len(dataset) == case["len"] + 1  # GPT-NeoX never shows the last of the samples asked for
    for place, golden in enumerate(case["rows"]):
        sample = dataset.index.shuffle_idx[place]
        pack = dataset.index.doc_idx[dataset.index.sample_idx[sample] : dataset.index.sample_idx[sample + 1]]
        filled = min(int(dataset.tokens.sizes[pack].sum()), case["seq_length"] + 1)
        row = read_samples(dataset, [place])
        assert row.label is not None
        assert row.text[0, :filled].tolist() == golden[0][:filled]
        assert not row.text[0, filled:].any()
        assert (row.label[0, filled:] == IGNORED_LABEL).all()
        if case["labels"]:
            assert row.label[0, :filled].tolist() == golden[1][:filled]
        assert not any(golden[0][filled + 1 :])


@pytest.mark.parametrize("case", GOLDEN["split"], ids=lambda case: f"{case['split']}-{case['documents']}")
def test_split_borders(case: dict[str, Any]) -> None:
    assert list(split_bounds(case["split"], case["documents"])) == case["bounds"]


@pytest.mark.parametrize("case", GOLDEN["blend"], ids=lambda case: str(case["weights"]))
def test_blend_order_and_the_samples_of_its_parts(case: dict[str, Any]) -> None:
    weights = np.array(case["weights"]) / np.sum(case["weights"])
    parts, rows = blend_index(weights, case["size"])
    assert parts.tolist() == case["dataset_index"]
    assert rows.tolist() == case["dataset_sample_index"]
    assert samples_of_parts(case["weights"], 100) == case["num_samples_for_100"]


@pytest.mark.parametrize("case", GOLDEN["weights_by_num_docs"], ids=lambda case: str(case["docs"]))
def test_weights_by_number_of_documents(case: dict[str, Any]) -> None:
    assert weights_by_num_documents(case["docs"], alpha=case["alpha"]) == case["weights"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> BlendedDataset:
    """The golden run's training blend, through the configuration; the caches lie in a copy."""
    case = GOLDEN["run"]
    folder = tmp_path_factory.mktemp("run")
    for name in case["data"]:
        for kind in ("bin", "idx"):
            (folder / f"{name}.{kind}").write_bytes((FOLDER / f"{name}.{kind}").read_bytes())
    data = DataConfig(train_data_paths=tuple(str(folder / name) for name in case["data"]), train_data_weights=tuple(case["weights"]))
    counts = sample_counts(train_iters=case["iters"], eval_interval=1000, eval_iters=0, train_batch_size=case["micro"] * case["dp"] * case["gas"])
    dataset = build_datasets(data, seq_length=case["seq_length"], samples=counts, seed=case["seed"]).train
    assert isinstance(dataset, BlendedDataset)
    assert len(dataset) == case["blend_len"]
    assert [part.index.num_rows >= wanted for part, wanted in zip(dataset.parts, case["num_samples"], strict=True)] == [True, True]  # type: ignore[attr-defined]
    return dataset


def micro_batches(dataset: BlendedDataset, *, rank: int, first: int = 0) -> list[list[list[int]]]:
    case = GOLDEN["run"]
    num_samples = case["micro"] * case["dp"] * case["gas"] * case["iters"]
    places = Places(num_samples=num_samples, micro_batch_size=case["micro"], rank=rank, num_ranks=case["dp"], first=first, passes=1)
    return [read_samples(dataset, batch).text.tolist() for batch in places]


def test_a_two_rank_run_reads_gpt_neoxs_samples(run: BlendedDataset) -> None:
    case = GOLDEN["run"]
    ranks = [micro_batches(run, rank=rank) for rank in range(case["dp"])]
    assert [list(step) for step in zip(*ranks, strict=True)] == case["micro_steps"]


def test_a_resumed_run_goes_on_where_it_stopped(run: BlendedDataset) -> None:
    case = GOLDEN["run"]
    resume = case["resume"]
    assert resume["start_micro_step"] == resume["iteration"] * case["gas"]
    consumed = resume["iteration"] * case["gas"] * case["micro"] * case["dp"]
    assert micro_batches(run, rank=1, first=consumed)[0] == resume["first_rank1"]


@pytest.mark.parametrize("layout", GOLDEN["layout_invariance"])
def test_a_step_consumes_the_same_samples_in_every_layout(layout: str) -> None:
    micro, ranks, accumulation = map(int, layout.split("x"))
    per_rank = [list(Places(num_samples=24, micro_batch_size=micro, rank=rank, num_ranks=ranks, first=0, passes=1)) for rank in range(ranks)]
    micro_steps = [list(itertools.chain(*step)) for step in zip(*per_rank, strict=True)]
    steps = [list(itertools.chain(*micro_steps[start : start + accumulation])) for start in range(0, len(micro_steps), accumulation)]
    assert steps == GOLDEN["layout_invariance"][layout]
