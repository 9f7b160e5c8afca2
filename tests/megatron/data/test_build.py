from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import DataConfig
from megatron.data.blend import BlendedDataset
from megatron.data.build import Datasets, IndexBuilder, SampleCounts, build_datasets, sample_counts
from megatron.data.gpt_dataset import GPTDataset, read_samples
from megatron.data.indexed import IndexedDatasetWriter


def write(prefix: Path, *, documents: int = 40, first: int = 0) -> str:
    with IndexedDatasetWriter(prefix, "i4") as writer:
        for document in range(documents):
            writer.add_document(first + document * 10 + np.arange(document % 7 + 3))
    return str(prefix)


def build(data: DataConfig, *, train: int | None = 20, valid: int | None = 8, test: int | None = 4) -> Datasets:
    return build_datasets(data, seq_length=4, samples=SampleCounts(train=train, valid=valid, test=test), seed=1234)


def test_sample_counts_are_gpt_neoxs() -> None:
    counts = sample_counts(train_iters=143000, eval_interval=1000, eval_iters=10, train_batch_size=1024)
    assert counts == SampleCounts(train=146_432_000, valid=144 * 10 * 1024, test=10 * 1024)


def test_a_run_that_goes_on_with_other_batches_reads_what_it_has_read_and_what_is_left() -> None:
    counts = sample_counts(train_iters=100, eval_interval=1000, eval_iters=10, train_batch_size=2, iteration=60, consumed_samples=60 * 8)
    assert counts.train == 60 * 8 + 40 * 2


def test_epochs_leave_the_counts_to_the_data(tmp_path: Path) -> None:
    counts = sample_counts(train_iters=None, eval_interval=1000, eval_iters=10, train_batch_size=1024)
    assert counts == SampleCounts(train=None, valid=None, test=None)
    datasets = build_datasets(DataConfig(train_data_paths=(write(tmp_path / "x"),)), seq_length=4, samples=counts, seed=1)
    assert isinstance(datasets.train, BlendedDataset)
    assert len(datasets.train) == (sum(document % 7 + 3 for document in range(40)) - 1) // 4 - 1
    assert (tmp_path / "x_train_0_indexmap_Nonens_4sl_1s_packedpi_ac_doc_idx.npy").is_file()


def test_data_path_is_cut_by_split(tmp_path: Path) -> None:
    datasets = build(DataConfig(data_path=write(tmp_path / "x"), split="8,1,1"))
    documents = [set(part.index.doc_idx.tolist()) for part in (datasets.train, datasets.valid, datasets.test) if isinstance(part, GPTDataset)]
    assert documents == [set(range(32)), set(range(32, 36)), set(range(36, 40))]


def test_an_empty_split_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    datasets = build(DataConfig(data_path=write(tmp_path / "x"), split="100"))
    assert (datasets.valid, datasets.test) == (None, None)
    assert "leaves no document of 40 for valid" in caplog.text


def test_splits_nobody_reads_are_not_built(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    datasets = build(DataConfig(train_data_paths=(prefix,), valid_data_paths=(prefix,)), valid=0)
    assert (datasets.valid, datasets.test) == (None, None)
    assert not list(tmp_path.glob("*valid*"))


def test_each_part_gets_its_share_and_half_a_percent(tmp_path: Path) -> None:
    build(DataConfig(train_data_paths=(write(tmp_path / "a"), write(tmp_path / "b")), train_data_weights=(1.0, 3.0)), train=1000)
    assert len(list(tmp_path.glob("a_train_0_indexmap_252ns_4sl_1234s_packedpi_ac_doc_idx.npy"))) == 1
    assert len(list(tmp_path.glob("b_train_1_indexmap_754ns_4sl_1234s_packedpi_ac_doc_idx.npy"))) == 1


def test_label_files_give_every_sample_labels(tmp_path: Path) -> None:
    data = DataConfig(train_data_paths=(write(tmp_path / "x"),), train_label_data_paths=(write(tmp_path / "y", first=5000),))
    train = build(data).train
    assert train is not None
    samples = read_samples(train, [3])
    assert samples.label is not None
    assert ((samples.label - samples.text) == 5000).all()


@pytest.mark.parametrize("use_shared_fs", [True, False])
def test_the_first_rank_of_those_that_share_a_folder_builds(use_shared_fs: bool) -> None:
    builders = [
        IndexBuilder.of_rank(rank=rank, local_rank=rank % 2, use_shared_fs=use_shared_fs, barrier=lambda: None).is_builder for rank in range(4)
    ]
    assert builders == ([True, False, False, False] if use_shared_fs else [True, False, True, False])


def test_every_rank_waits_once_for_each_index(tmp_path: Path) -> None:
    data = DataConfig(data_path=write(tmp_path / "x"), split="8,1,1")
    waits = []
    for is_builder in (True, False):
        reached: list[int] = []
        builder = IndexBuilder(is_builder=is_builder, barrier=lambda reached=reached: reached.append(1))  # type: ignore[misc]
        build_datasets(data, seq_length=4, samples=SampleCounts(train=20, valid=8, test=4), seed=1, builder=builder)
        waits.append(len(reached))
    assert waits == [3, 3]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "Neither data_path nor train_data_paths is set"),
        ({"train_data_paths": ("x",), "train_data_weights": (1.0, 2.0)}, "train_data_weights has 2 entries and train_data_paths 1"),
        ({"train_data_paths": ("x",), "train_label_data_paths": ("x", "x")}, "train_label_data_paths has 2 entries"),
        ({"train_data_paths": ("x", "x"), "train_data_weights": (1.0, 0.0)}, "gives .* no sample"),
    ],
)
def test_contradicting_keys_are_refused(keys: dict[str, tuple[str, ...]], message: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    placed = {key: tuple(prefix if name == "x" else name for name in value) for key, value in keys.items()}
    with pytest.raises(ValueError, match=message):
        build(DataConfig(**placed))  # type: ignore[arg-type]


def test_of_many_files_the_one_that_has_no_documents_is_named(tmp_path: Path) -> None:
    paths = (write(tmp_path / "some"), write(tmp_path / "none", documents=0))
    with pytest.raises(ValueError, match=f"{paths[1]}: Sequences 0 to 0 were asked for"):
        build(DataConfig(train_data_paths=paths))


def test_a_run_of_no_steps_has_no_training_data_in_whichever_way_it_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x")
    assert build(DataConfig(data_path=prefix), train=0).train is None
    assert build(DataConfig(train_data_paths=(prefix,)), train=0).train is None


def test_validation_without_paths_is_left_out(tmp_path: Path) -> None:
    assert build(DataConfig(train_data_paths=(write(tmp_path / "x"),))).valid is None


def test_weights_can_follow_the_documents(tmp_path: Path) -> None:
    paths = (write(tmp_path / "a", documents=10), write(tmp_path / "b", documents=30))
    train = build(DataConfig(train_data_paths=paths, weight_by_num_documents=True, weighted_sampler_alpha=0.0), train=40).train
    assert isinstance(train, BlendedDataset)
    assert np.bincount(train.part_of[:40]).tolist() == [30, 10]
