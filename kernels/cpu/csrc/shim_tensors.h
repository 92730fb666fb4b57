// Tensors and op arguments on libtorch's stable ABI: reads them from the dispatcher's stack and checks what they are.
#pragma once
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))  // PyTorch 2.11 and later load the same library

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

[[noreturn]] __attribute__((noinline, cold)) void refuse(const char* what, const std::string& why) {
  throw std::runtime_error(std::string("qpass_x86: ") + what + why);
}

// Nothing is put together, and no memory taken, as long as all is well: this stands several times in every call.
inline void require(bool ok, const char* what, const char* why = "") {
  if (!ok) refuse(what, why);
}

inline int32_t narrow(int64_t value, const char* what) {
  require(value == (int32_t)value, what, " is out of range");
  return (int32_t)value;
}

inline int32_t number_of(ScalarType dtype, const char* what) {
  if (dtype == ScalarType::Float) return (int32_t)qpass::DType::f32;
  if (dtype == ScalarType::BFloat16) return (int32_t)qpass::DType::bf16;
  require(dtype == ScalarType::Half, what, " must be float32, bfloat16 or float16");
  return (int32_t)qpass::DType::f16;
}

// A contiguous CPU tensor of one of our dtypes; keeps what it may have copied alive as long as the call lasts.
inline Tensor flat(const Tensor& t, const char* what) {
  require(t.is_cpu(), what, " must be on the CPU");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline void set(const Tensor& t, ScalarType dtype, const char* what, const void*& data, int64_t& bytes) {
  require(t.is_cpu() && t.is_contiguous(), what, " must be a contiguous CPU tensor");
  require(t.scalar_type() == dtype, what, " has the wrong dtype");
  data = t.const_data_ptr();
  bytes = t.numel() * (int64_t)t.element_size();
}

// x as [..., k], contiguous: checked before anything is made from its sizes.
inline Tensor rows_of(const Tensor& x, int64_t k, const char* what) {
  require(x.dim() > 0 && k > 0, what, " must be [..., K] with K > 0");
  const int64_t features = x.size(x.dim() - 1);
  if (features != k)
    refuse(what, " has " + std::to_string(features) + " features, the weight takes " + std::to_string(k));
  return flat(x, what);
}

// One tensor [..., the sum of all N] for what the weights give, side by side; tells each of them where its part lies.
template <typename Weight>
Tensor allocate_outputs(const Tensor& x, ScalarType dtype, std::vector<Weight>& weights) {
  int64_t width = 0;
  for (const Weight& w : weights) {
    require(w.N > 0, "the number of outputs must be positive");
    require(w.N <= w.q_bytes / 32, "qweight is too small for that many outputs");  // 4 bits, 64 inputs: the fewest bytes
    width += w.N;
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = width;
  Tensor out = torch::stable::new_empty(x, sizes, dtype);
  if (out.numel() == 0) return out;
  const int64_t size = (int64_t)out.element_size();
  char *at = (char*)out.mutable_data_ptr(), *const end = at + out.numel() * size;
  for (Weight& w : weights) {
    w.out = at;
    w.out_bytes = end - at;
    w.out_stride = width;
    w.out_dtype = number_of(dtype, "the output");
    at += w.N * size;
  }
  return out;
}

inline void succeed(int32_t code) { require(code == 0, qp_last_error()); }

// The arguments of one call in the order of its schema. Reading one takes over its reference, so all must be read.
// One function a type, out of line: TORCH_BOX writes every conversion out for every op, which took seconds to compile.
class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t count, uint64_t expected) : at_(stack) {
    require(count == expected, "the op has another number of arguments than its kernel; reinstall qpass");
  }
  Tensor tensor() { return take<Tensor>(); }
  Maybe maybe() { return take<Maybe>(); }
  int64_t integer() { return take<int64_t>(); }
  double number() { return take<double>(); }
  bool truth() { return take<bool>(); }
  ScalarType dtype() { return take<ScalarType>(); }
  std::vector<Tensor> tensors() { return take<std::vector<Tensor>>(); }
  std::vector<int64_t> integers() { return take<std::vector<int64_t>>(); }

 private:
  template <typename T>
  __attribute__((noinline)) T take() {
    return torch::stable::detail::to<T>(*at_++);
  }
  const StableIValue* at_;
};

}  // namespace
