// What the operator's binding (torch) and its kernels (plain C++) agree on.
#pragma once

#include <cstdint>

#include "storage.h"

namespace sepllm {

struct Strides {
  int64_t batch, token, head;  // elements; the head's own elements are adjacent
};

enum class Softmax { kStandard, kRaw, kNormalised };

// Shapes as in sepllm.attention.attend: q [B, T, N, H], k and v [B, S, K, H], bounds [B, T], index [B, M].
struct AttentionArgs {
  int64_t batch, queries, keys, heads, kv_heads, head_size, far_columns;
  double scale;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  const int32_t *index, *far_lo, *far_hi, *band_lo, *band_hi;  // contiguous
  const double *slopes, *query_positions, *key_positions;      // contiguous [N], [B, T], [B, S]; null without a position bias
  // The self-adjust softmax; extremes bound the keys [B, T] whose scores count for it, null: those read.
  Softmax softmax;
  double numerator_bias, denominator_bias;
  const int32_t *extremes_lo, *extremes_hi;
  int64_t segments;  // parts into which each row's queries are cut, so that many threads find work
};

// out [B, T, N, H] contiguous, of the dtype of q. lse [B, N, T], float (double for double): the base-2 logarithm of the sum of
// 2^(score * log2(e)) over the keys read, +inf where none is.
// Of kNormalised also, both [B, N, T, 2], the lowest and highest score (in the dtype of lse) and the first keys that attain them.
struct ForwardArgs : AttentionArgs {
  void *out, *lse, *extremes;
  int32_t* extreme_keys;
};

// All gradients contiguous, of the dtype of q. slab: see backward_slab_bytes.
struct BackwardArgs : AttentionArgs {
  const void *grad_out, *out, *lse, *extremes;
  const int32_t* extreme_keys;
  Strides grad_out_strides;
  void *dq, *dk, *dv, *slab;
};

// Tasks are independent of one another and of the order in which they run.
int64_t attention_tasks(const AttentionArgs& args);
void attention_forward(Storage storage, const ForwardArgs& args, int64_t first_task, int64_t last_task);
void attention_backward(Storage storage, const BackwardArgs& args, int64_t first_task, int64_t last_task);

// After all of the tasks above: sums what the segments found for each key. Tasks: batch * kv_heads.
void attention_backward_sum(Storage storage, const BackwardArgs& args, int64_t first_task, int64_t last_task);
int64_t backward_slab_bytes(Storage storage, const AttentionArgs& args);

}  // namespace sepllm
