// The only file of the CPU operators that knows torch: checks arguments, allocates results, spreads tasks over torch's threads.
// Schemas stand here; fakes, gradients and the reference in plain torch stand in sepllm/ops.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings.h"
#include "bindings_cross_entropy.h"
#include "bindings_gelu.h"
#include "bindings_layer_norm.h"
#include "bindings_masked_softmax.h"
#include "bindings_rotary.h"
#include "cross_entropy_cpu.h"
#include "gelu_cpu.h"
#include "layer_norm_cpu.h"
#include "masked_softmax_cpu.h"
#include "rotary_cpu.h"
#include "sep_attention_cpu.h"

namespace {
using at::Tensor;
using sepllm::computed_in;
using sepllm::stored_as;
using sepllm::with_adjacent_heads;
using OptionalTensor = std::optional<Tensor>;

sepllm::Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// The tensors as the kernels read them; keeps what had to be copied alive.
struct Inputs {
  Tensor q, k, v, index, far_lo, far_hi, band_lo, band_hi, slopes, query_positions, key_positions, extremes_lo, extremes_hi;

  void fill(sepllm::AttentionArgs& args, double scale, int64_t softmax, double numerator_bias, double denominator_bias) const {
    args.batch = q.size(0);
    args.queries = q.size(1);
    args.heads = q.size(2);
    args.head_size = q.size(3);
    args.keys = k.size(1);
    args.kv_heads = k.size(2);
    args.far_columns = index.size(1);
    args.scale = scale;
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.v = v.const_data_ptr();
    args.q_strides = strides_of(q);
    args.k_strides = strides_of(k);
    args.v_strides = strides_of(v);
    args.index = index.const_data_ptr<int32_t>();
    args.far_lo = far_lo.const_data_ptr<int32_t>();
    args.far_hi = far_hi.const_data_ptr<int32_t>();
    args.band_lo = band_lo.const_data_ptr<int32_t>();
    args.band_hi = band_hi.const_data_ptr<int32_t>();
    args.slopes = slopes.defined() ? slopes.const_data_ptr<double>() : nullptr;
    args.query_positions = slopes.defined() ? query_positions.const_data_ptr<double>() : nullptr;
    args.key_positions = slopes.defined() ? key_positions.const_data_ptr<double>() : nullptr;
    args.softmax = static_cast<sepllm::Softmax>(softmax);
    args.numerator_bias = numerator_bias;
    args.denominator_bias = denominator_bias;
    args.extremes_lo = extremes_lo.defined() ? extremes_lo.const_data_ptr<int32_t>() : nullptr;
    args.extremes_hi = extremes_hi.defined() ? extremes_hi.const_data_ptr<int32_t>() : nullptr;
    // Rows and heads are work enough for that many threads; more of them share a row's queries.
    const int64_t heads = std::max<int64_t>(1, args.batch * args.kv_heads);
    args.segments = std::clamp<int64_t>((at::get_num_threads() + heads - 1) / heads, 1, std::max<int64_t>(1, args.queries / 256));
  }
};

void check_range(const Tensor& x, int64_t lowest, int64_t highest, const char* name) {
  const Tensor values = x.contiguous();
  const int32_t* at = values.const_data_ptr<int32_t>();
  bool is_inside = true;
  for (int64_t i = 0; i < values.numel(); ++i) is_inside &= at[i] >= lowest && at[i] <= highest;
  TORCH_CHECK_VALUE(is_inside, name, " has a value outside ", lowest, " .. ", highest, ".");
}

// The kernels walk over memory by these: inside the columns, and never smaller than the query's before.
void check_bounds(const Tensor& lo, const Tensor& hi, int64_t columns, const char* name) {
  for (const Tensor* bound : {&lo, &hi}) {
    check_range(*bound, 0, columns, name);
    const Tensor values = bound->contiguous();
    const int32_t* at = values.const_data_ptr<int32_t>();
    bool is_ascending = true;
    for (int64_t row = 0; row < values.size(0); ++row, at += values.size(1))
      for (int64_t i = 1; i < values.size(1); ++i) is_ascending &= at[i] >= at[i - 1];
    TORCH_CHECK_VALUE(is_ascending, "The ", name, " bounds must not decrease with the query.");
  }
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, std::initializer_list<const Tensor*> bounds) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3), "q ", q.sizes(),
                    ", k ", k.sizes(), ", v ", v.sizes(), ": they must be [B, T, N, H], [B, S, K, H], [B, S, K, H].");
  TORCH_CHECK_VALUE(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "q has ", q.size(2), " heads and k ", k.size(2),
                    ": the first must be a multiple of the second.");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v must have one dtype, but are ",
                    q.scalar_type(), ", ", k.scalar_type(), " and ", v.scalar_type(), ".");
  TORCH_CHECK_VALUE(index.dim() == 2 && index.size(0) == q.size(0) && index.scalar_type() == at::kInt, "index must be int32 [B, M].");
  for (const Tensor* bound : bounds)
    TORCH_CHECK_VALUE(bound->sizes() == q.sizes().slice(0, 2) && bound->scalar_type() == at::kInt, "Bounds must be int32 [B, T] like q ", q.sizes(),
                      ", but one is ", bound->scalar_type(), " ", bound->sizes(), ".");
}

