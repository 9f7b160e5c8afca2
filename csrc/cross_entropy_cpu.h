// What the binding (torch) and the CPU kernels of the cross-entropy agree on.
#pragma once

#include "cross_entropy_math.h"
#include "storage.h"

namespace sepllm {

// Rows are independent of one another.
void cross_entropy_statistics(Storage storage, const StatisticsArgs& args, int64_t first_row, int64_t last_row);
void cross_entropy_gradient(Storage storage, const GradientArgs& args, int64_t first_row, int64_t last_row);

}  // namespace sepllm
