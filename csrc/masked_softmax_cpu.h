// What the binding (torch) and the CPU kernels of the masked softmax agree on.
#pragma once

#include "masked_softmax_math.h"
#include "storage.h"

namespace sepllm {

// Rows are independent of one another.
void masked_softmax(Storage storage, const MaskedSoftmaxForwardArgs& args, int64_t first_row, int64_t last_row);
void masked_softmax_backward(Storage storage, const MaskedSoftmaxBackwardArgs& args, int64_t first_row, int64_t last_row);

}  // namespace sepllm
