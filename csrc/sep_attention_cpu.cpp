// Sep-Attention on a CPU, forward and backward, in the work of the kept pairs.
//
// A query reads the far columns far_lo <= c < far_hi (keys index[c]) and the keys band_lo <= j < band_hi under one softmax
// (sepllm/layout.py). Bounds never decrease with the query, so 64 neighbouring queries read nearly the same columns. A block of 64
// queries walks over tiles of 64 keys, first the far columns, then the band. Per tile, with queries across the lanes of a vector:
//
//   scores[key][query] = K Q^T            K straight from its rows, Q^T transposed once per block; in base 2, scale folded into Q
//   p = 2^(scores - m), sums and maxima    lane by lane: no sums across a vector; bounds are compared only at the ragged edges
//   out[query][h] += p^T V                 rescaled when a maximum rises (online softmax, arXiv 1805.02867)
//
// and in the backward, from the stored logarithm of the sums (arXiv 2307.08691),
//
//   dp = V dO^T;  ds = p (dp - delta);  dq += ds^T K;  dk += ds Q;  dv += p dO.
//
// The self-adjust softmax (arXiv 2502.18277) weighs key j with p_j (s_j - m + eps_n) / (M - m), m = min(min s, 0) and
// M = max(max s + eps_d, 0) + eps_d. So out = (sum p s v + (eps_n - m) sum p v) / (M - m): one pass with two sums; and with
// delta = dO . out as ever, ds_j = p_j (dp_j (1 + s_j + eps_n - m) / (M - m) - delta), to which the key that attains the minimum adds
// dO . (out - sum p v) / (M - m) and the one that attains the maximum -dO . out / (M - m). The raw kind is p_j s_j: m = eps_n, M - m = 1.
//
// All five products are `multiply` of simd.h, which broadcasts its left side, so that nothing but Q^T and dO^T is ever transposed. Within
// a tile each product is cut to what its 8 rows need, in the band too. Far rows are gathered once per task, band rows copied per block
// (that is where other dtypes become float).
//
// Work: (row, key head, segment of queries). Memory per task: O(M + n) rows; nothing of size S x S. The backward keeps fp32 gradients
// of the keys of each segment in a slab and adds the segments in order: bitwise the same from run to run.
#include "sep_attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace sepllm {
namespace {

constexpr int64_t kQueries = 64;  // queries of a block
constexpr int64_t kKeys = 64;     // keys of a tile
constexpr int64_t kRows = 8;      // keys, or queries, of one register tile
constexpr int64_t kAhead = 6;     // rows between the one that is copied and the one that is asked for
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// --- rows ---------------------------------------------------------------------------------------------------------------------------

template <typename T>
class Buffer {  // aligned to whole vectors; not initialised
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

template <typename T>
int64_t padded(int64_t head_size) {  // rows of all buffers are whole vectors
  constexpr int64_t kWidth = Simd<T>::kWidth;
  return (head_size + kWidth - 1) / kWidth * kWidth;
}

// Copies one head of one token. `ahead` is asked for: rows stand apart by all heads, which no hardware foresees.
template <typename T, typename S>
SEPLLM_INLINE void copy_row(const S* from, const S* ahead, int64_t head_size, int64_t row_size, T* to) {
  for (int64_t h = 0; h < head_size; h += 64 / sizeof(S)) __builtin_prefetch(ahead + h);
  for (int64_t h = 0; h < head_size; ++h) to[h] = widen(from[h]);
  for (int64_t h = head_size; h < row_size; ++h) to[h] = 0;
}

// --- ranges -------------------------------------------------------------------------------------------------------------------------

struct Interval {
  int64_t lo = 0, hi = 0;
  bool is_empty() const { return lo >= hi; }
};

Interval hull(const int32_t* lo, const int32_t* hi, int64_t count) {
  Interval all;
  for (int64_t i = 0; i < count; ++i)
    if (lo[i] < hi[i]) {
      if (all.is_empty()) all.lo = lo[i];
      all.hi = hi[i];
    }
  return all;
}

// Copies the columns of a hull that some query reads. Those in between may hold anything, NaN included, and become zero.
template <typename Copy, typename Clear>
void copy_read_columns(Interval columns, const int32_t* lo, const int32_t* hi, int64_t queries, Copy copy, Clear clear) {
  int64_t query = 0;
  for (int64_t c = columns.lo; c < columns.hi; ++c) {
    while (query < queries && (hi[query] <= c || lo[query] >= hi[query])) ++query;
    if (query < queries && lo[query] <= c)
      copy(c);
    else
      clear(c);
  }
}

// One of the two ranges of a block of queries: its bounds, and the rows of K and V that they count.
template <typename T>
struct Side {
  using Int = typename Simd<T>::Int;
  static constexpr int64_t kWidth = Simd<T>::kWidth;
  static constexpr int64_t kGroup = kWidth > kRows ? kWidth : kRows;  // queries that share a hull
  static constexpr int64_t kGroups = kQueries / kGroup;
  static constexpr int64_t kTiles = kQueries / kRows;

  alignas(64) Int lo[kQueries], hi[kQueries];
  Interval all, group[kGroups], interior[kGroups], tile[kTiles];  // interior: columns that every query of the group reads
  const T *k, *v, *positions;                                      // of column first
  T *dk, *dv;                                                       // likewise
  const int32_t* index;                                             // key of each far column; null where a column is its key
  int64_t first;

  Int key_of(int64_t column) const { return index == nullptr ? column : index[column]; }

