// Rotary embeddings on CUDA, in place on the packed projection.
//
// A thread turns the pairs of one head of one token that fit into 16 bytes a half: of Pythia's bf16 heads of 64, a quarter of which turns,
// the whole head, 32 bytes read and written. Neighbouring threads take neighbouring pairs, then heads, then tokens. Where the sizes, strides
// or addresses allow no 16 bytes, a thread takes one pair. The backward builds the packed gradient from those of q, k and v: a thread turns
// back its pairs, or copies 16 bytes of what did not turn. Every element is read and written once, by one thread.
#include "rotary_cuda.h"

#include <algorithm>
#include <initializer_list>

#include "cuda_launch.h"

namespace sepllm {
namespace {

template <typename S, int kWidth, typename T = typename ComputedIn<S>::Type>
__device__ void read_angles(const RotaryArgs& args, int64_t token, int64_t pair, T (&cos)[kWidth], T (&sin)[kWidth]) {
  const int64_t at = token * 2 * args.half + pair;
  for (int i = 0; i < kWidth; ++i) {
    cos[i] = args.has_wide_angles ? static_cast<const T*>(args.cos)[at + i] : widen(static_cast<const S*>(args.cos)[at + i]);
    sin[i] = args.has_wide_angles ? static_cast<const T*>(args.sin)[at + i] : widen(static_cast<const S*>(args.sin)[at + i]);
  }
}

// Pairs `pair` .. `pair + kWidth` of a head. `to` may be `from`.
template <typename S, int kWidth>
__device__ void turn(const RotaryArgs& args, int64_t token, int64_t pair, bool is_back, const S* from, S* to) {
  using T = typename ComputedIn<S>::Type;
  T cos[kWidth], sin[kWidth];
  read_angles<S, kWidth>(args, token, pair, cos, sin);
  Pack<S, kWidth> first = read_pack<kWidth>(from + pair), second = read_pack<kWidth>(from + args.half + pair);
  for (int i = 0; i < kWidth; ++i) {
    const Pair<T> turned_pair = turned<T>({widen(first.element[i]), widen(second.element[i])}, cos[i], is_back ? -sin[i] : sin[i]);
    narrow(turned_pair.first, &first.element[i]);
    narrow(turned_pair.second, &second.element[i]);
  }
  write_pack(first, to + pair);
  write_pack(second, to + args.half + pair);
}

template <typename S, int kWidth>
__global__ void rotate_kernel(RotaryArgs args) {
  const int64_t packs = args.half / kWidth, heads = args.heads.turning(), count = args.batch * args.tokens * heads * packs;
  for (int64_t i = first_item(); i < count; i += all_threads()) {
    const int64_t token = i / packs / heads;
    S* row = static_cast<S*>(args.packed) + token / args.tokens * args.batch_stride + token % args.tokens * args.token_stride;
    S* head = row + args.heads.start(i / packs % heads);
    turn<S, kWidth>(args, token, i % packs * kWidth, false, head, head);
  }
}

// Items of a head: its packs of pairs, then the packs that did not turn; of v only the latter, so that its last items have nothing to do.
template <typename S, int kWidth>
__global__ void rotate_backward_kernel(RotaryGradientArgs args) {
  const int64_t packs = args.heads.head_size / kWidth, heads = args.heads.count(), count = args.batch * args.tokens * heads * packs;
  for (int64_t i = first_item(); i < count; i += all_threads()) {
    const int64_t token = i / packs / heads, head = i / packs % heads, pack = i % packs;
    HeadStrides strides;
    int64_t number;
    const S* from = static_cast<const S*>(args.gradient_of(head, &strides, &number));
    from += token / args.tokens * strides.batch + token % args.tokens * strides.token + number * strides.head;
    S* to = static_cast<S*>(args.packed) + token * args.heads.row_size() + args.heads.start(head);
    const int64_t pairs = head < args.heads.turning() ? args.half / kWidth : 0;
    if (pack < pairs) {
      turn<S, kWidth>(args, token, pack * kWidth, true, from, to);
    } else if (pack + pairs < packs) {
      const int64_t at = (pack + pairs) * kWidth;
      write_pack(read_pack<kWidth>(from + at), to + at);
    }
  }
}

bool has_whole_packs(int64_t width, std::initializer_list<int64_t> sizes, std::initializer_list<const void*> addresses) {
  return std::all_of(sizes.begin(), sizes.end(), [=](int64_t size) { return size % width == 0; }) &&
         std::all_of(addresses.begin(), addresses.end(), [](const void* address) { return reinterpret_cast<uintptr_t>(address) % kPackBytes == 0; });
}

}  // namespace

cudaError_t rotate_packed_cuda(Storage storage, const RotaryArgs& args, cudaStream_t stream) {
  const int64_t pairs = args.batch * args.tokens * args.heads.turning() * args.half;
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    constexpr int kWidth = kPackBytes / sizeof(S);
    if (has_whole_packs(kWidth, {args.half, args.heads.head_size, args.batch_stride, args.token_stride}, {args.packed}))
      launch_items(rotate_kernel<S, kWidth>, pairs / kWidth, stream, args);
    else
      launch_items(rotate_kernel<S, 1>, pairs, stream, args);
  });
  return cudaGetLastError();
}

cudaError_t rotate_packed_backward_cuda(Storage storage, const RotaryGradientArgs& args, cudaStream_t stream) {
  const int64_t elements = args.batch * args.tokens * args.heads.row_size();
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    constexpr int kWidth = kPackBytes / sizeof(S);
    bool is_whole = has_whole_packs(kWidth, {args.half, args.heads.head_size}, {args.packed, args.dq, args.dk, args.dv});
    for (const HeadStrides& strides : {args.dq_strides, args.dk_strides, args.dv_strides})
      is_whole = is_whole && has_whole_packs(kWidth, {strides.batch, strides.token, strides.head}, {});
    if (is_whole)
      launch_items(rotate_backward_kernel<S, kWidth>, elements / kWidth, stream, args);
    else
      launch_items(rotate_backward_kernel<S, 1>, elements, stream, args);
  });
  return cudaGetLastError();
}

}  // namespace sepllm
