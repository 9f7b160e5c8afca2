// The only file of the CUDA operators that knows torch: arguments and results as on a CPU, kernels on the current stream. Schemas stand in
// bindings_cpu.cpp, whose library is loaded first.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "bindings_cross_entropy.h"
#include "bindings_gelu.h"
#include "bindings_layer_norm.h"
#include "bindings_masked_softmax.h"
#include "bindings_rotary.h"
#include "cross_entropy_cuda.h"
#include "gelu_cuda.h"
#include "layer_norm_cuda.h"
#include "masked_softmax_cuda.h"
#include "rotary_cuda.h"

namespace {
using at::Tensor;

void rotate_packed(const Tensor& packed, const Tensor& cos, const Tensor& sin, int64_t num_heads, int64_t num_kv_heads, int64_t head_size) {
  const c10::cuda::CUDAGuard guard(packed.device());
  sepllm::rotate_packed_by(packed, cos, sin, num_heads, num_kv_heads, head_size, [](sepllm::Storage storage, const sepllm::RotaryArgs& args) {
    C10_CUDA_CHECK(sepllm::rotate_packed_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

Tensor rotate_packed_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin) {
  const c10::cuda::CUDAGuard guard(dq.device());
  return sepllm::rotate_packed_backward_by(dq, dk, dv, cos, sin, [](sepllm::Storage storage, const sepllm::RotaryGradientArgs& args) {
    C10_CUDA_CHECK(sepllm::rotate_packed_backward_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

void check_size(sepllm::Storage storage, const sepllm::LayerNormArgs& args) {
  TORCH_CHECK_VALUE(sepllm::layer_norm_cuda_fits(storage, args), "The CUDA kernels keep a row of layer_norms in registers, and ", args.size,
                    " elements are too many for them: use impl='reference'.");
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> layer_norms(const Tensor& x, at::TensorList weights, at::TensorList biases, double epsilon) {
  const c10::cuda::CUDAGuard guard(x.device());
  return sepllm::layer_norms_by(x, weights, biases, epsilon, [](sepllm::Storage storage, const sepllm::LayerNormForwardArgs& args) {
    check_size(storage, args);
    C10_CUDA_CHECK(sepllm::layer_norm_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

std::vector<Tensor> layer_norms_backward(at::TensorList grads, const Tensor& x, at::TensorList weights, at::TensorList biases, const Tensor& mean,
                                         const Tensor& rstd) {
  const c10::cuda::CUDAGuard guard(x.device());
  return sepllm::layer_norms_backward_by(
      grads, x, weights, biases, mean, rstd, sepllm::layer_norm_cuda_partial_bytes,
      [](sepllm::Storage storage, const sepllm::LayerNormBackwardArgs& args) {
        check_size(storage, args);
        C10_CUDA_CHECK(sepllm::layer_norm_backward_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
      });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_statistics(const Tensor& logits, const Tensor& labels, int64_t first_label, bool is_shard) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return sepllm::cross_entropy_statistics_by(
      logits, labels, first_label, is_shard, [](sepllm::Storage storage, const sepllm::StatisticsArgs& args) {
        C10_CUDA_CHECK(sepllm::cross_entropy_statistics_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
      });
}

void write_cross_entropy_gradient(sepllm::Storage storage, const sepllm::GradientArgs& args) {
  C10_CUDA_CHECK(sepllm::cross_entropy_gradient_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
}

void cross_entropy_write_gradient(const Tensor& logits, const Tensor& labels, const Tensor& maximum, const Tensor& total, const Tensor& grad_losses,
                                  int64_t first_label) {
  const c10::cuda::CUDAGuard guard(logits.device());
  sepllm::cross_entropy_write_gradient_by(logits, labels, maximum, total, grad_losses, first_label, write_cross_entropy_gradient);
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& maximum, const Tensor& total, const Tensor& grad_losses,
                              int64_t first_label) {
  const c10::cuda::CUDAGuard guard(logits.device());
  return sepllm::cross_entropy_gradient_by(logits, labels, maximum, total, grad_losses, first_label, write_cross_entropy_gradient);
}

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool is_tanh) {
  const c10::cuda::CUDAGuard guard(x.device());
  return sepllm::bias_gelu_by(x, bias, is_tanh, [](sepllm::Storage storage, const sepllm::GeluForwardArgs& args) {
    C10_CUDA_CHECK(sepllm::gelu_forward_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& bias, bool is_tanh) {
  const c10::cuda::CUDAGuard guard(x.device());
  return sepllm::bias_gelu_backward_by(grad_out, x, bias, is_tanh, [](sepllm::Storage storage, const sepllm::GeluBackwardArgs& args) {
    C10_CUDA_CHECK(sepllm::gelu_backward_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

Tensor masked_softmax(const Tensor& scores, const Tensor& is_read, double scale) {
  const c10::cuda::CUDAGuard guard(scores.device());
  return sepllm::masked_softmax_by(scores, is_read, scale, [](sepllm::Storage storage, const sepllm::MaskedSoftmaxForwardArgs& args) {
    C10_CUDA_CHECK(sepllm::masked_softmax_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

Tensor masked_softmax_backward(const Tensor& grad_weights, const Tensor& weights, double scale) {
  const c10::cuda::CUDAGuard guard(weights.device());
  return sepllm::masked_softmax_backward_by(grad_weights, weights, scale, [](sepllm::Storage storage, const sepllm::MaskedSoftmaxBackwardArgs& args) {
    C10_CUDA_CHECK(sepllm::masked_softmax_backward_cuda(storage, args, c10::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sepllm, CUDA, m) {
  m.impl("rotate_packed", rotate_packed);
  m.impl("rotate_packed_backward", rotate_packed_backward);
  m.impl("layer_norms", layer_norms);
  m.impl("layer_norms_backward", layer_norms_backward);
  m.impl("cross_entropy_statistics", cross_entropy_statistics);
  m.impl("cross_entropy_write_gradient", cross_entropy_write_gradient);
  m.impl("cross_entropy_gradient", cross_entropy_gradient);
  m.impl("bias_gelu", bias_gelu);
  m.impl("bias_gelu_backward", bias_gelu_backward);
  m.impl("masked_softmax", masked_softmax);
  m.impl("masked_softmax_backward", masked_softmax_backward);
}
