"""Index arrays kept beside the token files, under GPT-NeoX's names, so that a restart maps them instead of building them.

Those names tell neither the document range nor the data, so a small JSON sidecar does. Arrays with a sidecar are used if it
matches; arrays without one (GPT-NeoX's, Pythia's) if their content fits the data. Anything else is built again, and the log says why.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data import packing
from megatron.data.index_builder import sample_index, sample_index_dtype
from megatron.data.indexed import IndexedDataset
from megatron.data.packing import SampleIndex, SampleRequest, build_index
from sepllm.ops.extension import locked

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")
FORMAT = 1
_PART = ".part"
log = logging.getLogger(__name__)


def open_index(
    tokens: IndexedDataset,
    name: str,
    request: SampleRequest,
    *,
    labels: IndexedDataset | None = None,
    is_builder: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> SampleIndex:
    """The index of a request, mapped from the cache of ``tokens`` if that is right, else built.

    Every rank calls this. Those that are not the builder wait in ``barrier`` until it has written the cache, and build an index in
    memory only if the folder could not be written.
    """
    is_masked = masked_sequences(labels, request.seq_length + 1) if labels is not None and request.pack_impl == "pack_until_overflow" else None
    cache = _Cache(base=cache_names(tokens.index_prefix, name, request), request=request, sizes=tokens.sizes, is_masked=is_masked)
    if not is_builder:
        barrier()
        return cache.find(verify=False) or cache.build()
    try:
        with cache.alone():
            return cache.find(verify=True) or cache.store(cache.build())
    finally:
        barrier()


def cache_names(prefix: str, name: str, request: SampleRequest) -> tuple[str, ...]:
    """Beginnings of the cache's file names: today's, then (where it can be meant) that of GPT-NeoX v1.0 and Pythia."""
    old = f"{prefix}_{name}_indexmap_{request.num_samples}ns_{request.seq_length}sl_{request.seed}s"
    new = f"{old}_{request.pack_impl}pi{'_ac' if request.allow_chopped else ''}"
    return (new, old) if request.pack_impl == "packed" else (new,)


def masked_sequences(labels: IndexedDataset, length: int) -> NDArray[np.bool_]:
    """For each sequence, whether none of its first ``length`` labels counts. Reads the whole label file."""
    return np.fromiter((not (labels[sequence][:length] >= 0).any() for sequence in range(len(labels))), dtype=bool, count=len(labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    base: tuple[str, ...]
    request: SampleRequest
    sizes: NDArray[np.int32]
    is_masked: NDArray[np.bool_] | None

    @property
    def sidecar(self) -> Path:
        return Path(f"{self.base[0]}_index.json")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds off other runs that want the same index, so that one of them builds it. Where the folder can hold no lock, each does."""
        with ExitStack() as stack:
            with suppress(OSError, ValueError):
                self.sidecar.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(f"{self.base[0]}_index.lock")))
            yield

    def find(self, *, verify: bool) -> SampleIndex | None:
        """The cached index if it belongs to this request and is whole. ``verify`` reads it all; otherwise only its length is checked."""
        if self.sidecar.is_file():
            return self._of_sidecar(verify=verify)
        return next((index for base in self.base if (index := self._without_sidecar(base)) is not None), None)

    def build(self) -> SampleIndex:
        log.info("Building the sample index %s.", self.base[0])
        return build_index(self.request, self.sizes, is_masked=self.is_masked)

    def store(self, index: SampleIndex) -> SampleIndex:
        """The index, written and mapped again. It stays in memory if the folder cannot be written, and the log says so.

        Everything old goes first: arrays of two builds never stand side by side, wherever this one is killed.
        """
        try:
            for stale in (self.sidecar, *(Path(f"{self.base[0]}_{array}.npy") for array in ARRAYS)):
                stale.unlink(missing_ok=True)
            for array in ARRAYS:
                _write(Path(f"{self.base[0]}_{array}.npy"), lambda file, values=getattr(index, array): np.save(file, values))
            self._write_sidecar(self.base[0])
        except OSError as error:
            log.warning("The sample index %s cannot be kept (%s): every process builds its own, at every start.", self.base[0], error)
            return index
        return self._load(self.base[0]) or index

    def _fingerprint(self) -> dict[str, object]:
        masked = None if self.is_masked is None else hashlib.sha256(self.is_masked.tobytes()).hexdigest()
        sizes = hashlib.sha256(np.ascontiguousarray(self.sizes).tobytes()).hexdigest()
        return {"format": FORMAT, "sizes_sha256": sizes, "masked_sha256": masked, **asdict(self.request)}

    def _write_sidecar(self, base: str) -> None:
        files = {array: _describe(Path(f"{base}_{array}.npy")) for array in ARRAYS}
        text = json.dumps({"request": self._fingerprint(), "files": files}, indent=1)
        _write(self.sidecar, lambda file: file.write(text.encode()))

    def _of_sidecar(self, *, verify: bool) -> SampleIndex | None:
        try:
            saved = json.loads(self.sidecar.read_text())
            request, files = saved["request"], {array: saved["files"][array] for array in ARRAYS}
            paths = {array: self.sidecar.with_name(Path(files[array]["name"]).name) for array in ARRAYS}
            if request != self._fingerprint():
                return self._refuse("it was made for other data or other settings")
            if any(paths[array].stat().st_size != files[array]["bytes"] for array in ARRAYS):
                return self._refuse("its files have other lengths than when it was written")
            if verify and any(_describe(paths[array]) != files[array] for array in ARRAYS):
                return self._refuse("its files changed after it was written")
            return _map_index(paths, is_packed=self.request.pack_impl == "packed")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            return self._refuse(f"it cannot be read ({error})")

    def _without_sidecar(self, base: str) -> SampleIndex | None:
        """Arrays of another program, if their content is an index of this data: each sequence once an epoch, each start where it
        belongs, each sample once. Their shuffles are taken as they are; the seed is in their name."""
        index = self._load(base) if self.request.pack_impl == "packed" else None
        if index is None:
            return None
        if (reason := self._misfit(index)) is not None:
            return self._refuse(f"{base}: {reason}")
        log.info("Taking the sample index %s, which another program wrote: its content fits the data.", base)
        try:
            self._write_sidecar(base)
        except OSError as error:
            log.info("It is checked again at the next start (%s).", error)
        return index

    def _misfit(self, index: SampleIndex) -> str | None:
        request, sizes = self.request, self.sizes
        if packing.count_tokens(sizes, request) == 0:
            return "its data holds no tokens"
        epochs, count = packing.num_epochs(request, sizes), packing.num_packed_samples(request, sizes)
        members = request.last_document - request.first_document
        if not _is_each(index.doc_idx, np.dtype(np.int32), first=request.first_document, count=members, times=epochs):
            return "its doc_idx does not hold each sequence once an epoch"
        if not _is_each(index.shuffle_idx, packing.shuffle_dtype(count), first=0, count=count, times=1):
            return "its shuffle_idx does not hold each sample once"
        if index.sample_idx.shape != (count + 1, 2) or index.sample_idx.dtype != sample_index_dtype(count):
            return "its sample_idx has another length"
        if not np.array_equal(index.sample_idx, sample_index(sizes, index.doc_idx, seq_length=request.seq_length, num_samples=count)):
            return "its sample_idx does not fit the lengths of the sequences"
        return None

    def _load(self, base: str) -> SampleIndex | None:
        """The three arrays, mapped. None where one is missing or is no array."""
        try:
            paths = {array: Path(f"{base}_{array}.npy") for array in ARRAYS}
            return _map_index(paths, is_packed=self.request.pack_impl == "packed")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return self._refuse(f"{base} cannot be read ({error})")

    def _refuse(self, reason: str) -> SampleIndex | None:
        """Nothing, and the log says why."""
        log.warning("Not using the cached sample index %s: %s.", self.base[0], reason)
        return None


