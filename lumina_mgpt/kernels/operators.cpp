// The operators of ops.py. They check dtypes, shapes and strides, so that no memory outside a tensor is accessed, and
// call the kernels. They use torch's stable interface, whose headers compile in a second.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "native.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool fits) {
  STD_TORCH_CHECK(fits, "lumina_mgpt: tensors of other kinds, shapes or strides than the operator takes");
}

bool same(torch::headeronly::IntHeaderOnlyArrayRef sizes, std::initializer_list<int64_t> wanted) {
  return sizes.size() == wanted.size() && std::equal(wanted.begin(), wanted.end(), sizes.begin());
}

// Returns whether a tensor has this dtype and shape, is on the CPU and is contiguous.
bool is(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  return tensor.scalar_type() == dtype && tensor.is_cpu() && tensor.is_contiguous() && same(tensor.sizes(), shape);
}

template <typename Number>
const Number* numbers_of(const Tensor& tensor) {
  return static_cast<const Number*>(tensor.const_data_ptr());
}

uint16_t* writable(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

bool has_tiles = false;  // set by lumina_mgpt_register

std::vector<Tensor> int4_linear(Tensor x, std::vector<Tensor> packed, int64_t group, std::vector<Tensor> scale_zero,
                                std::optional<Tensor> norm, double eps, bool gated, std::optional<Tensor> residual) {
  check(x.dim() == 2 && (group == 32 || group == 64 || group == 128) && packed.size() == scale_zero.size());
  const int64_t M = x.size(0), K = x.size(1);
  check(K > 0 && K % group == 0 && is(x, ScalarType::BFloat16, {M, K}));
  check(!norm || is(*norm, ScalarType::BFloat16, {K}));
  check(packed.size() == 2 || (!gated && !packed.empty()));
  std::vector<Tensor> outs;
  std::vector<Int4Matrix> matrices;
  for (size_t i = 0; i < packed.size(); ++i) {
    check(scale_zero[i].dim() == 4);
    const int64_t blocks = scale_zero[i].size(0), N = blocks * OUTPUTS;
    check(is(packed[i], ScalarType::Byte, {blocks, K / 4, 2 * OUTPUTS}) &&
          is(scale_zero[i], ScalarType::BFloat16, {blocks, K / group, OUTPUTS, 2}));
    if (!gated || i == 0) outs.push_back(torch::stable::new_empty(x, {M, N}));
    matrices.push_back(
        {numbers_of<uint8_t>(packed[i]), numbers_of<uint16_t>(scale_zero[i]), writable(outs.back()), N});
  }
  check(!gated || matrices[0].outputs == matrices[1].outputs);
  check(!residual || (packed.size() == 1 && is(*residual, ScalarType::BFloat16, {M, matrices[0].outputs})));
  int4_products({numbers_of<uint16_t>(x), matrices.data(), static_cast<long>(matrices.size()), M, K, group,
                 norm ? numbers_of<uint16_t>(*norm) : nullptr, static_cast<float>(eps), gated,
                 residual ? numbers_of<uint16_t>(*residual) : nullptr, has_tiles,
                 static_cast<long>(torch::stable::get_num_threads())});
  return outs;
}

Tensor int8_linear(Tensor x, Tensor numbers, Tensor scale) {
  check(x.dim() == 2 && numbers.dim() == 2);
  const int64_t M = x.size(0), K = x.size(1), N = numbers.size(0);
  check(N % 16 == 0 && K % 16 == 0 && is(x, ScalarType::BFloat16, {M, K}) && is(numbers, ScalarType::Char, {N, K}) &&
        is(scale, ScalarType::BFloat16, {N}));
  Tensor out = torch::stable::new_empty(x, {M, N});
  int8_rows(numbers_of<uint16_t>(x), numbers_of<int8_t>(numbers), numbers_of<uint16_t>(scale), writable(out), M, N, K,
            torch::stable::get_num_threads());
  return out;
}

Tensor attend(Tensor q, Tensor keys, Tensor values, std::optional<Tensor> key_scales,
              std::optional<Tensor> value_scales, Tensor slots) {
  check(q.dim() == 4 && keys.dim() == 4 && values.dim() == 4);
  const int64_t B = q.size(0), N = q.size(2), H = q.size(3), S = keys.size(1), K = keys.size(2);
  check(is(q, ScalarType::BFloat16, {B, 1, N, H}) && is(slots, ScalarType::Long, {B}) && (H == 64 || H == 128));
  check(K > 0 && N % K == 0 && keys.is_cpu() && values.is_cpu() && same(keys.sizes(), {B, S, K, H}) &&
        same(values.sizes(), {B, S, K, H}));
  const int64_t row = keys.stride(0), apart = keys.stride(2);
  const bool scaled = key_scales.has_value();
  check(same(keys.strides(), {row, H, apart, 1}) && same(values.strides(), {row, H, apart, 1}) &&
        value_scales.has_value() == scaled);
  const ScalarType kind = scaled ? ScalarType::Char : ScalarType::BFloat16;
  check(keys.scalar_type() == kind && values.scalar_type() == kind);
  int64_t scale_row = 0, scale_apart = 0;
  const float* scales[2] = {};
  if (scaled) {
    check(key_scales->dim() == 3 && value_scales->dim() == 3);
    scale_row = key_scales->stride(0), scale_apart = key_scales->stride(2);
    const Tensor* both[] = {&*key_scales, &*value_scales};
    for (int i = 0; i < 2; ++i) {
      check(both[i]->is_cpu() && both[i]->scalar_type() == ScalarType::Float && same(both[i]->sizes(), {B, S, K}) &&
            same(both[i]->strides(), {scale_row, 1, scale_apart}));
      scales[i] = numbers_of<float>(*both[i]);
    }
  }
  const int64_t* seen = numbers_of<int64_t>(slots);
  check(std::all_of(seen, seen + B, [S](int64_t count) { return 1 <= count && count <= S; }));
  Tensor out = torch::stable::new_empty(q, {B, 1, N, H});
  one_query(numbers_of<uint16_t>(q), keys.const_data_ptr(), values.const_data_ptr(), scales[0], scales[1], seen,
            writable(out), B, N, K, H, row, apart, scale_row, scale_apart, 1 / std::sqrt(static_cast<float>(H)),
            torch::stable::get_num_threads());
  return out;
}

HeadWeights weights_of(const Tensor& weight, const Tensor& bias, int64_t heads, int64_t H) {
  check(weight.dim() == 2 && bias.dim() == 2);
  const int64_t rows[] = {weight.size(0), bias.size(0)};
  for (const int64_t count : rows) check(count > 0 && heads % count == 0);
  check(is(weight, ScalarType::BFloat16, {rows[0], H}) && is(bias, ScalarType::BFloat16, {rows[1], H}));
  return {numbers_of<uint16_t>(weight), numbers_of<uint16_t>(bias), rows[0], rows[1]};
}

Tensor prepare_heads(Tensor q, Tensor k, Tensor v, std::vector<Tensor> norms, Tensor cos, Tensor sin, Tensor positions,
                     Tensor keys, Tensor values, std::optional<Tensor> key_scales, std::optional<Tensor> value_scales) {
  check(q.dim() == 4 && k.dim() == 4 && keys.dim() == 4 && norms.size() == 4);
  const int64_t B = q.size(0), T = q.size(1), N = q.size(2), K = k.size(2), H = q.size(3), slots = keys.size(2);
  check(B > 0 && T > 0 && K > 0 && (H == 64 || H == 128) && is(q, ScalarType::BFloat16, {B, T, N, H}) &&
        is(k, ScalarType::BFloat16, {B, T, K, H}) && is(v, ScalarType::BFloat16, {B, T, K, H}));
  const bool scaled = key_scales.has_value();
  const ScalarType kind = scaled ? ScalarType::Char : ScalarType::BFloat16;
  check(keys.size(0) >= B && value_scales.has_value() == scaled);
  for (const Tensor* store : {&keys, &values}) check(is(*store, kind, {keys.size(0), K, slots, H}));
  if (scaled)
    for (const Tensor* scales : {&*key_scales, &*value_scales})
      check(is(*scales, ScalarType::Float, {keys.size(0), K, slots}));
  const int64_t angles = static_cast<int64_t>(cos.numel()) / H, places = static_cast<int64_t>(positions.numel());
  check((angles == T || angles == B * T) && (places == T || places == B * T));
  for (const Tensor* part : {&cos, &sin})
    check(part->scalar_type() == ScalarType::Float && part->is_cpu() && part->is_contiguous() &&
          static_cast<int64_t>(part->numel()) == angles * H);
  check(positions.scalar_type() == ScalarType::Long && positions.is_cpu() && positions.is_contiguous());
  const int64_t* at = numbers_of<int64_t>(positions);
  check(std::all_of(at, at + places, [slots](int64_t slot) { return 0 <= slot && slot < slots; }));
  Tensor out = torch::stable::new_empty(q, {B, T, N, H});
  const Store store{keys.mutable_data_ptr(), values.mutable_data_ptr(),
                    scaled ? static_cast<float*>(key_scales->mutable_data_ptr()) : nullptr,
                    scaled ? static_cast<float*>(value_scales->mutable_data_ptr()) : nullptr, slots};
  heads({numbers_of<uint16_t>(q), numbers_of<uint16_t>(k), numbers_of<uint16_t>(v), writable(out),
         weights_of(norms[0], norms[1], N, H), weights_of(norms[2], norms[3], K, H), numbers_of<float>(cos),
         numbers_of<float>(sin), at, angles, places, store, B, T, N, K, H,
         static_cast<long>(torch::stable::get_num_threads())});
  return out;
}

}  // namespace

// Registers the implementations of the operators that ops.py defines; returns false if torch refuses them. With
// `tiles`, products of many rows use AMX; a second call only changes this. This is no static initializer, because an
// exception during loading would terminate the process.
extern "C" bool lumina_mgpt_register(bool tiles) {
  try {
    has_tiles = tiles;
    using torch::stable::detail::StableLibrary;
    static StableLibrary* library = nullptr;
    if (library) return true;
    library = new StableLibrary(StableLibrary::Kind::IMPL, "lumina_mgpt", "CPU", __FILE__, __LINE__);
    library->impl("int4_linear", TORCH_BOX(&int4_linear));
    library->impl("prepare_heads", TORCH_BOX(&prepare_heads));
    library->impl("int8_linear", TORCH_BOX(&int8_linear));
    library->impl("one_query", TORCH_BOX(&attend));
  } catch (...) {
    return false;
  }
  return true;
}
