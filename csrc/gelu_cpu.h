// What the binding (torch) and the CPU kernels of bias + GELU agree on.
#pragma once

#include "gelu_math.h"
#include "storage.h"

namespace sepllm {

// Rows are independent of one another.
void gelu_forward(Storage storage, const GeluForwardArgs& args, int64_t first_row, int64_t last_row);

// Segments of kGeluRowsPerSegment rows: dx, and with a bias the sums of its gradient over the segment. Then gelu_backward_sum adds these up.
void gelu_backward(Storage storage, const GeluBackwardArgs& args, int64_t first_segment, int64_t last_segment);
void gelu_backward_sum(Storage storage, const GeluBackwardArgs& args, int64_t first_column, int64_t last_column);

}  // namespace sepllm
