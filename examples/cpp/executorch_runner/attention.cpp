// The attention operators `llama::update_cache` and `llama::custom_sdpa`, as ExecuTorch documents
// them, for float32 and one conversation. ExecuTorch's wheels only contain them in a library that
// needs torch. An app that links ExecuTorch's own `custom_ops` omits this file.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

namespace {

using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

bool is_float_4d(const Tensor& x) {
  return x.dim() == 4 && x.size(0) == 1 && x.scalar_type() == executorch::aten::ScalarType::Float;
}

// Writes `value` [1, T, K, D] into `cache` [1, C, K, D] from slot `start` on.
Tensor& update_cache(KernelRuntimeContext& context, const Tensor& value, Tensor& cache,
                     int64_t start, Tensor& out) {
  const bool fits = is_float_4d(value) && is_float_4d(cache) && start >= 0 &&
                    start + value.size(1) <= cache.size(1) && value.size(2) == cache.size(2) &&
                    value.size(3) == cache.size(3);
  ET_KERNEL_CHECK(context, fits, InvalidArgument, out);
  const int64_t slot = value.size(2) * value.size(3);
  std::memcpy(cache.mutable_data_ptr<float>() + start * slot, value.const_data_ptr<float>(),
              value.numel() * sizeof(float));
  return out;
}

// Computes attention of `query` [1, T, H, D] to slots of `keys` and `values` [1, C, K, D]. With
// `causal`, each token attends to the slots up to its own; the first token's slot is `start`.
// Otherwise `mask` [T, C] is added to the scores.
Tensor& custom_sdpa(KernelRuntimeContext& context, const Tensor& query, const Tensor& keys,
                    const Tensor& values, int64_t start, const std::optional<Tensor>& mask,
                    double dropout, bool causal, std::optional<double> scale, Tensor& out) {
  const int64_t tokens = query.size(1), heads = query.size(2), dim = query.size(3);
  const int64_t kv_heads = keys.size(2), slots = start + tokens;
  const bool fits = is_float_4d(query) && is_float_4d(keys) && is_float_4d(values) && start >= 0 &&
                    slots <= keys.size(1) && keys.size(3) == dim && heads % kv_heads == 0 &&
                    dropout == 0.0 && causal != mask.has_value();
  ET_KERNEL_CHECK(context, fits, InvalidArgument, out);
  const bool masked = mask.has_value();
  ET_KERNEL_CHECK(context,
                  !masked || (mask->dim() == 2 && mask->size(0) == tokens && mask->size(1) >= slots),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument, out);
  const float factor = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(dim))));
  const float* const q = query.const_data_ptr<float>();
  const float* const k = keys.const_data_ptr<float>();
  const float* const v = values.const_data_ptr<float>();
  float* const y = out.mutable_data_ptr<float>();
  std::vector<float> weights(slots);
  for (int64_t token = 0; token < tokens; ++token) {
    const float* const mask_row =
        masked ? mask->const_data_ptr<float>() + token * mask->size(1) : nullptr;
    const int64_t visible = causal ? start + token + 1 : slots;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t group = head / (heads / kv_heads);
      const float* const query_row = q + (token * heads + head) * dim;
      float maximum = -std::numeric_limits<float>::infinity();
      for (int64_t slot = 0; slot < visible; ++slot) {
        const float* const key = k + (slot * kv_heads + group) * dim;
        float score = 0.0f;
        for (int64_t i = 0; i < dim; ++i) score += query_row[i] * key[i];
        weights[slot] = score * factor + (masked ? mask_row[slot] : 0.0f);
        maximum = std::max(maximum, weights[slot]);
      }
      float total = 0.0f;
      for (int64_t slot = 0; slot < visible; ++slot) {
        weights[slot] = std::exp(weights[slot] - maximum);
        total += weights[slot];
      }
      float* const result = y + (token * heads + head) * dim;
      std::fill(result, result + dim, 0.0f);
      for (int64_t slot = 0; slot < visible; ++slot) {
        const float* const value = v + (slot * kv_heads + group) * dim;
        const float weight = weights[slot] / total;
        for (int64_t i = 0; i < dim; ++i) result[i] += weight * value[i];
      }
    }
  }
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa);
