// Shim of the ops for weights of decoded.h. Schemas: kernels/cpu/x86_ops.py.
#include "decoded.h"
#include "shim_tensors.h"

namespace {

int32_t decoded_dtype(const Tensor& t, const char* what) {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Byte || dtype == ScalarType::Float8_e8m0fnu) return (int32_t)qpass::kE8m0;
  if (dtype == ScalarType::Float8_e4m3fn) return (int32_t)qpass::kE4m3;
  return dtype == ScalarType::Char ? (int32_t)qpass::kInt8 : number_of(dtype, what);
}

int32_t code_of(ScalarType dtype, bool table) {
  if (dtype == ScalarType::Byte) return (int32_t)(table ? qpass::Code::table : qpass::Code::uint8);
  if (dtype == ScalarType::Float8_e4m3fn) return (int32_t)qpass::Code::e4m3;
  if (dtype == ScalarType::Float8_e5m2) return (int32_t)qpass::Code::e5m2;
  require(dtype == ScalarType::Char, "codes must be uint8, int8, float8_e4m3fn or float8_e5m2");
  return (int32_t)qpass::Code::int8;
}

struct DecodedSizes {
  int64_t n, has, group_size;
};

// The tensors of a weight of decoded.h: codes and scale, then what `has` says: its lowest two bits are qpass::Third, then
// 4 table, 8 gain, 16 bias, added up. The dtypes of codes, scale and offset say what they are. `keep` is to live as long
// as the call.
qp_decoded_weight describe_decoded(const Tensor* tensors, size_t count, const DecodedSizes& sizes,
                                   std::vector<Tensor>& keep) {
  const int64_t has = sizes.has;
  require(has >= 0 && has < 32, "has is out of range");
  require(count == size_t(2 + ((has & 3) != 0) + (has >> 2 & 1) + (has >> 3 & 1) + (has >> 4 & 1)),
          "another number of tensors than `has` speaks of");
  qp_decoded_weight w = {};
  size_t at = 0;
  const Tensor &codes = tensors[at++], &scale = tensors[at++];
  w.code = code_of(codes.scalar_type(), has & 4);
  set(codes, codes.scalar_type(), "codes", w.q, w.q_bytes);
  w.scale_dtype = decoded_dtype(scale, "scale");
  set(scale, scale.scalar_type(), "scale", w.scale, w.scale_bytes);
  w.kind = (int32_t)(has & 3);
  if (w.kind) {
    const Tensor& third = tensors[at++];
    w.third_dtype = decoded_dtype(third, "offset");
    set(third, third.scalar_type(), "offset", w.third, w.third_bytes);
  }
  if (has & 4) set(tensors[at++], ScalarType::Float, "table", w.table, w.table_bytes);
  if (has & 8) set(tensors[at++], ScalarType::Float, "gain", w.gain, w.gain_bytes);
  if (has & 16) {
    keep.push_back(flat(tensors[at++], "bias"));
    const Tensor& bias = keep.back();
    w.bias_dtype = number_of(bias.scalar_type(), "bias");
    set(bias, bias.scalar_type(), "bias", w.bias, w.bias_bytes);
  }
  w.N = sizes.n;
  w.group_size = sizes.group_size;
  return w;
}

void run_decoded(const Tensor& x, int64_t k, int64_t isa, const std::vector<qp_decoded_weight>& w) {
  succeed(qp_decoded(narrow(isa, "isa"), x.const_data_ptr(), number_of(x.scalar_type(), "x"), x.numel() / k, k, w.data(),
                     (int64_t)w.size(), (int32_t)torch::stable::get_num_threads()));
}

void decoded(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 7);
  Tensor x = args.tensor();
  const std::vector<Tensor> tensors = args.tensors();
  const int64_t n = args.integer(), has = args.integer(), k = args.integer();
  const int64_t group_size = args.integer(), isa = args.integer();
  x = rows_of(x, k, "x");
  std::vector<Tensor> keep;
  std::vector<qp_decoded_weight> w = {describe_decoded(tensors.data(), tensors.size(), {n, has, group_size}, keep)};
  const Tensor out = allocate_outputs(x, x.scalar_type(), w);
  run_decoded(x, k, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

// `count` says how many of `tensors` are each weight's.
void decoded_list(StableIValue* stack, uint64_t arguments, uint64_t) {
  Arguments args(stack, arguments, 8);
  Tensor x = args.tensor();
  const std::vector<Tensor> tensors = args.tensors();
  const std::vector<int64_t> count = args.integers(), n = args.integers(), has = args.integers();
  const int64_t k = args.integer();
  const std::vector<int64_t> group_size = args.integers();
  const int64_t isa = args.integer();
  require(n.size() == count.size() && has.size() == n.size() && group_size.size() == n.size(),
          "the lists of sizes must be of one length");
  x = rows_of(x, k, "x");
  std::vector<Tensor> keep;
  std::vector<qp_decoded_weight> w;
  size_t at = 0;
  for (size_t i = 0; i < n.size(); i++) {
    require(count[i] >= 2 && (size_t)count[i] <= tensors.size() - at, "fewer tensors than `count` speaks of");
    w.push_back(describe_decoded(tensors.data() + at, (size_t)count[i], {n[i], has[i], group_size[i]}, keep));
    at += (size_t)count[i];
  }
  require(at == tensors.size(), "more tensors than `count` speaks of");
  const Tensor out = allocate_outputs(x, x.scalar_type(), w);
  run_decoded(x, k, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qpass_x86, CPU, m) {
  m.impl("decoded", &decoded);
  m.impl("decoded_list", &decoded_list);
}