Inputs checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& far_lo, const Tensor& far_hi,
               const Tensor& band_lo, const Tensor& band_hi, const OptionalTensor& slopes, const OptionalTensor& query_positions,
               const OptionalTensor& key_positions, const OptionalTensor& extremes_lo, const OptionalTensor& extremes_hi) {
  check_shapes(q, k, v, index, {&far_lo, &far_hi, &band_lo, &band_hi});
  check_bounds(far_lo, far_hi, index.size(1), "far");
  check_bounds(band_lo, band_hi, k.size(1), "band");
  check_range(index, 0, k.size(1) - 1, "index");
  Inputs inputs{with_adjacent_heads(q), with_adjacent_heads(k), with_adjacent_heads(v), index.contiguous(),
                far_lo.contiguous(),    far_hi.contiguous(),    band_lo.contiguous(),   band_hi.contiguous()};
  TORCH_CHECK_VALUE(slopes.has_value() == query_positions.has_value() && slopes.has_value() == key_positions.has_value(),
                    "A position bias needs slopes, query_positions and key_positions.");
  if (slopes.has_value()) {
    TORCH_CHECK_VALUE(slopes->numel() == q.size(2) && query_positions->sizes() == q.sizes().slice(0, 2) && key_positions->sizes() == k.sizes().slice(0, 2),
                      "slopes, query_positions and key_positions must be [N], [B, T] and [B, S].");
    inputs.slopes = slopes->to(at::kDouble).contiguous();
    inputs.query_positions = query_positions->to(at::kDouble).contiguous();
    inputs.key_positions = key_positions->to(at::kDouble).contiguous();
  }
  TORCH_CHECK_VALUE(extremes_lo.has_value() == extremes_hi.has_value(), "Extremes need both of their bounds.");
  if (extremes_lo.has_value()) {
    check_shapes(q, k, v, index, {&*extremes_lo, &*extremes_hi});
    check_bounds(*extremes_lo, *extremes_hi, k.size(1), "extremes");
    inputs.extremes_lo = extremes_lo->contiguous();
    inputs.extremes_hi = extremes_hi->contiguous();
  }
  return inputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sep_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& far_lo,
                                                         const Tensor& far_hi, const Tensor& band_lo, const Tensor& band_hi,
                                                         const OptionalTensor& slopes, const OptionalTensor& query_positions,
                                                         const OptionalTensor& key_positions, const OptionalTensor& extremes_lo,
                                                         const OptionalTensor& extremes_hi, double scale, int64_t softmax, double numerator_bias,
                                                         double denominator_bias) {
  const Inputs inputs =
      checked(q, k, v, index, far_lo, far_hi, band_lo, band_hi, slopes, query_positions, key_positions, extremes_lo, extremes_hi);
  const sepllm::Storage storage = stored_as(q, "q");
  sepllm::ForwardArgs args{};
  inputs.fill(args, scale, softmax, numerator_bias, denominator_bias);
  const auto wide = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const int64_t extremes_size = args.softmax == sepllm::Softmax::kNormalised ? 2 : 0;
  Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, wide);
  Tensor extremes = at::empty({q.size(0), q.size(2), q.size(1), extremes_size}, wide);
  Tensor extreme_keys = at::empty(extremes.sizes(), q.options().dtype(at::kInt));
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.extremes = extremes_size ? extremes.mutable_data_ptr() : nullptr;
  args.extreme_keys = extremes_size ? extreme_keys.mutable_data_ptr<int32_t>() : nullptr;
  at::parallel_for(0, sepllm::attention_tasks(args), 1, [&](int64_t first, int64_t last) { sepllm::attention_forward(storage, args, first, last); });
  return {out, lse, extremes, extreme_keys};
}

