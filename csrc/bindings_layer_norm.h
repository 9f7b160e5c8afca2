// Arguments and results of the layer norm operators, the same for every device. `run` computes on the device: run(storage, args).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "layer_norm_math.h"

namespace sepllm {

// Contiguous, and where CUDA kernels read it on a boundary of 16 bytes.
inline at::Tensor placed(const at::Tensor& x) {
  const at::Tensor whole = x.contiguous();
  return whole.is_cuda() && reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 != 0 ? whole.clone() : whole;
}

// One norm, or the two of one input. Its tensors as the kernels read them; keeps what had to be copied alive.
class Norms {
 public:
  Norms(const at::Tensor& x, at::TensorList weights, at::TensorList biases, double epsilon) : x_(placed(x)), epsilon_(epsilon) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && (weights.size() == 1 || weights.size() == 2) && weights.size() == biases.size(),
                      "layer_norms takes one weight and one bias, or two of each, and an x of at least one axis.");
    for (size_t norm = 0; norm < weights.size(); ++norm) {
      weights_.push_back(checked(weights[norm], weights[0]));
      biases_.push_back(checked(biases[norm], weights[0]));
    }
  }

  void fill(LayerNormArgs& args) const {
    args.size = x_.size(-1);
    args.rows = args.size ? x_.numel() / args.size : 0;
    args.norms = static_cast<int>(weights_.size());
    args.epsilon = epsilon_;
    args.x = x_.const_data_ptr();
    args.has_wide_parameters = weights_[0].scalar_type() == computed_in(x_);
    for (int norm = 0; norm < args.norms; ++norm) {
      args.weights[norm] = weights_[norm].const_data_ptr();
      args.biases[norm] = biases_[norm].const_data_ptr();
    }
  }

  // Of the kernels' gradients of parameters.
  at::TensorOptions parameter_options() const { return weights_[0].options(); }

 private:
  // CPU kernels read parameters in the type that they compute in.
  at::Tensor checked(const at::Tensor& parameter, const at::Tensor& first) const {
    TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.size(0) == x_.size(-1) && parameter.device() == x_.device(), "Weights and biases must be [",
                      x_.size(-1), "] on ", x_.device(), " like the last axis of x ", x_.sizes(), ", but one is ", parameter.sizes(), " on ",
                      parameter.device(), ".");
    TORCH_CHECK_VALUE(parameter.scalar_type() == first.scalar_type() &&
                          (parameter.scalar_type() == x_.scalar_type() || parameter.scalar_type() == computed_in(x_)),
                      "Weights and biases must all be ", x_.scalar_type(), " like x, or all ", computed_in(x_), ", but one is ",
                      parameter.scalar_type(), ".");
    return placed(x_.is_cuda() ? parameter : parameter.to(computed_in(x_)));
  }

  at::Tensor x_;
  double epsilon_;
  std::vector<at::Tensor> weights_, biases_;
};

template <typename Run>
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> layer_norms_by(const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                                                                           double epsilon, Run run) {
  const Storage storage = stored_as(x, "x");
  const Norms norms(x, weights, biases, epsilon);
  LayerNormForwardArgs args{};
  norms.fill(args);
  const auto statistics = x.options().dtype(computed_in(x));
  std::vector<at::Tensor> outs;
  for (int norm = 0; norm < args.norms; ++norm) {
    outs.push_back(at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous)));
    args.outs[norm] = outs.back().mutable_data_ptr();
  }
  at::Tensor mean = at::empty({args.rows}, statistics), rstd = at::empty({args.rows}, statistics);
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  run(storage, args);
  return {outs, mean, rstd};
}

// Gradients of x, then of every weight, then of every bias. partial_bytes(storage, args): what the kernels need of memory between them.
template <typename PartialBytes, typename Run>
std::vector<at::Tensor> layer_norms_backward_by(at::TensorList grads, const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                                                const at::Tensor& mean, const at::Tensor& rstd, PartialBytes partial_bytes, Run run) {
  const Storage storage = stored_as(x, "x");
  const Norms norms(x, weights, biases, 0);
  LayerNormBackwardArgs args{};
  norms.fill(args);
  TORCH_CHECK_VALUE(grads.size() == weights.size(), "There must be as many gradients as norms.");
  std::vector<at::Tensor> read, results{at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous))};
  for (const at::Tensor& grad : grads) {
    TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "Gradients must be like x.");
    read.push_back(placed(grad));
    args.grads[read.size() - 1] = read.back().const_data_ptr();
  }
  for (const at::Tensor* statistic : {&mean, &rstd})
    TORCH_CHECK_VALUE(statistic->numel() == args.rows && statistic->scalar_type() == computed_in(x) && statistic->is_contiguous(),
                      "mean and rstd must be those of the forward pass.");
  args.mean = mean.const_data_ptr();
  args.rstd = rstd.const_data_ptr();
  args.dx = results[0].mutable_data_ptr();
  for (int array = 0; array < 2 * args.norms; ++array) {
    results.push_back(at::empty({args.size}, norms.parameter_options()));
    (array < args.norms ? args.dweights[array] : args.dbiases[array - args.norms]) = results.back().mutable_data_ptr();
  }
  at::Tensor partial = at::empty({partial_bytes(storage, args)}, x.options().dtype(at::kByte));
  args.partial = partial.mutable_data_ptr();
  run(storage, args);
  for (size_t i = 1; i < results.size(); ++i) results[i] = results[i].to(weights[0].scalar_type());
  return results;
}

}  // namespace sepllm
