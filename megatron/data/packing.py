"""Which tokens make which sample: the three index arrays of GPT-NeoX, in its order, from its generator.

`doc_idx` are the sequences in the order they are read, `sample_idx` says where in that order each sample starts, and
`shuffle_idx` in which order samples are visited. Everything is drawn from one ``numpy.random.RandomState(seed)``, whose stream
numpy guarantees; so the order depends on the sizes, the sequences, the sample length, the epochs and the seed, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_builder import sample_index

PackImpl = Literal["packed", "pack_until_overflow", "unpacked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleIndex:
    doc_idx: NDArray
    """Sequence numbers, i32, in reading order."""
    sample_idx: NDArray
    """Packed: ``[N + 1, 2]``, position in `doc_idx` and token offset. Otherwise ``[N + 1]`` i64: position of a sample's first sequence."""
    shuffle_idx: NDArray
    """``[N]``: the sample at each place of the visiting order."""

    @property
    def num_rows(self) -> int:
        return len(self.shuffle_idx)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """What a set of samples is made of, besides the token files."""

    first_document: int
    """First sequence that takes part."""
    last_document: int
    """One past the last."""
    seq_length: int
    """Tokens of a sample, less the one that only serves as a label."""
    num_samples: int | None
    """Samples wanted. None: `num_epochs` decides."""
    num_epochs: int | None = None
    """Passes over the data. None: as few as hold `num_samples`."""
    seed: int
    pack_impl: PackImpl = "packed"
    allow_chopped: bool = True
    """Keep sequences longer than a sample, cut short. Packed samples are never cut."""


def build_index(request: SampleRequest, sizes: NDArray[np.int32], *, is_masked: NDArray[np.bool_] | None = None) -> SampleIndex:
    """The index arrays of a request. ``is_masked``: for each sequence, whether no label of it counts (None: there are no labels)."""
    _check(request, sizes)
    members = np.arange(request.first_document, request.last_document, dtype=np.int32)
    if request.pack_impl == "packed":
        return _packed(request, sizes, members)
    assert request.num_samples is not None
    if not request.allow_chopped:
        members = members[sizes[members] <= request.seq_length + 1]
    if is_masked is not None:
        members = members[~is_masked[members]]
    members = members[sizes[members] > 0]
    if not len(members):
        raise ValueError(f"pack_impl {request.pack_impl} finds no sequence it may use: all are empty, masked, or too long for allow_chopped false.")
    return (_until_overflow if request.pack_impl == "pack_until_overflow" else _unpacked)(request, sizes, members)