std::tuple<Tensor, Tensor, Tensor> sep_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Tensor& index, const Tensor& far_lo, const Tensor& far_hi, const Tensor& band_lo,
                                                          const Tensor& band_hi, const OptionalTensor& slopes, const OptionalTensor& query_positions,
                                                          const OptionalTensor& key_positions, const OptionalTensor& extremes_lo,
                                                          const OptionalTensor& extremes_hi, const Tensor& out, const Tensor& lse,
                                                          const Tensor& extremes, const Tensor& extreme_keys, double scale, int64_t softmax,
                                                          double numerator_bias, double denominator_bias) {
  const Inputs inputs =
      checked(q, k, v, index, far_lo, far_hi, band_lo, band_hi, slopes, query_positions, key_positions, extremes_lo, extremes_hi);
  const sepllm::Storage storage = stored_as(q, "q");
  TORCH_CHECK_VALUE(grad_out.sizes() == q.sizes() && grad_out.scalar_type() == q.scalar_type(), "grad_out must be like q.");
  const Tensor grad = with_adjacent_heads(grad_out), saved = out.contiguous(), sums = lse.contiguous();
  const Tensor scores = extremes.contiguous(), attaining = extreme_keys.contiguous();
  const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous)); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  sepllm::BackwardArgs args{};
  inputs.fill(args, scale, softmax, numerator_bias, denominator_bias);
  check_range(attaining, 0, args.keys - 1, "extreme_keys");
  args.grad_out = grad.const_data_ptr();
  args.grad_out_strides = strides_of(grad);
  args.out = saved.const_data_ptr();
  args.lse = sums.const_data_ptr();
  args.extremes = scores.numel() ? scores.const_data_ptr() : nullptr;
  args.extreme_keys = scores.numel() ? attaining.const_data_ptr<int32_t>() : nullptr;
  args.dq = dq.mutable_data_ptr();
  args.dk = dk.mutable_data_ptr();
  args.dv = dv.mutable_data_ptr();
  Tensor slab = at::empty({sepllm::backward_slab_bytes(storage, args)}, q.options().dtype(at::kByte));
  args.slab = slab.mutable_data_ptr();
  at::parallel_for(0, sepllm::attention_tasks(args), 1, [&](int64_t first, int64_t last) { sepllm::attention_backward(storage, args, first, last); });
  at::parallel_for(0, args.batch * args.kv_heads, 1, [&](int64_t first, int64_t last) { sepllm::attention_backward_sum(storage, args, first, last); });
  return {dq, dk, dv};
}

// --- cross-entropy ------------------------------------------------------------------------------------------------------------------

// Rows per task: enough work to be worth a thread.
int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }

void check_labels(const Tensor& labels, int64_t first_label, int64_t columns) {
  const Tensor values = labels.contiguous();
  const int64_t* at = values.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < values.numel(); ++row)
    TORCH_CHECK_VALUE(at[row] >= first_label && at[row] < first_label + columns, "labels[", row, "] is ", at[row], ", outside the vocabulary ",
                      first_label, " .. ", first_label + columns - 1, ": mask a token by its loss, and give it any label inside.");
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_statistics(const Tensor& logits, const Tensor& labels, int64_t first_label, bool is_shard) {
  sepllm::check_logits(logits, labels);
  if (!is_shard) check_labels(labels, first_label, logits.size(1));
  return sepllm::cross_entropy_statistics_by(
      logits, labels, first_label, is_shard, [](sepllm::Storage storage, const sepllm::StatisticsArgs& args) {
        at::parallel_for(0, args.rows, rows_per_task(args.columns),
                         [&](int64_t first, int64_t last) { sepllm::cross_entropy_statistics(storage, args, first, last); });
      });
}

void write_cross_entropy_gradient(sepllm::Storage storage, const sepllm::GradientArgs& args) {
  at::parallel_for(0, args.rows, rows_per_task(args.columns),
                   [&](int64_t first, int64_t last) { sepllm::cross_entropy_gradient(storage, args, first, last); });
}

