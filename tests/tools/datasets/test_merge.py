from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import HEADER, MAGIC, IndexedDataset, IndexedDatasetWriter, index_bytes
from tests.tools.datasets.writing import write_pair, write_sparse_pair
from tools.datasets.merge import main, merge


def test_merged_pairs_are_what_one_writer_would_have_written(tmp_path: Path) -> None:
    first = write_pair(tmp_path / "a", [[1, 2], [], [3]])
    with IndexedDatasetWriter(tmp_path / "b", "u2") as writer:
        for row in ([4], [5, 6]):
            writer.add(row)
        writer.end_document()
        writer.add_document([7])
    with IndexedDatasetWriter(tmp_path / "expected", "u2") as writer:
        for row in ([1, 2], [], [3]):
            writer.add_document(row)
        for row in ([4], [5, 6]):
            writer.add(row)
        writer.end_document()
        writer.add_document([7])
    merge([first, str(tmp_path / "b")], str(tmp_path / "out" / "both"))
    for kind in ("bin", "idx"):
        assert (tmp_path / "out" / f"both.{kind}").read_bytes() == (tmp_path / f"expected.{kind}").read_bytes()


def test_a_folder_is_merged_by_name_and_says_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b", "a", "c"):
        write_pair(tmp_path / "in" / name, [[ord(name)]])
    assert main(["--input", f"{tmp_path}/in", "--output-prefix", f"{tmp_path}/all"]) == 0
    assert [row.tolist() for row in IndexedDataset(tmp_path / "all")] == [[97], [98], [99]]
    assert "3 documents, 3 sequences, 3 tokens" in capsys.readouterr().out


def test_offsets_beyond_32_bits_add_up(tmp_path: Path) -> None:
    first = write_sparse_pair(tmp_path / "a", [2_000_000_000, 600_000_000], "u2")
    second = write_sparse_pair(tmp_path / "b", [5, 2_147_483_647], "u2")
    merged = merge([first, second], str(tmp_path / "both"))
    assert merged.offsets.tolist() == [0, 4_000_000_000, 5_200_000_000, 5_200_000_010]
    assert [int(merged.get(number, 0, 1)[0]) for number in range(4)] == [1, 2, 1, 2]
    assert [int(merged.get(number, int(merged.sizes[number]) - 1)[0]) for number in range(4)] == [1, 2, 1, 2]
    assert merged.num_tokens == 4_747_483_652


def test_every_sequence_of_a_file_without_documents_is_one(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [[1], [2, 3]])
    (tmp_path / "a.idx").write_bytes(index_bytes(np.dtype("<u2"), sizes=np.array([1, 2]), offsets=np.array([0, 2]), doc_idx=np.array([0])))
    assert merge([prefix, prefix], str(tmp_path / "both")).doc_idx.tolist() == [0, 1, 2, 3, 4]


def test_tokens_in_another_order_than_their_sequences_stay_where_they_are(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [[1, 2], [3]])
    path = tmp_path / "a.idx"
    path.write_bytes(index_bytes(np.dtype("<u2"), sizes=np.array([1, 2]), offsets=np.array([4, 0]), doc_idx=np.array([0, 1, 2])))
    with open(tmp_path / "a.bin", "ab") as file:
        file.write(b"\7")  # half a token, which belongs to nobody
    merged = merge([prefix, prefix], str(tmp_path / "both"))
    assert [row.tolist() for row in merged] == [[3], [1, 2], [3], [1, 2]]


def test_pairs_of_different_dtypes_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_pair(tmp_path / "a", [[1]], "u2"), write_pair(tmp_path / "b", [[1]], "i4")
    assert main(["--input", first, second, "--output-prefix", f"{tmp_path}/out/both"]) == 2
    assert f"{second} holds int32 and {first} uint16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_pair_leaves_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_pair(tmp_path / "a", [[1]]), write_pair(tmp_path / "b", [[1]])
    (tmp_path / "b.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 2**60, 1))
    assert main(["--input", first, second, "--output-prefix", f"{tmp_path}/both"]) == 2
    assert "promises 1152921504606846976 sequences" in capsys.readouterr().err
    assert not list(tmp_path.glob("both*"))


@pytest.mark.parametrize(
    ("inputs", "message"), [(["a"], "is one of the pairs to merge"), (["empty"], "holds no .idx file"), (["none"], "does not exist")]
)
def test_what_cannot_be_merged_is_a_sentence(inputs: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path / "a", [[1]])
    (tmp_path / "empty").mkdir()
    assert main(["--input", *(str(tmp_path / name) for name in inputs), "--output-prefix", f"{tmp_path}/a"]) == 2
    assert message in capsys.readouterr().err