def epochs_needed(num_tokens: int, *, seq_length: int, num_samples: int) -> int:
    """The least number of passes over ``num_tokens`` that holds the samples. A sample takes ``seq_length`` tokens, the last one more."""
    return max(1, -(-(num_samples * seq_length + 1) // num_tokens))


def shuffle_dtype(num_samples: int) -> np.dtype:
    return np.dtype(np.uint32 if num_samples < np.iinfo(np.uint32).max - 1 else np.int64)


def count_tokens(sizes: NDArray[np.int32], request: SampleRequest) -> int:
    """Tokens of one pass."""
    return int(sizes[request.first_document : request.last_document].sum(dtype=np.int64))


def num_epochs(request: SampleRequest, sizes: NDArray[np.int32]) -> int:
    """Passes that a packed request makes."""
    if request.num_epochs is not None:
        return request.num_epochs
    assert request.num_samples is not None
    return epochs_needed(count_tokens(sizes, request), seq_length=request.seq_length, num_samples=request.num_samples)


def num_packed_samples(request: SampleRequest, sizes: NDArray[np.int32]) -> int:
    return max(0, (num_epochs(request, sizes) * count_tokens(sizes, request) - 1) // request.seq_length)


def _packed(request: SampleRequest, sizes: NDArray[np.int32], members: NDArray[np.int32]) -> SampleIndex:
    count = num_packed_samples(request, sizes)
    if count == 0:
        tokens = count_tokens(sizes, request)
        raise ValueError(f"{tokens} tokens are too few for one sample of {request.seq_length} and one more: use more data, or a smaller seq_length.")
    generator = np.random.RandomState(request.seed)
    doc_idx = np.tile(members, num_epochs(request, sizes))
    generator.shuffle(doc_idx)
    sample_idx = sample_index(sizes, doc_idx, seq_length=request.seq_length, num_samples=count)
    shuffle_idx = np.arange(count, dtype=shuffle_dtype(count))
    generator.shuffle(shuffle_idx)
    return SampleIndex(doc_idx=doc_idx, sample_idx=sample_idx, shuffle_idx=shuffle_idx)


def _until_overflow(request: SampleRequest, sizes: NDArray[np.int32], members: NDArray[np.int32]) -> SampleIndex:
    """Whole sequences are taken from a queue while they fit a sample; the queue is shuffled again when it is empty.

    As in GPT-NeoX, the last sample ends with its first sequence.
    """
    assert request.num_samples is not None
    generator = np.random.RandomState(request.seed)
    shuffle_idx = np.arange(request.num_samples, dtype=shuffle_dtype(request.num_samples))
    generator.shuffle(shuffle_idx)
    queue = np.arange(request.first_document, request.last_document, dtype=np.int32)
    generator.shuffle(queue)
    usable = np.zeros(len(sizes), dtype=bool)
    usable[members] = True
    order: list[int] = []
    starts: list[int] = []
    filled, at = 0, 0
    while len(starts) < request.num_samples:
        sequence = int(queue[at])
        if usable[sequence]:
            if not starts or filled + int(sizes[sequence]) > request.seq_length + 1:
                starts.append(len(order))
                filled = 0
            order.append(sequence)
            filled += int(sizes[sequence])
        at += 1
        if at == len(queue):
            generator.shuffle(queue)
            at = 0
    starts.append(len(order))
    return SampleIndex(doc_idx=np.asarray(order, dtype=np.int32), sample_idx=np.asarray(starts), shuffle_idx=shuffle_idx)


def _unpacked(request: SampleRequest, sizes: NDArray[np.int32], members: NDArray[np.int32]) -> SampleIndex:
    """One sequence a sample, in file order, visited in shuffled order."""
    assert request.num_samples is not None
    shuffle_idx = np.arange(request.num_samples, dtype=shuffle_dtype(request.num_samples))
    np.random.RandomState(request.seed).shuffle(shuffle_idx)
    order = np.resize(members, request.num_samples)
    return SampleIndex(doc_idx=order, sample_idx=np.arange(request.num_samples + 1), shuffle_idx=shuffle_idx)


def _check(request: SampleRequest, sizes: NDArray[np.int32]) -> None:
    if not 0 <= request.first_document < request.last_document <= len(sizes):
        wanted = f"{request.first_document} to {request.last_document}"
        raise ValueError(f"Sequences {wanted} were asked for, of {len(sizes)}: give a range that is not empty and lies inside.")
    if request.seq_length < 1:
        raise ValueError(f"seq_length is {request.seq_length}: a sample needs at least 1 token.")
    if not 0 <= request.seed < 2**32:
        raise ValueError(f"seed is {request.seed}: the generator of the data order takes 0 to {2**32 - 1}.")
    if (request.num_samples is None) == (request.num_epochs is None):
        raise ValueError("Say either how many samples or how many epochs are wanted, not both and not neither.")
    if request.pack_impl != "packed" and request.num_samples is None:
        raise ValueError(f"pack_impl {request.pack_impl} counts samples and not epochs: set train_iters instead of train_epochs.")
    if (request.num_samples if request.num_samples is not None else request.num_epochs or 0) < 1:
        raise ValueError("Of no samples or no epochs there is nothing to build: ask for at least 1.")
    if count_tokens(sizes, request) == 0:
        raise ValueError(f"Sequences {request.first_document} to {request.last_document} hold no tokens: use other data, or another split.")