  void set_bounds(const int32_t* from_lo, const int32_t* from_hi, int64_t count) {
    for (int64_t i = 0; i < kQueries; ++i) {
      lo[i] = i < count ? from_lo[i] : 0;
      hi[i] = i < count ? from_hi[i] : 0;
    }
    all = hull(from_lo, from_hi, count);
    for (int64_t g = 0; g < kGroups; ++g) {
      const int64_t start = g * kGroup, size = std::max<int64_t>(0, std::min(kGroup, count - start));
      group[g] = hull(from_lo + start, from_hi + start, size);
      interior[g] = {};
      if (size < kGroup) continue;
      Interval shared{0, std::numeric_limits<int32_t>::max()};
      for (int64_t i = start; i < start + kGroup; ++i) {
        shared.lo = std::max<int64_t>(shared.lo, lo[i]);
        shared.hi = std::min<int64_t>(shared.hi, hi[i]);
      }
      if (!shared.is_empty()) interior[g] = shared;
    }
    for (int64_t t = 0; t < kTiles; ++t) {
      const int64_t start = t * kRows, size = std::max<int64_t>(0, std::min(kRows, count - start));
      tile[t] = hull(from_lo + start, from_hi + start, size);
    }
  }

  // Rows of the tile of keys that starts at `start` which a group's scores cover: whole register tiles.
  Interval rows(int64_t g, int64_t start, int64_t end) const {
    const int64_t lo = std::max(start, group[g].lo), hi = std::min(end, group[g].hi);
    if (lo >= hi) return {};
    return {start + (lo - start) / kRows * kRows, start + (hi - start + kRows - 1) / kRows * kRows};
  }
};

// --- products of a tile -------------------------------------------------------------------------------------------------------------

template <typename T, int NV>
SEPLLM_INLINE void score_rows(Interval rows, const T* a, int64_t row_size, const T* b, T* c) {
  constexpr bool kTall = NV == 1 && kHas32Registers;  // one vector wide: more rows hide the latency
  int64_t r = rows.lo;
  if constexpr (kTall)
    for (; r + 2 * kRows <= rows.hi; r += 2 * kRows) multiply<T, 2 * kRows, NV, false>(row_size, a + r * row_size, row_size, 1, b, kQueries, c + r * kQueries, kQueries);
  constexpr int kStep = kHas32Registers || NV == 1 ? kRows : kRows / 2;
  for (; r < rows.hi; r += kStep) multiply<T, kStep, NV, false>(row_size, a + r * row_size, row_size, 1, b, kQueries, c + r * kQueries, kQueries);
}

// c[key][query] = rows of keys times the transposed queries, where the group of the query reads the key's register tile.
template <typename T>
SEPLLM_INLINE void score(const Side<T>& side, int64_t start, int64_t end, const T* keys, int64_t row_size, const T* transposed, T* c) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  const T* a = keys + (start - side.first) * row_size;
  for (int64_t q = 0; q < kQueries; q += 2 * kWidth) {
    Interval left = side.rows(q / Side<T>::kGroup, start, end), right = side.rows((q + kWidth) / Side<T>::kGroup, start, end);
    left = {left.lo - start, left.hi - start};
    right = {right.lo - start, right.hi - start};
    const Interval both{left.is_empty() ? right.lo : std::min(left.lo, right.is_empty() ? left.lo : right.lo), std::max(left.hi, right.hi)};
    const int64_t wanted = std::max<int64_t>(0, left.hi - left.lo) + std::max<int64_t>(0, right.hi - right.lo);
    if (2 * (both.hi - both.lo) <= wanted + kRows) {
      score_rows<T, 2>(both, a, row_size, transposed + q, c + q);
    } else {
      score_rows<T, 1>(left, a, row_size, transposed + q, c + q);
      score_rows<T, 1>(right, a, row_size, transposed + q + kWidth, c + q + kWidth);
    }
  }
}

// c[8 rows][row_size] += a b over `depth`.
template <typename T>
SEPLLM_INLINE void accumulate(int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t row_size, T* c) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  constexpr int kStep = kHas32Registers ? kRows : kRows / 2;
  int64_t h = 0;
  for (; h + 2 * kWidth <= row_size; h += 2 * kWidth)
    for (int64_t m = 0; m < kRows; m += kStep)
      multiply<T, kStep, 2, true>(depth, a + m * a_row, a_row, a_depth, b + h, row_size, c + m * row_size + h, row_size);
  if (h < row_size) multiply<T, kRows, 1, true>(depth, a, a_row, a_depth, b + h, row_size, c + h, row_size);
}

// out[query][h] += weights[key][query]^T values[key][h], each 8 queries over the keys that they read.
template <typename T>
SEPLLM_INLINE void accumulate_queries(const Side<T>& side, int64_t start, int64_t end, const T* weights, const T* values, int64_t row_size, T* out) {
  for (int64_t t = 0; t < Side<T>::kTiles; ++t) {
    const int64_t lo = std::max(start, side.tile[t].lo), hi = std::min(end, side.tile[t].hi);
    if (lo >= hi) continue;
    accumulate<T>(hi - lo, weights + (lo - start) * kQueries + t * kRows, 1, kQueries, values + (lo - side.first) * row_size, row_size,
                  out + t * kRows * row_size);
  }
}

// dk[key][h] += ds[key][query] q[query][h] and dv[key][h] += p[key][query] dO[query][h], each 8 keys over the queries that read them.
template <typename T>
SEPLLM_INLINE void accumulate_keys(const Side<T>& side, int64_t start, int64_t end, const T* ds, const T* p, const T* q, const T* grad_out,
                                   int64_t row_size) {
  constexpr int64_t kGroup = Side<T>::kGroup;
  int64_t first = 0, last = 0;  // queries that read one of the 8 keys; both only move on
  for (int64_t key = start; key < end; key += kRows) {
    while (first < kQueries && (side.hi[first] <= key || side.lo[first] >= side.hi[first])) ++first;
    last = std::max(last, first);
    for (int64_t next = last; next < kQueries; ++next)
      if (side.lo[next] < side.hi[next]) {
        if (side.lo[next] >= key + kRows) break;
        last = next + 1;
      }
    const int64_t at = (key - start) * kQueries, to = (key - side.first) * row_size;
    for (int64_t q0 = first; q0 < last;) {  // groups that do not read these keys hold no weights of theirs: step over them
      int64_t q1 = q0;
      while (q1 < last) {
        const Interval rows = side.rows(q1 / kGroup, start, end);
        if (key < rows.lo || key >= rows.hi) break;
        q1 = std::min(last, (q1 / kGroup + 1) * kGroup);
      }
      if (q1 > q0) {
        accumulate<T>(q1 - q0, ds + at + q0, kQueries, 1, q + q0 * row_size, row_size, side.dk + to);
        accumulate<T>(q1 - q0, p + at + q0, kQueries, 1, grad_out + q0 * row_size, row_size, side.dv + to);
      }
      q0 = q1 > q0 ? q1 : (q0 / kGroup + 1) * kGroup;
    }
  }
}

