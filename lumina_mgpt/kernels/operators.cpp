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

std::vector<Tensor> int4_linear(Tensor x, std::vector<Tensor> packed, int64_t group, std::vector<Tensor> scale_zero) {
  check(x.dim() == 2 && (group == 32 || group == 64 || group == 128) && packed.size() == scale_zero.size());
  const int64_t M = x.size(0), K = x.size(1);
  check(K % group == 0 && is(x, ScalarType::BFloat16, {M, K}));
  std::vector<Tensor> outs;
  std::vector<Int4Matrix> matrices;
  for (size_t i = 0; i < packed.size(); ++i) {
    check(scale_zero[i].dim() == 4);
    const int64_t blocks = scale_zero[i].size(0), N = blocks * OUTPUTS;
    check(is(packed[i], ScalarType::Byte, {N, K / 2}) &&
          is(scale_zero[i], ScalarType::BFloat16, {blocks, K / group, OUTPUTS, 2}));
    outs.push_back(torch::stable::new_empty(x, {M, N}));
    matrices.push_back(
        {numbers_of<uint8_t>(packed[i]), numbers_of<uint16_t>(scale_zero[i]), writable(outs.back()), N});
  }
  int4_amx(numbers_of<uint16_t>(x), matrices.data(), matrices.size(), M, K, group, torch::stable::get_num_threads());
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

}  // namespace

// Registers the implementations of the operators that ops.py defines; returns false if torch refuses them. This is no
// static initializer, because an exception during loading would terminate the process.
extern "C" bool lumina_mgpt_register() {
  try {
    using torch::stable::detail::StableLibrary;
    static StableLibrary* library = nullptr;
    if (library) return true;
    library = new StableLibrary(StableLibrary::Kind::IMPL, "lumina_mgpt", "CPU", __FILE__, __LINE__);
    library->impl("int4_linear", TORCH_BOX(&int4_linear));
    library->impl("int8_linear", TORCH_BOX(&int8_linear));
    library->impl("one_query", TORCH_BOX(&attend));
  } catch (...) {
    return false;
  }
  return true;
}
