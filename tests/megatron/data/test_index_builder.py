"""The compiled builder against its definition in numpy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import index_builder
from megatron.data.index_builder import blend_index, build, compile_command, load, sample_index, sample_index_dtype
from sepllm.ops.extension import COMPILERS, find_compiler
from tools.bench.index_build import defined_sample_index


def defined_blend_index(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    used = [0] * len(weights)
    parts, rows = [], []
    for draw in range(size):
        behind = [weight * max(draw, 1) - count for weight, count in zip(weights, used, strict=True)]
        chosen = behind.index(max(behind))
        parts.append(chosen)
        rows.append(used[chosen])
        used[chosen] += 1
    return parts, rows


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=30), seq_length=st.integers(1, 20), seed=st.integers(0, 99))
def test_samples_start_where_the_definition_says(sizes: list[int], seq_length: int, seed: int) -> None:
    lengths = np.array(sizes, dtype=np.int32)
    order = np.random.RandomState(seed).randint(0, len(sizes), 3 * len(sizes)).astype(np.int32)
    count = max(0, (int(lengths[order].sum()) - 1) // seq_length)
    if lengths[order].sum() == 0:
        return
    expected = defined_sample_index(lengths, order, seq_length=seq_length, num_samples=count)
    assert np.array_equal(sample_index(lengths, order, seq_length=seq_length, num_samples=count), expected)
    wide = load().sample_index_int64(lengths, order, seq_length=seq_length, num_samples=count)
    assert wide.dtype == np.int64
    assert np.array_equal(wide, expected)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=9), size=st.integers(0, 300))
def test_draws_come_from_the_part_furthest_behind(weights: list[float], size: int) -> None:
    parts, rows = blend_index(np.array(weights), size)
    assert (parts.tolist(), rows.tolist()) == defined_blend_index(weights, size)
    assert (parts.dtype, rows.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(("num_samples", "dtype"), [(2**30 - 3, "int32"), (2**30 - 2, "int32"), (2**30 - 1, "int64")])
def test_rows_are_64_bit_where_gpt_neox_makes_them_so(num_samples: int, dtype: str) -> None:
    assert (2 * (num_samples + 1) < 2**31 - 1) == (dtype == "int32")
    assert sample_index_dtype(num_samples) == dtype


def test_sizes_may_lie_unaligned_in_a_file() -> None:
    raw = np.frombuffer(b"\0" + np.array([4, 5], dtype="<i4").tobytes(), dtype=np.uint8)[1:].view("<i4")
    assert sample_index(raw, np.array([1, 0], dtype=np.int32), seq_length=4, num_samples=2).tolist() == [[0, 0], [0, 4], [1, 3]]


def test_unaligned_arrays_are_refused_by_the_compiled_code_itself() -> None:
    raw = np.zeros(9, dtype=np.uint8)[1:].view(np.int32)
    with pytest.raises(ValueError, match="sizes does not lie on a multiple of 4 bytes"):
        load().sample_index_int32(raw, np.zeros(1, dtype=np.int32), seq_length=4, num_samples=2)


def test_a_foreign_order_is_refused() -> None:
    with pytest.raises(ValueError, match="names sequence 2, but there are 2"):
        sample_index(np.array([3, 3]), np.array([0, 2], dtype=np.int32), seq_length=2, num_samples=2)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="hold 6 tokens, too few for 3 samples"):
        sample_index(np.array([3, 3]), np.array([0, 1], dtype=np.int32), seq_length=2, num_samples=3)


@pytest.mark.parametrize("count", [0, 255])
def test_more_parts_than_a_byte_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 254 weights"):
        blend_index(np.ones(count), 3)


def test_a_missing_compiler_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of no-such-compiler is on PATH: install one \(apt-get install g\+\+"):
        build(tmp_path, compilers=("no-such-compiler",))


def test_a_compiler_that_fails_leaves_nothing_and_its_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="no such target"):
        build(tmp_path / "cache", compilers=(str(broken),))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_a_killed_build_left_behind_does_not_matter(tmp_path: Path) -> None:
    built = build(index_builder.cache_dir())
    (tmp_path / "sepllm_dataset_index.lock").write_text("left by a build that was killed")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor last; do :; done\ncp {built} "$last"\n')
    compiler.chmod(0o755)
    (tmp_path / f"{built.name}.1.part").write_text("half a module")
    assert build(tmp_path, compilers=(str(compiler),)).read_bytes() == built.read_bytes()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    if shutil.which("c++") is None:
        pytest.skip("c++ is not on PATH")
    with pytest.raises(ValueError, match=r"cannot hold the compiled index builder .* set XDG_CACHE_HOME"):
        build(tmp_path / "file" / "cache")


def test_more_tokens_than_64_bits_count_are_refused() -> None:
    sizes = np.full(3, 2**31 - 1, dtype=np.int32)
    with pytest.raises(ValueError, match="more than 64 bits can count"):
        load().sample_index_int64(sizes, np.arange(3, dtype=np.int32), seq_length=2**62, num_samples=4)


HOSTILE_CALLS = """
import importlib.util
import sys
import numpy as np
spec = importlib.util.spec_from_file_location("sepllm_dataset_index", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
random = np.random.RandomState(0)
numbers = [-(2**31), -1, 0, 1, 2, 3, 7, 2**31 - 1]
wide = [-1, 0, 1, 2, 5, 2**31, 2**62, 2**63 - 1]
calls = refused = 0
def placed(values, dtype):
    # an array that may also be unaligned, strided, a column, of another type, or backwards
    values = values.astype(dtype)
    kind = random.randint(0, 12)
    if kind == 0:
        raw = np.zeros(values.nbytes + 1, dtype=np.uint8)
        raw[1:] = values.view(np.uint8)
        return raw[1:].view(dtype)
    return {1: np.repeat(values, 2)[::2], 2: values[:, None], 3: values.astype(np.float64), 4: values[::-1]}.get(kind, values)
for _ in range(3000):
    sizes = placed(random.choice(numbers, random.randint(0, 5)), np.int32)
    order = placed(random.choice(numbers[1:7], random.randint(0, 7)), np.int32)
    length, samples = int(random.choice(wide[:7])), int(random.choice([-1, 0, 1, 2, 5, 40]))
    for build in (module.sample_index_int32, module.sample_index_int64):
        calls += 1
        try:
            build(sizes, order, seq_length=length, num_samples=samples)
        except (ValueError, TypeError):
            refused += 1
    calls += 1
    weights = placed(random.choice([0.0, 1.0, -1.0, np.nan, np.inf, 1e308], random.randint(0, 4)), np.float64)
    try:
        module.blend_index(weights, int(random.choice([-1, 0, 1, 50])))
    except (ValueError, TypeError):
        refused += 1
print(calls, refused)
"""


@pytest.mark.slow
def test_no_input_makes_the_compiled_code_leave_its_arrays_or_overflow(tmp_path: Path) -> None:
    """The same source, built with the compiler's checks of addresses and arithmetic."""
    compiler = find_compiler(COMPILERS)
    # libstdc++ too: without it at the start, the checks cannot follow the exceptions of a module that Python loads later.
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    if not all(Path(library).is_file() for library in found):
        pytest.skip(f"{compiler} comes without {' or '.join(names)}")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*compile_command(compiler, tmp_path / "checked.so"), *flags], check=True)
    environment = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    command = [sys.executable, "-c", HOSTILE_CALLS, str(tmp_path / "checked.so")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    calls, refused = map(int, done.stdout.split())
    assert 0 < refused < calls