// --- a block of queries -------------------------------------------------------------------------------------------------------------

template <typename T>
struct Block {
  using Int = typename Simd<T>::Int;
  alignas(64) T scores[(kKeys + kRows) * kQueries], others[(kKeys + kRows) * kQueries];  // others: p s in the forward, dp and ds in the backward
  alignas(64) T largest[kQueries], sum[kQueries], lse[kQueries], delta[kQueries], positions[kQueries];
  T slope;  // in base 2
  // Of the self-adjust softmax: the extreme scores and the first keys that attain them.
  alignas(64) T lowest[kQueries], highest[kQueries];
  alignas(64) Int lowest_key[kQueries], highest_key[kQueries];
  alignas(64) T slope_of_score[kQueries], offset_of_score[kQueries];  // weight = p (slope s + offset)
  alignas(64) T grad_dot_mean[kQueries];                              // dO . sum p v
};

// Calls plain(key) for the rows of a tile that every query of the group reads, and masked(key) for the others.
template <typename T, typename Masked, typename Plain>
SEPLLM_INLINE void each_row(const Side<T>& side, int64_t group, int64_t start, int64_t end, Masked masked, Plain plain) {
  const Interval rows = side.rows(group, start, end);
  int64_t lo = std::max(rows.lo, std::min(rows.hi, side.interior[group].lo)), hi = std::max(lo, std::min(rows.hi, side.interior[group].hi));
  if (side.interior[group].is_empty()) lo = hi = rows.hi;
  for (int64_t key = rows.lo; key < lo; ++key) masked(key);
  for (int64_t key = lo; key < hi; ++key) plain(key);
  for (int64_t key = hi; key < rows.hi; ++key) masked(key);
}

template <typename T>
SEPLLM_INLINE IntVec<T> reads(int64_t key, IntVec<T> lo, IntVec<T> hi) {
  const IntVec<T> column = static_cast<typename Simd<T>::Int>(key) - IntVec<T>{};
  return (column >= lo) & (column < hi);
}

// ALiBi, in base 2.
template <typename T>
SEPLLM_INLINE void add_bias(const Side<T>& side, int64_t start, int64_t end, Block<T>& block) {
  for (int64_t q = 0; q < kQueries; q += Simd<T>::kWidth) {
    const Interval rows = side.rows(q / Side<T>::kGroup, start, end);
    const Vec<T> position = load(block.positions + q);
    for (int64_t key = rows.lo; key < rows.hi; ++key) {
      T* at = block.scores + (key - start) * kQueries + q;
      store(at, load(at) + block.slope * (side.positions[key - side.first] - position));
    }
  }
}

// Lowest and highest scores so far, and the first keys that attain them.
template <typename T>
SEPLLM_INLINE void find_extremes(const Side<T>& side, int64_t start, int64_t end, Block<T>& block) {
  for (int64_t q = 0; q < kQueries; q += Simd<T>::kWidth) {
    const Interval rows = side.rows(q / Side<T>::kGroup, start, end);
    const IntVec<T> lo = load_int<T>(side.lo + q), hi = load_int<T>(side.hi + q);
    Vec<T> lowest = load(block.lowest + q), highest = load(block.highest + q);
    IntVec<T> lowest_key = load_int<T>(block.lowest_key + q), highest_key = load_int<T>(block.highest_key + q);
    for (int64_t column = rows.lo; column < rows.hi; ++column) {
      const Vec<T> x = load(block.scores + (column - start) * kQueries + q);
      const IntVec<T> key = side.key_of(std::min(column, side.all.hi - 1)) - IntVec<T>{}, is_read = reads<T>(column, lo, hi);
      const IntVec<T> is_lower = is_read & (x < lowest), is_higher = is_read & (x > highest);
      lowest = is_lower ? x : lowest;
      lowest_key = is_lower ? key : lowest_key;
      highest = is_higher ? x : highest;
      highest_key = is_higher ? key : highest_key;
    }
    store(block.lowest + q, lowest);
    store(block.highest + q, highest);
    std::memcpy(block.lowest_key + q, &lowest_key, sizeof(lowest_key));
    std::memcpy(block.highest_key + q, &highest_key, sizeof(highest_key));
  }
}

