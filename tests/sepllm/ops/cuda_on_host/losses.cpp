// The launchers of the cross-entropy, bias + GELU and masked softmax for ctypes, of contiguous tensors.
#include <cstdint>

#include "cross_entropy_cuda.h"
#include "gelu_cuda.h"
#include "masked_softmax_cuda.h"

using namespace sepllm;

extern "C" {

// Sizes: rows, columns, elements between rows, first label.
void statistics(int storage, const int64_t* sizes, int is_shard, const void* logits, const int64_t* labels, void* maximum, void* total, void* target) {
  const StatisticsArgs args{{sizes[0], sizes[1], sizes[2], sizes[3], logits, labels, is_shard != 0}, maximum, total, target};
  cross_entropy_statistics_cuda(static_cast<Storage>(storage), args, nullptr);
}

// Sizes: as before, then the elements between rows of the gradient.
void gradient(int storage, const int64_t* sizes, const void* logits, const int64_t* labels, const void* maximum, const void* total,
              const void* grad_losses, void* to) {
  const GradientArgs args{{sizes[0], sizes[1], sizes[2], sizes[3], logits, labels, true}, maximum, total, grad_losses, to, sizes[4]};
  cross_entropy_gradient_cuda(static_cast<Storage>(storage), args, nullptr);
}

// Sizes: rows, columns, elements.
void gelu(int storage, const int64_t* sizes, int is_tanh, const void* x, const void* bias, void* out) {
  gelu_forward_cuda(static_cast<Storage>(storage), {{sizes[0], sizes[1], sizes[2], is_tanh != 0, x, bias}, out}, nullptr);
}

void gelu_backward(int storage, const int64_t* sizes, int is_tanh, const void* x, const void* bias, const void* grad_out, void* dx, void* dbias,
                   void* partial) {
  const GeluBackwardArgs args{{sizes[0], sizes[1], sizes[2], is_tanh != 0, x, bias}, grad_out, dx, dbias, partial};
  gelu_backward_cuda(static_cast<Storage>(storage), args, nullptr);
}

// Sizes: batch, heads, queries, keys, elements between heads of the mask.
void softmax(int storage, const int64_t* sizes, double scale, const void* scores, const bool* is_read, void* weights) {
  const auto [batch, heads, queries, keys, head_stride] = *reinterpret_cast<const int64_t(*)[5]>(sizes);
  const int64_t batch_stride = head_stride ? heads * head_stride : queries * keys;
  const MaskedSoftmaxForwardArgs args{{heads, queries, batch * heads * queries, keys, scale}, scores, is_read, batch_stride, head_stride, keys, weights};
  masked_softmax_cuda(static_cast<Storage>(storage), args, nullptr);
}

void softmax_backward(int storage, const int64_t* sizes, double scale, const void* weights, const void* grad_weights, void* grad_scores) {
  const auto [batch, heads, queries, keys, head_stride] = *reinterpret_cast<const int64_t(*)[5]>(sizes);
  const MaskedSoftmaxBackwardArgs args{{heads, queries, batch * heads * queries, keys, scale}, weights, grad_weights, grad_scores};
  masked_softmax_backward_cuda(static_cast<Storage>(storage), args, nullptr);
}

}  // extern "C"
