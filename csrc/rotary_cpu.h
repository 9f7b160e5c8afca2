// What the binding (torch) and the CPU kernels of the rotary embeddings agree on.
#pragma once

#include "rotary_math.h"
#include "storage.h"

namespace sepllm {

// Turns q and k where they stand. Tasks are the batch * tokens tokens, independent of one another.
void rotate_packed(Storage storage, const RotaryArgs& args, int64_t first_token, int64_t last_token);

// The packed gradient of what rotate_packed made of q and k, and of v.
void rotate_packed_backward(Storage storage, const RotaryGradientArgs& args, int64_t first_token, int64_t last_token);

}  // namespace sepllm