// Scores of a tile become weights relative to the running maxima; `rescale` is told of queries whose maximum rose.
template <typename T, bool kAdjusts, typename Rescale>
SEPLLM_INLINE void soften(const Side<T>& side, int64_t start, int64_t end, Block<T>& block, Rescale rescale) {
  const Vec<T> nothing = fill<T>(T(-1e30));
  for (int64_t q = 0; q < kQueries; q += Simd<T>::kWidth) {
    const int64_t group = q / Side<T>::kGroup;
    if (side.rows(group, start, end).is_empty()) continue;
    const IntVec<T> lo = load_int<T>(side.lo + q), hi = load_int<T>(side.hi + q);
    T *scores = block.scores + q - start * kQueries, *others = block.others + q - start * kQueries;
    const Vec<T> before = load(block.largest + q);
    Vec<T> largest = before;
    each_row(
        side, group, start, end,
        [&](int64_t key) {
          Vec<T> x = load(scores + key * kQueries);
          x = reads<T>(key, lo, hi) ? x : nothing;
          largest = largest < x ? x : largest;
        },
        [&](int64_t key) {
          const Vec<T> x = load(scores + key * kQueries);
          largest = largest < x ? x : largest;
        });
    Vec<T> sum{};
    const auto weigh = [&](int64_t key, Vec<T> x, Vec<T> p) {
      store(scores + key * kQueries, p);
      sum += p;
      if constexpr (kAdjusts) store(others + key * kQueries, p * (x * T(kLn2)));
    };
    each_row(
        side, group, start, end,
        [&](int64_t key) {
          Vec<T> x = load(scores + key * kQueries);
          const IntVec<T> is_read = reads<T>(key, lo, hi);
          x = is_read ? x : largest;
          weigh(key, x, is_read ? exp2<T>(x - largest) : Vec<T>{});
        },
        [&](int64_t key) {
          const Vec<T> x = load(scores + key * kQueries);
          weigh(key, x, exp2<T>(x - largest));
        });
    if (std::memcmp(&largest, &before, sizeof(before)) != 0) {
      const Vec<T> factor = exp2<T>(before - largest);
      store(block.sum + q, load(block.sum + q) * factor);
      store(block.largest + q, largest);
      rescale(q, factor);
    }
    store(block.sum + q, load(block.sum + q) + sum);
  }
}

// The backward's weights from the stored sums: scores -> what multiplies dO, others = dp -> ds.
template <typename T, bool kAdjusts>
SEPLLM_INLINE void soften_again(const Side<T>& side, int64_t start, int64_t end, Block<T>& block) {
  for (int64_t q = 0; q < kQueries; q += Simd<T>::kWidth) {
    const int64_t group = q / Side<T>::kGroup;
    const IntVec<T> lo = load_int<T>(side.lo + q), hi = load_int<T>(side.hi + q);
    T *scores = block.scores + q - start * kQueries, *others = block.others + q - start * kQueries;
    const Vec<T> lse = load(block.lse + q), delta = load(block.delta + q);
    const Vec<T> slope = load(block.slope_of_score + q), offset = load(block.offset_of_score + q);
    Vec<T> grad_dot_mean{};
    const auto weigh = [&](int64_t key, Vec<T> p) {
      const Vec<T> dp = load(others + key * kQueries);
      if constexpr (kAdjusts) {
        const Vec<T> factor = slope * load(scores + key * kQueries) * T(kLn2) + offset;
        const Vec<T> weight = p * factor;
        grad_dot_mean += p * dp;
        store(others + key * kQueries, p * (dp * (factor + slope) - delta));
        store(scores + key * kQueries, weight);
      } else {
        store(others + key * kQueries, p * (dp - delta));
        store(scores + key * kQueries, p);
      }
    };
    each_row(
        side, group, start, end,
        [&](int64_t key) {
          const IntVec<T> is_read = reads<T>(key, lo, hi);
          const Vec<T> x = load(scores + key * kQueries);
          if constexpr (kAdjusts) store(scores + key * kQueries, is_read ? x : Vec<T>{});
          weigh(key, is_read ? exp2<T>(x - lse) : Vec<T>{});
        },
        [&](int64_t key) { weigh(key, exp2<T>(load(scores + key * kQueries) - lse)); });
    if constexpr (kAdjusts) store(block.grad_dot_mean + q, load(block.grad_dot_mean + q) + grad_dot_mean);
  }
}

// to[h][query] = from[query][h] * factor
template <typename T>
void transpose_rows(const T* from, int64_t row_size, T factor, T* to) {
  constexpr int64_t kWidth = Simd<T>::kWidth;
  for (int64_t q = 0; q < kQueries; q += kWidth)
    for (int64_t h = 0; h < row_size; h += kWidth) {
      Vec<T> square[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) square[i] = load(from + (q + i) * row_size + h) * factor;
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) store(to + (h + i) * kQueries + q, square[i]);
    }
}

// --- tasks --------------------------------------------------------------------------------------------------------------------------

struct Task {
  int64_t row, kv_head;
  int64_t first_query, last_query;
  int64_t segment;
};

int64_t segment_size(const AttentionArgs& args) {
  const int64_t blocks = (args.queries + kQueries - 1) / kQueries;
  return (blocks + args.segments - 1) / args.segments * kQueries;
}

Task task_of(const AttentionArgs& args, int64_t number) {
  Task task;
  task.segment = args.segments - 1 - number % args.segments;  // the last queries read most: start with them
  task.kv_head = number / args.segments % args.kv_heads;
  task.row = number / args.segments / args.kv_heads;
  task.first_query = std::min(args.queries, task.segment * segment_size(args));
  task.last_query = std::min(args.queries, task.first_query + segment_size(args));
  return task;
}

// What the forward and the backward of one task share: the gathered far rows, and the band rows of the block at hand.
template <typename S, typename T>
class Rows {
 public:
  Rows(const AttentionArgs& args, const Task& task)
      : args_(args),
        task_(task),
        row_size_(padded<T>(args.head_size)),
        far_hull_(bounds(args.far_lo, args.far_hi)),
        longest_band_(longest(args.band_lo, args.band_hi)),
        far_(2 * (far_hull_.hi - far_hull_.lo + kRows) * row_size_),
        longest_causal_(args.extremes_lo == nullptr ? 0 : longest(args.extremes_lo, args.extremes_hi)),
        band_(2 * (longest_band_ + kRows) * row_size_),
        causal_((longest_causal_ + kRows) * row_size_),
        positions_(far_hull_.hi - far_hull_.lo + longest_band_ + longest_causal_ + 3 * kRows) {
    far.k = far_.data();
    far.v = far.k + (far_hull_.hi - far_hull_.lo + kRows) * row_size_;
    far.first = far_hull_.lo;
    far.positions = positions_.data();
    band.k = band_.data();
    band.v = band.k + (longest_band_ + kRows) * row_size_;
    band.positions = far.positions + (far_hull_.hi - far_hull_.lo + kRows);
    causal.k = causal_.data();
    causal.v = nullptr;
    causal.positions = band.positions + (longest_band_ + kRows);
    far.index = args.index + task.row * args.far_columns;
    band.index = causal.index = nullptr;
    const int64_t at = task.row * args.queries + task.first_query, count = task.last_query - task.first_query;
    fill(far_hull_, args.far_lo + at, args.far_hi + at, count, far);
  }

