// Rotary embeddings on a CPU, in place on the packed projection.
//
// The first 2 half dimensions of every q and k head turn; nothing else is read or written: of Pythia's rows one cache line in four. The
// backward builds the packed gradient out of those of q, k and v, which somebody has to do anyway, and turns them back on the way. Work:
// tokens. An element is rounded once.
#include "rotary_cpu.h"

#include <algorithm>
#include <vector>

namespace sepllm {
namespace {

// Cosines and sines of one token's pairs. The tables' second half repeats the first, so only that is read.
template <typename S>
class Angles {
 public:
  using T = typename ComputedIn<S>::Type;

  Angles(const RotaryArgs& args, T sign) : args_(args), sign_(sign), values_(2 * args.half) {}

  void read(int64_t token) {
    const int64_t at = token * 2 * args_.half;
    args_.has_wide_angles ? read_as<T>(at) : read_as<S>(at);
  }
  const T* cos() const { return values_.data(); }
  const T* sin() const { return values_.data() + args_.half; }

 private:
  template <typename From>
  void read_as(int64_t at) {
    for (int64_t i = 0; i < args_.half; ++i) values_[i] = widen(static_cast<const From*>(args_.cos)[at + i]);
    for (int64_t i = 0; i < args_.half; ++i) values_[args_.half + i] = sign_ * widen(static_cast<const From*>(args_.sin)[at + i]);
  }

  const RotaryArgs& args_;
  T sign_;
  std::vector<T> values_;
};

// `to` may be `from`, else they do not overlap.
template <typename S, typename T>
inline __attribute__((always_inline)) void turn_head(const S* from, S* to, const T* cos, const T* sin, int64_t half) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const Pair<T> pair = turned<T>({widen(from[i]), widen(from[half + i])}, cos[i], sin[i]);
    narrow(pair.first, to + i);
    narrow(pair.second, to + half + i);
  }
}

template <typename S, int64_t kHalf>
void turn_tokens(const RotaryArgs& args, int64_t first, int64_t last) {
  Angles<S> angles(args, 1);
  for (int64_t token = first; token < last; ++token) {
    angles.read(token);
    S* row = static_cast<S*>(args.packed) + token / args.tokens * args.batch_stride + token % args.tokens * args.token_stride;
    for (int64_t head = 0; head < args.heads.turning(); ++head) {
      S* at = row + args.heads.start(head);
      turn_head(at, at, angles.cos(), angles.sin(), kHalf ? kHalf : args.half);
    }
  }
}

template <typename S, int64_t kHalf>
void merge_tokens(const RotaryGradientArgs& args, int64_t first, int64_t last) {
  Angles<S> angles(args, -1);
  const int64_t half = kHalf ? kHalf : args.half;
  for (int64_t token = first; token < last; ++token) {
    angles.read(token);
    S* row = static_cast<S*>(args.packed) + token * args.heads.row_size();
    for (int64_t head = 0; head < args.heads.count(); ++head) {
      HeadStrides strides;
      int64_t number;
      const S* gradient = static_cast<const S*>(args.gradient_of(head, &strides, &number));
      gradient += token / args.tokens * strides.batch + token % args.tokens * strides.token + number * strides.head;
      S* to = row + args.heads.start(head);
      const bool turns = head < args.heads.turning();
      if (turns) turn_head(gradient, to, angles.cos(), angles.sin(), half);
      std::copy(gradient + (turns ? 2 * half : 0), gradient + args.heads.head_size, to + (turns ? 2 * half : 0));
    }
  }
}

// Calls run(number of pairs known to the compiler, or 0).
template <typename Run>
void specialise(int64_t half, Run run) {
  switch (half) {
    case 8: return run(std::integral_constant<int64_t, 8>{});
    case 16: return run(std::integral_constant<int64_t, 16>{});
    case 32: return run(std::integral_constant<int64_t, 32>{});
    default: return run(std::integral_constant<int64_t, 0>{});
  }
}

}  // namespace

void rotate_packed(Storage storage, const RotaryArgs& args, int64_t first_token, int64_t last_token) {
  with_storage(storage, [&](auto zero) {
    specialise(args.half, [&](auto half) { turn_tokens<decltype(zero), half>(args, first_token, last_token); });
  });
}

void rotate_packed_backward(Storage storage, const RotaryGradientArgs& args, int64_t first_token, int64_t last_token) {
  with_storage(storage, [&](auto zero) {
    specialise(args.half, [&](auto half) { merge_tokens<decltype(zero), half>(args, first_token, last_token); });
  });
}

}  // namespace sepllm