def _is_each(values: NDArray, dtype: np.dtype, *, first: int, count: int, times: int) -> bool:
    """Whether ``values`` hold every number from ``first`` on, ``count`` of them, exactly ``times`` each."""
    if values.ndim != 1 or values.dtype != dtype or len(values) != count * times:
        return False
    if int(values.min()) < first or int(values.max()) >= first + count:
        return False
    return bool((np.bincount(values.astype(np.int64) - first, minlength=count) == times).all())


def _map_index(paths: Mapping[str, Path], *, is_packed: bool) -> SampleIndex:
    """The three arrays, mapped, and of the form that an index has. ValueError says what they are instead."""
    index = SampleIndex(**{array: _map_array(path) for array, path in paths.items()})
    rows = index.sample_idx.shape[0] - 1
    if index.sample_idx.shape != ((rows + 1, 2) if is_packed else (rows + 1,)) or index.shuffle_idx.shape != (rows,) or index.doc_idx.ndim != 1:
        shapes = ", ".join(f"{array} {getattr(index, array).shape}" for array in ARRAYS)
        raise ValueError(f"the shapes {shapes} are not those of an index")
    return index


def _map_array(path: Path) -> NDArray:
    """An array of integers, mapped."""
    try:
        with np.errstate(over="ignore"):  # of a length in the header that no file has
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # on damaged headers numpy raises whatever its parsing stumbles over, IndexError and BadZipFile among others
        raise ValueError(f"{path} holds no array: {type(error).__name__}: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim == 0:
        raise ValueError(f"{path} holds no row of integers")
    return array


def _describe(path: Path) -> dict[str, str | int]:
    with open(path, "rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, fill: Callable[..., object]) -> None:
    """Write a file under a temporary name, then give it its own. What killed processes left of earlier attempts goes."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{_PART}"):
        left.unlink(missing_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}{_PART}")
    try:
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