  void start_block(int64_t first_query, int64_t count) {
    const int64_t at = task_.row * args_.queries + first_query;
    far.set_bounds(args_.far_lo + at, args_.far_hi + at, count);
    band.set_bounds(args_.band_lo + at, args_.band_hi + at, count);
    band.first = band.all.lo;
    fill(band.all, args_.band_lo + at, args_.band_hi + at, count, band);
    if (args_.extremes_lo == nullptr) return;
    causal.set_bounds(args_.extremes_lo + at, args_.extremes_hi + at, count);
    causal.first = causal.all.lo;
    fill(causal.all, args_.extremes_lo + at, args_.extremes_hi + at, count, causal);
  }

  Side<T> far, band, causal;  // causal: the keys whose scores are looked at for their extremes only

 private:
  Interval bounds(const int32_t* lo, const int32_t* hi) const {
    const int64_t at = task_.row * args_.queries + task_.first_query;
    return hull(lo + at, hi + at, task_.last_query - task_.first_query);
  }

  int64_t longest(const int32_t* lo, const int32_t* hi) const {
    int64_t longest = 0;
    for (int64_t q = task_.first_query; q < task_.last_query; q += kQueries) {
      const int64_t at = task_.row * args_.queries + q;
      const Interval all = hull(lo + at, hi + at, std::min(kQueries, task_.last_query - q));
      longest = std::max(longest, all.hi - all.lo);
    }
    return longest;
  }

  void fill(Interval columns, const int32_t* lo, const int32_t* hi, int64_t queries, const Side<T>& side) {
    const bool has_values = side.v != nullptr;
    T *k = const_cast<T*>(side.k) - columns.lo * row_size_, *v = const_cast<T*>(side.v) - columns.lo * row_size_;
    T* positions = const_cast<T*>(side.positions) - columns.lo;
    const S* from_k = static_cast<const S*>(args_.k) + task_.row * args_.k_strides.batch + task_.kv_head * args_.k_strides.head;
    const S* from_v = static_cast<const S*>(args_.v) + task_.row * args_.v_strides.batch + task_.kv_head * args_.v_strides.head;
    const auto clear = [&](int64_t c) {
      std::fill_n(k + c * row_size_, row_size_, T(0));
      if (has_values) std::fill_n(v + c * row_size_, row_size_, T(0));
      positions[c] = 0;
    };
    const auto copy = [&](int64_t c) {
      const int64_t key = side.key_of(c), ahead = side.key_of(std::min(c + kAhead, columns.hi - 1));
      copy_row(from_k + key * args_.k_strides.token, from_k + ahead * args_.k_strides.token, args_.head_size, row_size_, k + c * row_size_);
      if (has_values) copy_row(from_v + key * args_.v_strides.token, from_v + ahead * args_.v_strides.token, args_.head_size, row_size_, v + c * row_size_);
      positions[c] = args_.key_positions == nullptr ? T(0) : static_cast<T>(args_.key_positions[task_.row * args_.keys + key]);
    };
    copy_read_columns(columns, lo, hi, queries, copy, clear);
    for (int64_t c = columns.hi; c < columns.hi + kRows; ++c) clear(c);
  }

  const AttentionArgs& args_;
  const Task& task_;
  int64_t row_size_;
  Interval far_hull_;
  int64_t longest_band_;
  Buffer<T> far_;
  int64_t longest_causal_;
  Buffer<T> band_, causal_, positions_;
};

template <typename S, typename T>
void copy_queries(const void* from, const Strides& strides, const Task& task, int64_t head, int64_t first, int64_t count, int64_t head_size,
                  int64_t row_size, T* to) {
  const S* rows = static_cast<const S*>(from) + task.row * strides.batch + head * strides.head;
  for (int64_t q = 0; q < count; ++q) {
    const S* row = rows + (first + q) * strides.token;
    copy_row(row, row + kAhead * strides.token, head_size, row_size, to + q * row_size);
  }
  std::fill_n(to + count * row_size, (kQueries - count) * row_size, T(0));
}

template <typename T>
void set_bias(const AttentionArgs& args, const Task& task, int64_t head, int64_t first, int64_t count, Block<T>& block) {
  block.slope = args.slopes == nullptr ? T(0) : static_cast<T>(args.slopes[head] * kLog2E);
  for (int64_t q = 0; q < kQueries; ++q)
    block.positions[q] = args.slopes != nullptr && q < count ? static_cast<T>(args.query_positions[task.row * args.queries + first + q]) : T(0);
}

// Scores of one tile, in base 2, into block.scores.
template <typename T>
SEPLLM_INLINE void score_tile(const Side<T>& side, int64_t start, int64_t end, int64_t row_size, const T* transposed, bool has_bias, Block<T>& block) {
  score<T>(side, start, end, side.k, row_size, transposed, block.scores);
  if (has_bias) add_bias<T>(side, start, end, block);
}

template <typename T>
SEPLLM_INLINE void multiply_row(T* row, int64_t row_size, T factor) {
  for (int64_t h = 0; h < row_size; ++h) row[h] *= factor;
}

