// Shim: ops of namespace qpass_x86 on libtorch's stable ABI; tensors in, calls of the C ABI, new tensors out. Here those
// of integer weights. The schemas stand in kernels/cpu/x86_ops.py. Only what the C ABI cannot see is checked here: dtypes, devices, layout.
#include "convert.h"
#include "experts.h"
#include "shim_tensors.h"

namespace {

constexpr int64_t kIntegerRows = 5;  // of the int8 buffer of integer scales, before its multipliers: see product.h

struct Parts {
  Tensor qweight, scale;
  Maybe zero_point, colsum, bias;
};

qp_weight describe(Parts& p, int64_t n, int64_t bits) {
  qp_weight w = {};
  require(p.scale.dim() == 3, "scale must be [N / 16, groups, 16]");
  if (p.bias) p.bias = flat(*p.bias, "bias");
  set(p.qweight, ScalarType::Byte, "qweight", w.q, w.q_bytes);
  set(p.scale, p.scale.scalar_type(), "scale", w.scale, w.scale_bytes);
  if (p.zero_point) set(*p.zero_point, ScalarType::Char, "zero_point", w.zero_point, w.zero_point_bytes);
  if (p.colsum) set(*p.colsum, ScalarType::Float, "colsum", w.colsum, w.colsum_bytes);
  if (p.bias) set(*p.bias, p.bias->scalar_type(), "bias", w.bias, w.bias_bytes);
  w.N = n;
  const bool integer = p.scale.scalar_type() == ScalarType::Char;
  w.groups = p.scale.size(1) - (integer ? kIntegerRows : 0);
  w.bits = narrow(bits, "bits");
  w.scale_dtype = integer ? 3 : number_of(p.scale.scalar_type(), "scale");
  w.bias_dtype = p.bias ? number_of(p.bias->scalar_type(), "bias") : 0;
  return w;
}

void run(const Tensor& x, int64_t k, int64_t activation, int64_t isa, const std::vector<qp_weight>& w) {
  require(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2");
  succeed(qp_linear(narrow(isa, "isa"), x.const_data_ptr(), number_of(x.scalar_type(), "x"), x.numel() / k, k,
                    (int32_t)activation, w.data(), (int64_t)w.size(), (int32_t)torch::stable::get_num_threads()));
}

struct Codes {
  Tensor q, scale;
  Maybe zero_point;
  Codes(const Tensor& xq, const Tensor& x_scale, const Maybe& x_zero_point, int64_t k)
      : q(rows_of(xq, k, "xq")), scale(flat(x_scale, "x_scale")) {
    const int64_t M = q.numel() / k;
    require(q.scalar_type() == ScalarType::Char, "xq must be int8");
    require(scale.scalar_type() == ScalarType::Float && scale.numel() == M, "x_scale must be float32 [..., 1]");
    if (!x_zero_point) return;
    zero_point = flat(*x_zero_point, "x_zero_point");
    require(zero_point->scalar_type() == ScalarType::Float && zero_point->numel() == M,
            "x_zero_point must be float32 [..., 1]");
  }
  void run(int64_t k, int64_t isa, const std::vector<qp_weight>& w) const {
    succeed(qp_linear_q(narrow(isa, "isa"), (const int8_t*)q.const_data_ptr(), (const float*)scale.const_data_ptr(),
                        zero_point ? (const float*)zero_point->const_data_ptr() : nullptr, q.numel() / k, k, w.data(),
                        (int64_t)w.size(), (int32_t)torch::stable::get_num_threads()));
  }
};

Parts parts_of(Arguments& args) {
  return {args.tensor(), args.tensor(), args.maybe(), args.maybe(), args.maybe()};  // braces keep the order
}

void linear(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 11);
  Tensor x = args.tensor();
  Parts parts = parts_of(args);
  const int64_t n = args.integer(), k = args.integer(), bits = args.integer(), activation = args.integer();
  const int64_t isa = args.integer();
  x = rows_of(x, k, "x");
  number_of(x.scalar_type(), "x");
  std::vector<qp_weight> w = {describe(parts, n, bits)};
  const Tensor out = allocate_outputs(x, x.scalar_type(), w);
  run(x, k, activation, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

void linear_q(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 13);
  const Tensor xq = args.tensor(), x_scale = args.tensor();
  const Maybe x_zero_point = args.maybe();
  Parts parts = parts_of(args);
  const int64_t n = args.integer(), k = args.integer(), bits = args.integer();
  const ScalarType dtype = args.dtype();
  const int64_t isa = args.integer();
  const Codes codes(xq, x_scale, x_zero_point, k);
  std::vector<qp_weight> w = {describe(parts, n, bits)};
  const Tensor out = allocate_outputs(codes.q, dtype, w);
  codes.run(k, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

// `has` says what follows qweight and scale of each weight in `tensors`: 1 zero_point, 2 colsum, 4 bias, added up.
std::vector<Parts> split(const std::vector<Tensor>& tensors, const std::vector<int64_t>& n,
                         const std::vector<int64_t>& has) {
  std::vector<Parts> all;
  size_t at = 0;
  require(n.size() == has.size(), "n and has must be of one length");
  for (int64_t flags : has) {
    const size_t count = 2 + (flags & 1) + (flags >> 1 & 1) + (flags >> 2 & 1);
    require(flags >= 0 && flags < 8 && at + count <= tensors.size(), "fewer tensors than n and has speak of");
    Parts p = {tensors[at], tensors[at + 1], {}, {}, {}};
    at += 2;
    if (flags & 1) p.zero_point = tensors[at++];
    if (flags & 2) p.colsum = tensors[at++];
    if (flags & 4) p.bias = tensors[at++];
    all.push_back(p);
  }
  require(at == tensors.size(), "more tensors than n and has speak of");
  return all;
}

std::vector<qp_weight> describe_all(std::vector<Parts>& parts, const std::vector<int64_t>& n, int64_t bits) {
  std::vector<qp_weight> w;
  for (size_t i = 0; i < parts.size(); i++) w.push_back(describe(parts[i], n[i], bits));
  return w;
}

void linear_list(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 8);
  Tensor x = args.tensor();
  const std::vector<Tensor> tensors = args.tensors();
  const std::vector<int64_t> n = args.integers(), has = args.integers();
  const int64_t k = args.integer(), bits = args.integer(), activation = args.integer(), isa = args.integer();
  x = rows_of(x, k, "x");
  number_of(x.scalar_type(), "x");
  std::vector<Parts> parts = split(tensors, n, has);
  std::vector<qp_weight> w = describe_all(parts, n, bits);
  const Tensor out = allocate_outputs(x, x.scalar_type(), w);
  run(x, k, activation, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

void linear_q_list(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 10);
  const Tensor xq = args.tensor(), x_scale = args.tensor();
  const Maybe x_zero_point = args.maybe();
  const std::vector<Tensor> tensors = args.tensors();
  const std::vector<int64_t> n = args.integers(), has = args.integers();
  const int64_t k = args.integer(), bits = args.integer();
  const ScalarType dtype = args.dtype();
  const int64_t isa = args.integer();
  const Codes codes(xq, x_scale, x_zero_point, k);
  std::vector<Parts> parts = split(tensors, n, has);
  std::vector<qp_weight> w = describe_all(parts, n, bits);
  const Tensor out = allocate_outputs(codes.q, dtype, w);
  codes.run(k, isa, w);
  stack[0] = torch::stable::detail::from(out);
}

#include "shim_experts.h"

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qpass_x86, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_q", &linear_q);
  m.impl("linear_list", &linear_list);
  m.impl("linear_q_list", &linear_q_list);
  m.impl("experts", &experts);
  m.impl("experts_q", &experts_q);
}