void cross_entropy_write_gradient(const Tensor& logits, const Tensor& labels, const Tensor& maximum, const Tensor& total, const Tensor& grad_losses,
                                  int64_t first_label) {
  sepllm::cross_entropy_write_gradient_by(logits, labels, maximum, total, grad_losses, first_label, write_cross_entropy_gradient);
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& maximum, const Tensor& total, const Tensor& grad_losses,
                              int64_t first_label) {
  return sepllm::cross_entropy_gradient_by(logits, labels, maximum, total, grad_losses, first_label, write_cross_entropy_gradient);
}

// --- rotary embeddings --------------------------------------------------------------------------------------------------------------

// Tokens per task: enough work to be worth a thread.
int64_t tokens_per_task(const sepllm::RotaryArgs& args) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, args.heads.row_size())); }

void rotate_packed(const Tensor& packed, const Tensor& cos, const Tensor& sin, int64_t num_heads, int64_t num_kv_heads, int64_t head_size) {
  sepllm::rotate_packed_by(packed, cos, sin, num_heads, num_kv_heads, head_size, [](sepllm::Storage storage, const sepllm::RotaryArgs& args) {
    at::parallel_for(0, args.batch * args.tokens, tokens_per_task(args),
                     [&](int64_t first, int64_t last) { sepllm::rotate_packed(storage, args, first, last); });
  });
}

Tensor rotate_packed_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin) {
  return sepllm::rotate_packed_backward_by(dq, dk, dv, cos, sin, [](sepllm::Storage storage, const sepllm::RotaryGradientArgs& args) {
    at::parallel_for(0, args.batch * args.tokens, tokens_per_task(args),
                     [&](int64_t first, int64_t last) { sepllm::rotate_packed_backward(storage, args, first, last); });
  });
}

// --- layer norms --------------------------------------------------------------------------------------------------------------------

std::tuple<std::vector<Tensor>, Tensor, Tensor> layer_norms(const Tensor& x, at::TensorList weights, at::TensorList biases, double epsilon) {
  return sepllm::layer_norms_by(x, weights, biases, epsilon, [](sepllm::Storage storage, const sepllm::LayerNormForwardArgs& args) {
    at::parallel_for(0, args.rows, rows_per_task(args.size), [&](int64_t first, int64_t last) { sepllm::layer_norm(storage, args, first, last); });
  });
}

std::vector<Tensor> layer_norms_backward(at::TensorList grads, const Tensor& x, at::TensorList weights, at::TensorList biases, const Tensor& mean,
                                         const Tensor& rstd) {
  return sepllm::layer_norms_backward_by(
      grads, x, weights, biases, mean, rstd, sepllm::layer_norm_partial_bytes,
      [](sepllm::Storage storage, const sepllm::LayerNormBackwardArgs& args) {
        at::parallel_for(0, sepllm::layer_norm_segments(args.rows), 1,
                         [&](int64_t first, int64_t last) { sepllm::layer_norm_backward(storage, args, first, last); });
        at::parallel_for(0, 2 * args.norms, 1, [&](int64_t first, int64_t last) { sepllm::layer_norm_backward_sum(storage, args, first, last); });
      });
}

// --- bias + GELU --------------------------------------------------------------------------------------------------------------------

Tensor bias_gelu(const Tensor& x, const OptionalTensor& bias, bool is_tanh) {
  return sepllm::bias_gelu_by(x, bias, is_tanh, [](sepllm::Storage storage, const sepllm::GeluForwardArgs& args) {
    at::parallel_for(0, args.rows, rows_per_task(args.columns),
                     [&](int64_t first, int64_t last) { sepllm::gelu_forward(storage, args, first, last); });
  });
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_out, const Tensor& x, const OptionalTensor& bias, bool is_tanh) {
  return sepllm::bias_gelu_backward_by(grad_out, x, bias, is_tanh, [](sepllm::Storage storage, const sepllm::GeluBackwardArgs& args) {
    at::parallel_for(0, sepllm::gelu_segments(args.rows), 1,
                     [&](int64_t first, int64_t last) { sepllm::gelu_backward(storage, args, first, last); });
    if (args.bias != nullptr)
      at::parallel_for(0, args.columns, 1024, [&](int64_t first, int64_t last) { sepllm::gelu_backward_sum(storage, args, first, last); });
  });
}