// weight = p (slope s + offset), from the extremes of query i in natural units.
template <typename T>
void set_adjustment(const AttentionArgs& args, T lowest, T highest, bool reads_nothing, int64_t i, Block<T>& block) {
  block.lowest[i] = lowest;
  block.highest[i] = highest;
  T slope = 1, offset = 0;
  if (args.softmax == Softmax::kNormalised) {
    const T low = std::min(lowest, T(0)), bias = static_cast<T>(args.denominator_bias), high = std::max(highest + bias, T(0)) + bias;
    slope = 1 / (high - low);
    offset = (static_cast<T>(args.numerator_bias) - low) * slope;
  }
  block.slope_of_score[i] = reads_nothing ? T(0) : slope;
  block.offset_of_score[i] = reads_nothing ? T(0) : offset;
}

// kRowSize: the padded head size where it is known to the compiler, else 0. kAdjusts: not the standard softmax.
template <typename S, int64_t kRowSize, bool kAdjusts>
void forward_task(const ForwardArgs& args, const Task& task) {
  using T = typename ComputedIn<S>::Type;
  const int64_t row_size = kRowSize ? kRowSize : padded<T>(args.head_size), groups = args.heads / args.kv_heads;
  const bool has_bias = args.slopes != nullptr, has_extremes = kAdjusts && args.softmax == Softmax::kNormalised;
  Rows<S, T> rows(args, task);
  Buffer<T> q(kQueries * row_size), transposed(kQueries * row_size), out(kQueries * row_size), scored(kAdjusts ? kQueries * row_size : 0);
  const auto block = std::make_unique<Block<T>>();
  for (int64_t first = task.first_query; first < task.last_query; first += kQueries) {
    const int64_t count = std::min(kQueries, task.last_query - first);
    rows.start_block(first, count);
    for (int64_t head = task.kv_head * groups; head < (task.kv_head + 1) * groups; ++head) {
      copy_queries<S>(args.q, args.q_strides, task, head, first, count, args.head_size, row_size, q.data());
      transpose_rows<T>(q.data(), row_size, static_cast<T>(args.scale * kLog2E), transposed.data());
      set_bias(args, task, head, first, count, *block);
      std::fill_n(block->largest, kQueries, T(-1e30));
      std::fill_n(block->sum, kQueries, T(0));
      std::fill_n(out.data(), kQueries * row_size, T(0));
      if constexpr (kAdjusts) {
        std::fill_n(scored.data(), kQueries * row_size, T(0));
        std::fill_n(block->lowest, kQueries, T(1e30));
        std::fill_n(block->highest, kQueries, T(-1e30));
        std::fill_n(block->lowest_key, kQueries, 0);
        std::fill_n(block->highest_key, kQueries, 0);
      }
      if (has_extremes && args.extremes_lo != nullptr)
        for (int64_t start = rows.causal.all.lo; start < rows.causal.all.hi; start += kKeys) {
          const int64_t end = std::min(rows.causal.all.hi, start + kKeys);
          score_tile<T>(rows.causal, start, end, row_size, transposed.data(), has_bias, *block);
          find_extremes<T>(rows.causal, start, end, *block);
        }
      for (const Side<T>* side : {&rows.far, &rows.band})
        for (int64_t start = side->all.lo; start < side->all.hi; start += kKeys) {
          const int64_t end = std::min(side->all.hi, start + kKeys);
          score_tile<T>(*side, start, end, row_size, transposed.data(), has_bias, *block);
          if (has_extremes && args.extremes_lo == nullptr) find_extremes<T>(*side, start, end, *block);
          soften<T, kAdjusts>(*side, start, end, *block, [&](int64_t query, Vec<T> factor) {
            for (int64_t i = 0; i < Simd<T>::kWidth; ++i) {
              multiply_row<T>(out.data() + (query + i) * row_size, row_size, factor[i]);
              if constexpr (kAdjusts) multiply_row<T>(scored.data() + (query + i) * row_size, row_size, factor[i]);
            }
          });
          if (!kAdjusts || has_extremes) accumulate_queries<T>(*side, start, end, block->scores, side->v, row_size, out.data());
          if constexpr (kAdjusts) accumulate_queries<T>(*side, start, end, block->others, side->v, row_size, scored.data());
        }
      for (int64_t i = 0; i < count; ++i) {
        const T sum = block->sum[i], factor = sum == 0 ? T(0) : 1 / sum;
        const int64_t at = (task.row * args.heads + head) * args.queries + first + i;
        T* row = out.data() + i * row_size;
        if constexpr (kAdjusts) {
          set_adjustment<T>(args, block->lowest[i] * T(kLn2), block->highest[i] * T(kLn2), sum == 0, i, *block);
          const T* scored_row = scored.data() + i * row_size;
          for (int64_t h = 0; h < row_size; ++h) row[h] = block->slope_of_score[i] * scored_row[h] + block->offset_of_score[i] * row[h];
          if (has_extremes) {
            static_cast<T*>(args.extremes)[2 * at] = block->lowest[i];
            static_cast<T*>(args.extremes)[2 * at + 1] = block->highest[i];
            args.extreme_keys[2 * at] = static_cast<int32_t>(block->lowest_key[i]);
            args.extreme_keys[2 * at + 1] = static_cast<int32_t>(block->highest_key[i]);
          }
        }
        S* to = static_cast<S*>(args.out) + ((task.row * args.queries + first + i) * args.heads + head) * args.head_size;
        for (int64_t h = 0; h < args.head_size; ++h) narrow(row[h] * factor, to + h);
        static_cast<T*>(args.lse)[at] = sum == 0 ? std::numeric_limits<T>::infinity() : block->largest[i] + std::log2(sum);
      }
    }
  }
}

// Where the gradients of a segment's keys are kept: [band rows | far rows] of dk, then of dv.
template <typename T>
struct Slab {
  Interval band, far;
  T *dk, *dv;

  Slab(const BackwardArgs& args, const Task& task) {
    const int64_t at = task.row * args.queries + task.first_query, count = task.last_query - task.first_query;
    band = hull(args.band_lo + at, args.band_hi + at, count);
    if (args.softmax == Softmax::kNormalised) band = {0, args.keys};  // any key may have attained an extreme
    far = hull(args.far_lo + at, args.far_hi + at, count);
    const int64_t size = rows(args) * padded<T>(args.head_size);
    const int64_t number = (task.row * args.kv_heads + task.kv_head) * args.segments + task.segment;
    dk = static_cast<T*>(args.slab) + number * 2 * size;
    dv = dk + size;
  }

