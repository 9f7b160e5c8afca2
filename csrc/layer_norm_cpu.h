// What the binding (torch) and the CPU kernels of layer norms agree on. Parameters and their gradients are in the type computed in.
#pragma once

#include "layer_norm_math.h"
#include "storage.h"

namespace sepllm {

// Rows are independent of one another.
void layer_norm(Storage storage, const LayerNormForwardArgs& args, int64_t first_row, int64_t last_row);

// dx, and in `partial` the parameters' gradients of each segment of rows. Then layer_norm_backward_sum adds the segments up for each of
// the 2 norms arrays: weights of all norms, then biases.
int64_t layer_norm_segments(int64_t rows);
int64_t layer_norm_partial_bytes(Storage storage, const LayerNormArgs& args);
void layer_norm_backward(Storage storage, const LayerNormBackwardArgs& args, int64_t first_segment, int64_t last_segment);
void layer_norm_backward_sum(Storage storage, const LayerNormBackwardArgs& args, int64_t first_array, int64_t last_array);

}  // namespace sepllm