// --- masked softmax -----------------------------------------------------------------------------------------------------------------

Tensor masked_softmax(const Tensor& scores, const Tensor& is_read, double scale) {
  return sepllm::masked_softmax_by(scores, is_read, scale, [](sepllm::Storage storage, const sepllm::MaskedSoftmaxForwardArgs& args) {
    at::parallel_for(0, args.rows, rows_per_task(args.columns),
                     [&](int64_t first, int64_t last) { sepllm::masked_softmax(storage, args, first, last); });
  });
}

Tensor masked_softmax_backward(const Tensor& grad_weights, const Tensor& weights, double scale) {
  return sepllm::masked_softmax_backward_by(grad_weights, weights, scale, [](sepllm::Storage storage, const sepllm::MaskedSoftmaxBackwardArgs& args) {
    at::parallel_for(0, args.rows, rows_per_task(args.columns),
                     [&](int64_t first, int64_t last) { sepllm::masked_softmax_backward(storage, args, first, last); });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sepllm, m) {
  m.def(
      "sep_attention(Tensor q, Tensor k, Tensor v, Tensor index, Tensor far_lo, Tensor far_hi, Tensor band_lo, Tensor band_hi, Tensor? slopes, "
      "Tensor? query_positions, Tensor? key_positions, Tensor? extremes_lo, Tensor? extremes_hi, float scale, int softmax, float numerator_bias, "
      "float denominator_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sep_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor index, Tensor far_lo, Tensor far_hi, Tensor band_lo, "
      "Tensor band_hi, Tensor? slopes, Tensor? query_positions, Tensor? key_positions, Tensor? extremes_lo, Tensor? extremes_hi, Tensor out, "
      "Tensor lse, Tensor extremes, Tensor extreme_keys, float scale, int softmax, float numerator_bias, float denominator_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first_label, bool is_shard) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_write_gradient(Tensor(a!) logits, Tensor labels, Tensor maximum, Tensor total, Tensor grad_losses, int first_label) -> ()");
  m.def("cross_entropy_gradient(Tensor logits, Tensor labels, Tensor maximum, Tensor total, Tensor grad_losses, int first_label) -> Tensor");
  m.def("cross_entropy_losses(Tensor logits, Tensor labels, Tensor maximum, Tensor total, Tensor target, int first_label) -> Tensor");
  m.def("rotate_packed(Tensor(a!) packed, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, int head_size) -> ()");
  m.def("rotate_packed_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor");
  m.def("layer_norms(Tensor x, Tensor[] weights, Tensor[] biases, float epsilon) -> (Tensor[], Tensor, Tensor)");
  m.def("layer_norms_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] biases, Tensor mean, Tensor rstd) -> Tensor[]");
  m.def("bias_gelu(Tensor x, Tensor? bias, bool is_tanh) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad_out, Tensor x, Tensor? bias, bool is_tanh) -> (Tensor, Tensor)");
  m.def("masked_softmax(Tensor scores, Tensor is_read, float scale) -> Tensor");
  m.def("masked_softmax_backward(Tensor grad_weights, Tensor weights, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(sepllm, CPU, m) {
  m.impl("sep_attention", sep_attention);
  m.impl("sep_attention_backward", sep_attention_backward);
  m.impl("cross_entropy_statistics", cross_entropy_statistics);
  m.impl("cross_entropy_write_gradient", cross_entropy_write_gradient);
  m.impl("cross_entropy_gradient", cross_entropy_gradient);
  m.impl("rotate_packed", rotate_packed);
  m.impl("rotate_packed_backward", rotate_packed_backward);
  m.impl("layer_norms", layer_norms);
  m.impl("layer_norms_backward", layer_norms_backward);
  m.impl("bias_gelu", bias_gelu);
  m.impl("bias_gelu_backward", bias_gelu_backward);
  m.impl("masked_softmax", masked_softmax);
  m.impl("masked_softmax_backward", masked_softmax_backward);
}

TORCH_LIBRARY_IMPL(sepllm, CompositeExplicitAutograd, m) { m.impl("cross_entropy_losses", sepllm::cross_entropy_losses); }