  int64_t far_start(int64_t row_size) const { return (band.hi - band.lo + kRows) * row_size; }
  int64_t used(int64_t row_size) const { return far_start(row_size) + (far.hi - far.lo + kRows) * row_size; }
  static int64_t rows(const AttentionArgs& args) { return args.keys + args.far_columns + 2 * kRows; }
};

// Sums in as many lanes as a vector has: the compiler may not reorder a plain sum.
template <typename T>
SEPLLM_INLINE T dot(const T* a, const T* b, int64_t row_size) {
  Vec<T> sums{};
  for (int64_t h = 0; h < row_size; h += Simd<T>::kWidth) sums += load(a + h) * load(b + h);
  T sum = 0;
  for (int64_t i = 0; i < Simd<T>::kWidth; ++i) sum += sums[i];
  return sum;
}

// What the forward left for the backward of these queries: logarithms of the sums, dO . out, extremes.
template <typename S, typename T>
void set_saved(const BackwardArgs& args, const Task& task, int64_t head, int64_t first, int64_t count, const T* grad_out, T* out, int64_t row_size,
               Block<T>& block) {
  const Strides contiguous{args.queries * args.heads * args.head_size, args.heads * args.head_size, args.head_size};
  copy_queries<S>(args.out, contiguous, task, head, first, count, args.head_size, row_size, out);
  for (int64_t i = 0; i < kQueries; ++i) block.lse[i] = block.delta[i] = block.grad_dot_mean[i] = block.slope_of_score[i] = block.offset_of_score[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (task.row * args.heads + head) * args.queries + first + i;
    const T lse = static_cast<const T*>(args.lse)[at];
    block.lse[i] = lse;
    block.delta[i] = dot(grad_out + i * row_size, out + i * row_size, row_size);
    if (args.softmax == Softmax::kStandard) continue;
    const T* extremes = static_cast<const T*>(args.extremes) + (args.extremes == nullptr ? 0 : 2 * at);
    const bool has_extremes = args.softmax == Softmax::kNormalised;
    set_adjustment<T>(args, has_extremes ? extremes[0] : T(0), has_extremes ? extremes[1] : T(0), lse == std::numeric_limits<T>::infinity(), i, block);
  }
}

// What the keys that attained a query's extremes owe to it: a rank-one part of dq and dk.
template <typename S, typename T>
void add_extremes(const BackwardArgs& args, const Task& task, int64_t head, int64_t first, int64_t count, const Block<T>& block, const Slab<T>& slab,
                  int64_t row_size, const T* q, T* dq) {
  const S* k = static_cast<const S*>(args.k) + task.row * args.k_strides.batch + task.kv_head * args.k_strides.head;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* keys = args.extreme_keys + 2 * ((task.row * args.heads + head) * args.queries + first + i);
    const T slope = block.slope_of_score[i];
    const auto owe = [&](int64_t key, T gradient) {
      T* dk = slab.dk + key * row_size;
      for (int64_t h = 0; h < args.head_size; ++h) {
        dq[i * row_size + h] += gradient * widen(k[key * args.k_strides.token + h]);
        dk[h] += gradient * q[i * row_size + h];
      }
    };
    if (slope != 0 && block.lowest[i] < 0) owe(keys[0], (block.delta[i] - block.grad_dot_mean[i]) * slope);
    if (slope != 0 && block.highest[i] + static_cast<T>(args.denominator_bias) > 0) owe(keys[1], -block.delta[i] * slope);
  }
}

template <typename S, int64_t kRowSize, bool kAdjusts>
void backward_task(const BackwardArgs& args, const Task& task) {
  using T = typename ComputedIn<S>::Type;
  const int64_t row_size = kRowSize ? kRowSize : padded<T>(args.head_size), groups = args.heads / args.kv_heads;
  const bool has_bias = args.slopes != nullptr, has_extremes = kAdjusts && args.softmax == Softmax::kNormalised;
  Rows<S, T> rows(args, task);
  Slab<T> slab(args, task);
  std::fill_n(slab.dk, slab.used(row_size), T(0));
  std::fill_n(slab.dv, slab.used(row_size), T(0));
  rows.far.dk = slab.dk + slab.far_start(row_size);
  rows.far.dv = slab.dv + slab.far_start(row_size);
  Buffer<T> q(kQueries * row_size), grad_out(kQueries * row_size), dq(kQueries * row_size);
  Buffer<T> q_transposed(kQueries * row_size), grad_transposed(kQueries * row_size);
  const auto block = std::make_unique<Block<T>>();
  for (int64_t first = task.first_query; first < task.last_query; first += kQueries) {
    const int64_t count = std::min(kQueries, task.last_query - first);
    rows.start_block(first, count);
    rows.band.dk = slab.dk + (rows.band.first - slab.band.lo) * row_size;
    rows.band.dv = slab.dv + (rows.band.first - slab.band.lo) * row_size;
    for (int64_t head = task.kv_head * groups; head < (task.kv_head + 1) * groups; ++head) {
      copy_queries<S>(args.q, args.q_strides, task, head, first, count, args.head_size, row_size, q.data());
      copy_queries<S>(args.grad_out, args.grad_out_strides, task, head, first, count, args.head_size, row_size, grad_out.data());
      transpose_rows<T>(q.data(), row_size, static_cast<T>(args.scale * kLog2E), q_transposed.data());
      transpose_rows<T>(grad_out.data(), row_size, T(1), grad_transposed.data());
      set_bias(args, task, head, first, count, *block);
      set_saved<S, T>(args, task, head, first, count, grad_out.data(), dq.data(), row_size, *block);
      std::fill_n(dq.data(), kQueries * row_size, T(0));
      for (const Side<T>* side : {&rows.far, &rows.band})
        for (int64_t start = side->all.lo; start < side->all.hi; start += kKeys) {
          const int64_t end = std::min(side->all.hi, start + kKeys);
          score_tile<T>(*side, start, end, row_size, q_transposed.data(), has_bias, *block);
          score<T>(*side, start, end, side->v, row_size, grad_transposed.data(), block->others);
          soften_again<T, kAdjusts>(*side, start, end, *block);
          accumulate_queries<T>(*side, start, end, block->others, side->k, row_size, dq.data());
          accumulate_keys<T>(*side, start, end, block->others, block->scores, q.data(), grad_out.data(), row_size);
        }
      if (has_extremes) add_extremes<S, T>(args, task, head, first, count, *block, slab, row_size, q.data(), dq.data());
      for (int64_t i = 0; i < count; ++i) {
        S* to = static_cast<S*>(args.dq) + ((task.row * args.queries + first + i) * args.heads + head) * args.head_size;
        for (int64_t h = 0; h < args.head_size; ++h) narrow(dq.data()[i * row_size + h] * static_cast<T>(args.scale), to + h);
      }
    }
  }
}

