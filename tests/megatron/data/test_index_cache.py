from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import index_cache
from megatron.data.index_cache import cache_names, open_index
from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.packing import SampleIndex, SampleRequest, build_index

REQUEST = SampleRequest(first_document=0, last_document=20, seq_length=7, num_samples=30, seed=1234)
SIZES = np.random.RandomState(0).randint(0, 15, 20)


def write(folder: Path, sizes: np.ndarray = SIZES) -> IndexedDataset:
    with IndexedDatasetWriter(folder / "data", "u2") as writer:
        for size in sizes:
            writer.add_document(np.arange(size))
    return IndexedDataset(folder / "data")


@pytest.fixture
def tokens(tmp_path: Path) -> IndexedDataset:
    return write(tmp_path)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[SampleRequest]:
    """The requests that were built rather than found."""
    built: list[SampleRequest] = []

    def counted(request: SampleRequest, *args: object, **kwargs: object) -> SampleIndex:
        built.append(request)
        return build_index(request, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(index_cache, "build_index", counted)
    return built


def is_right(index: SampleIndex, tokens: IndexedDataset, request: SampleRequest = REQUEST) -> bool:
    expected = build_index(request, tokens.sizes)
    return all(np.array_equal(getattr(index, name), getattr(expected, name)) for name in ("doc_idx", "sample_idx", "shuffle_idx"))


def array_path(tokens: IndexedDataset, array: str, *, old_name: bool = False) -> Path:
    return Path(f"{cache_names(tokens.prefix, 'train_0', REQUEST)[old_name]}_{array}.npy")


def write_foreign(tokens: IndexedDataset, request: SampleRequest = REQUEST, *, old_name: bool) -> None:
    """What GPT-NeoX leaves: the arrays, no sidecar."""
    index = build_index(request, tokens.sizes)
    for array in ("doc_idx", "sample_idx", "shuffle_idx"):
        np.save(array_path(tokens, array, old_name=old_name), getattr(index, array))


def test_names_are_gpt_neoxs_and_pythias() -> None:
    request = SampleRequest(first_document=0, last_document=1, seq_length=2048, num_samples=147164160, seed=1234)
    assert cache_names("/data/pile", "train_0", request) == (
        "/data/pile_train_0_indexmap_147164160ns_2048sl_1234s_packedpi_ac",
        "/data/pile_train_0_indexmap_147164160ns_2048sl_1234s",
    )
    epochs = replace(request, num_samples=None, num_epochs=1, pack_impl="pack_until_overflow", allow_chopped=False)
    assert cache_names("x", "valid_0", epochs) == ("x_valid_0_indexmap_Nonens_2048sl_1234s_pack_until_overflowpi",)


def test_the_second_start_maps_what_the_first_built(tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    for _ in range(3):
        index = open_index(tokens, "train_0", REQUEST)
        assert is_right(index, tokens)
        assert isinstance(index.doc_idx, np.memmap)
    assert len(builds) == 1
    assert not [path for path in Path(tokens.prefix).parent.iterdir() if path.suffix == ".part"]


CHANGES: dict[str, Callable[[SampleRequest], SampleRequest]] = {
    "documents": lambda request: replace(request, first_document=1),
    "the end of the documents": lambda request: replace(request, last_document=19),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_the_same_name_for_other_documents_is_not_used(change: str, tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    open_index(tokens, "train_0", REQUEST)
    other = CHANGES[change](REQUEST)
    assert cache_names(tokens.prefix, "train_0", other) == cache_names(tokens.prefix, "train_0", REQUEST)
    assert is_right(open_index(tokens, "train_0", other), tokens, other)
    assert len(builds) == 2


def test_a_cache_is_not_used_after_its_data_was_made_anew(tokens: IndexedDataset, caplog: pytest.LogCaptureFixture) -> None:
    open_index(tokens, "train_0", REQUEST)
    again = write(Path(tokens.prefix).parent, SIZES[::-1])
    assert is_right(open_index(again, "train_0", REQUEST), again)
    assert "it was made for other data or other settings" in caplog.text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("array", ["doc_idx", "sample_idx", "shuffle_idx"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["cut", "flipped", "missing", "empty"])
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_a_damaged_array_is_built_anew(
    array: str, damage: Callable[[Path], object], has_sidecar: bool, tokens: IndexedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if has_sidecar:
        open_index(tokens, "train_0", REQUEST)
    else:
        write_foreign(tokens, old_name=False)
    caplog.clear()
    damage(array_path(tokens, array))
    assert is_right(open_index(tokens, "train_0", REQUEST), tokens)
    assert "Building the sample index" in caplog.text
    assert is_right(open_index(tokens, "train_0", REQUEST, is_builder=False), tokens)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"request": {}, "files": {}}', '{"request": {}, "files": {"doc_idx": 3}}'])
def test_a_damaged_sidecar_is_not_trusted(content: str, tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    open_index(tokens, "train_0", REQUEST)
    Path(f"{cache_names(tokens.prefix, 'train_0', REQUEST)[0]}_index.json").write_text(content)
    assert is_right(open_index(tokens, "train_0", REQUEST), tokens)
    assert len(builds) == 2


@pytest.mark.parametrize("old_name", [False, True])
def test_arrays_of_gpt_neox_are_taken_if_they_fit(old_name: bool, tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    write_foreign(tokens, old_name=old_name)
    for is_builder in (True, False, True):
        assert is_right(open_index(tokens, "train_0", REQUEST, is_builder=is_builder), tokens)
    assert builds == []


@pytest.mark.parametrize("old_name", [False, True])
def test_arrays_of_gpt_neox_for_other_data_are_not_taken(old_name: bool, tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    write_foreign(tokens, replace(REQUEST, first_document=3), old_name=old_name)
    assert is_right(open_index(tokens, "train_0", REQUEST), tokens)
    assert len(builds) == 1


def test_a_folder_that_cannot_be_written_costs_a_build_at_each_start(
    tokens: IndexedDataset, builds: list[SampleRequest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(index_cache, "_write", refuse)
    for is_builder in (True, False):
        assert is_right(open_index(tokens, "train_0", REQUEST, is_builder=is_builder), tokens)
    assert len(builds) == 2
    assert "cannot be kept (read-only)" in caplog.text


def test_others_look_only_after_the_barrier(tokens: IndexedDataset, builds: list[SampleRequest]) -> None:
    index = open_index(tokens, "train_0", REQUEST, is_builder=False, barrier=lambda: void(open_index(tokens, "train_0", REQUEST)))
    assert is_right(index, tokens)
    assert len(builds) == 1


def test_the_barrier_is_reached_even_if_the_build_fails(tokens: IndexedDataset) -> None:
    reached: list[bool] = []
    with pytest.raises(ValueError, match="inside"):
        open_index(tokens, "train_0", replace(REQUEST, last_document=99), barrier=lambda: reached.append(True))
    assert reached == [True]


def void(value: object) -> None:
    """For lambdas that must return nothing."""


def npy(values: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)  # type: ignore[arg-type]
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.arange(3))
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    """An array file with this header, and some bytes behind it."""
    content = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + bytes(64)


HOSTILE = {
    "an archive of arrays": npz(),
    "the beginning of an archive": b"PK\x03\x04 and no more",
    "objects": npy(np.array([{}, 3], dtype=object)),
    "floats": npy(np.zeros(20)),
    "one number": npy(np.int32(3)),
    "a cube": npy(np.zeros((2, 2, 2), dtype=np.int32)),
    "no rows": npy(np.zeros((0, 2), dtype=np.int32)),
    "no dtype": npy_header("{'descr': (), 'fortran_order': False, 'shape': (3,)}"),
    "an open bracket": npy_header("{'descr': ("),
    "fewer than no rows": npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (-3,)}"),
    "more rows than bytes": npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904,)}"),
    "brackets in brackets": npy_header("(" * 5000),
    "a huge item": npy_header("{'descr': '<i99999999999999999999', 'fortran_order': False, 'shape': (3,)}"),
}


def forge(tokens: IndexedDataset, array: str) -> None:
    """Makes the sidecar vouch for the array as it is now."""
    path = array_path(tokens, array)
    sidecar = Path(f"{cache_names(tokens.prefix, 'train_0', REQUEST)[0]}_index.json")
    content = json.loads(sidecar.read_text())
    content["files"][array] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    sidecar.write_text(json.dumps(content))


@pytest.mark.parametrize("array", ["doc_idx", "sample_idx", "shuffle_idx"])
@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_a_file_that_is_no_index_is_built_anew(array: str, content: str, has_sidecar: bool, tokens: IndexedDataset) -> None:
    if has_sidecar:
        open_index(tokens, "train_0", REQUEST)
    else:
        write_foreign(tokens, old_name=False)
    array_path(tokens, array).write_bytes(HOSTILE[content])
    if has_sidecar:
        forge(tokens, array)
    assert is_right(open_index(tokens, "train_0", REQUEST, is_builder=False), tokens)
    assert is_right(open_index(tokens, "train_0", REQUEST), tokens)


@settings(max_examples=120, deadline=None)
@given(place=st.integers(0, 200), change=st.binary(min_size=1, max_size=8), array=st.sampled_from(["doc_idx", "sample_idx", "shuffle_idx"]))
def test_a_mutated_array_that_its_sidecar_vouches_for_is_an_index_or_built_anew(
    place: int, change: bytes, array: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = write(tmp_path_factory.mktemp("mutated"))
    open_index(tokens, "train_0", REQUEST)
    path = array_path(tokens, array)
    content = bytearray(path.read_bytes())
    content[place : place + len(change)] = change
    path.write_bytes(bytes(content))
    forge(tokens, array)
    index = open_index(tokens, "train_0", REQUEST)
    assert index.sample_idx.shape == (index.num_rows + 1, 2)
    assert all(values.dtype.kind in "iu" for values in (index.doc_idx, index.sample_idx, index.shuffle_idx))


def test_a_sidecar_of_brackets_in_brackets_is_built_anew(tokens: IndexedDataset) -> None:
    open_index(tokens, "train_0", REQUEST)
    Path(f"{cache_names(tokens.prefix, 'train_0', REQUEST)[0]}_index.json").write_text("[" * 200_000)
    assert is_right(open_index(tokens, "train_0", REQUEST), tokens)


def test_an_index_beside_data_without_tokens_is_refused_in_a_sentence(tmp_path: Path) -> None:
    full = write(tmp_path)
    write_foreign(full, old_name=False)
    with pytest.raises(ValueError, match="hold no tokens"):
        open_index(write(tmp_path, np.zeros(20, dtype=int)), "train_0", REQUEST)


OLD_SIZES = np.array([5, 9, 3, 8, 6, 4, 7, 2])
NEW_SIZES = np.array([5, 9, 3, 8, 6, 4, 9])
"""As many tokens in fewer sequences: as many samples, in another order."""
FILE_EVENTS = ("open", "os.rename", "os.remove")


def resized(sizes: np.ndarray) -> SampleRequest:
    return replace(REQUEST, last_document=len(sizes), num_samples=20)


def opened(folder: Path, *, is_builder: bool = True) -> bool:
    """Whether the index of the new sizes is right."""
    tokens = IndexedDataset(folder / "data")
    return is_right(open_index(tokens, "train_0", resized(NEW_SIZES), is_builder=is_builder), tokens, resized(NEW_SIZES))


def killed_after(events: int, folder: Path) -> bool:
    """Whether a process that builds the index was killed when it did something to the ``events``-th file of the folder."""
    if (pid := os.fork()) == 0:
        left = events

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in FILE_EVENTS and str(folder) in str(arguments[0]):
                count()

        synchronise = os.fsync
        os.fsync = lambda file: (count(), synchronise(file))[1]  # when the file is written and has not its name yet
        sys.addaudithook(hook)
        try:
            os._exit(0 if opened(folder) else 1)
        finally:
            os._exit(2)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def test_a_build_killed_at_any_moment_leaves_nothing_harmful(tmp_path: Path) -> None:
    """Over a cache of older data under the same names, whose arrays have the lengths of the new ones."""
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        folder.mkdir()
        open_index(write(folder, OLD_SIZES), "train_0", resized(OLD_SIZES))
        write(folder, NEW_SIZES)
        if not killed_after(kills, folder):
            break
        kills += 1
        assert opened(folder, is_builder=False)
        assert opened(folder)
        assert opened(folder, is_builder=False)
        assert not [path.name for path in folder.iterdir() if path.name.endswith(".part")]
    assert kills > 15


def test_runs_that_start_together_build_an_index_once(tokens: IndexedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(request: SampleRequest, *args: object, **kwargs: object) -> SampleIndex:
        (tmp_path / f"built-by-{os.getpid()}").touch()
        return build_index(request, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(index_cache, "build_index", noted)
    children = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            try:
                os._exit(0 if is_right(open_index(tokens, "train_0", REQUEST), tokens) else 1)
            finally:
                os._exit(2)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert len(list(tmp_path.glob("built-by-*"))) == 1