// Gradients of all keys of one head: for each, its part in every segment's band, then in every segment's far columns.
template <typename S>
void sum_task(const BackwardArgs& args, int64_t row, int64_t kv_head) {
  using T = typename ComputedIn<S>::Type;
  const int64_t row_size = padded<T>(args.head_size);
  std::vector<Slab<T>> slabs;
  for (int64_t segment = 0; segment < args.segments; ++segment)
    slabs.emplace_back(args, task_of(args, (row * args.kv_heads + kv_head) * args.segments + args.segments - 1 - segment));
  Buffer<T> sums(2 * row_size);
  T *dk = sums.data(), *dv = dk + row_size;
  const int32_t* index = args.index + row * args.far_columns;
  const Interval far = hull(args.far_lo + row * args.queries, args.far_hi + row * args.queries, args.queries);
  int64_t column = far.lo;
  for (int64_t key = 0; key < args.keys; ++key) {
    std::fill_n(dk, 2 * row_size, T(0));
    const auto add = [&](const Slab<T>& slab, int64_t at) {
      for (int64_t h = 0; h < row_size; ++h) {
        dk[h] += slab.dk[at + h];
        dv[h] += slab.dv[at + h];
      }
    };
    for (const Slab<T>& slab : slabs)
      if (key >= slab.band.lo && key < slab.band.hi) add(slab, (key - slab.band.lo) * row_size);
    for (; column < far.hi && index[column] == key; ++column)
      for (const Slab<T>& slab : slabs)
        if (column >= slab.far.lo && column < slab.far.hi) add(slab, slab.far_start(row_size) + (column - slab.far.lo) * row_size);
    S* to_k = static_cast<S*>(args.dk) + ((row * args.keys + key) * args.kv_heads + kv_head) * args.head_size;
    S* to_v = static_cast<S*>(args.dv) + ((row * args.keys + key) * args.kv_heads + kv_head) * args.head_size;
    for (int64_t h = 0; h < args.head_size; ++h) {
      narrow(dk[h] * static_cast<T>(args.scale), to_k + h);
      narrow(dv[h], to_v + h);
    }
  }
}

// Calls run(row size known to the compiler or 0, whether the softmax is adjusted), both as types.
template <typename S, typename Run>
void specialise(const AttentionArgs& args, Run run) {
  using T = typename ComputedIn<S>::Type;
  using Any = std::integral_constant<int64_t, 0>;
  if (args.softmax != Softmax::kStandard) return run(Any{}, std::true_type{});
  if constexpr (std::is_same_v<T, float>) {
    if (padded<T>(args.head_size) == 64) return run(std::integral_constant<int64_t, 64>{}, std::false_type{});
    if (padded<T>(args.head_size) == 128) return run(std::integral_constant<int64_t, 128>{}, std::false_type{});
  }
  run(Any{}, std::false_type{});
}

template <typename S>
void forward_tasks(const ForwardArgs& args, int64_t first, int64_t last) {
  specialise<S>(args, [&](auto row_size, auto adjusts) {
    for (int64_t number = first; number < last; ++number) forward_task<S, row_size, adjusts>(args, task_of(args, number));
  });
}

template <typename S>
void backward_tasks(const BackwardArgs& args, int64_t first, int64_t last) {
  specialise<S>(args, [&](auto row_size, auto adjusts) {
    for (int64_t number = first; number < last; ++number) backward_task<S, row_size, adjusts>(args, task_of(args, number));
  });
}

}  // namespace

int64_t attention_tasks(const AttentionArgs& args) { return args.batch * args.kv_heads * args.segments; }

void attention_forward(Storage storage, const ForwardArgs& args, int64_t first_task, int64_t last_task) {
  with_storage(storage, [&](auto zero) { forward_tasks<decltype(zero)>(args, first_task, last_task); });
}

void attention_backward(Storage storage, const BackwardArgs& args, int64_t first_task, int64_t last_task) {
  with_storage(storage, [&](auto zero) { backward_tasks<decltype(zero)>(args, first_task, last_task); });
}

void attention_backward_sum(Storage storage, const BackwardArgs& args, int64_t first_task, int64_t last_task) {
  with_storage(storage, [&](auto zero) {
    for (int64_t number = first_task; number < last_task; ++number)
      sum_task<decltype(zero)>(args, number / args.kv_heads, number % args.kv_heads);
  });
}

int64_t backward_slab_bytes(Storage storage, const AttentionArgs& args) {
  const bool is_double = storage == Storage::kDouble;
  const int64_t row_size = is_double ? padded<double>(args.head_size) * 8 : padded<float>(args.head_size) * 4;
  return attention_tasks(args) * 2 * Slab<float>::rows(args) * row_size;
}

}  // namespace sepllm
