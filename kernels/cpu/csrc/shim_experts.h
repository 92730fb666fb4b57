// Shim of the experts' ops: part of shim.cpp, inside its namespace. Schemas and what `sizes` holds: kernels/cpu/x86_ops.py.
#pragma once

// The weights of all experts for one of the two products: as `describe`, with a leading dimension of experts.
qp_weight describe_experts(Parts& p, int64_t n, int64_t bits) {
  require(p.scale.dim() == 4, "scale must be [experts, N / 16, groups, 16]");
  qp_weight w = {};
  if (p.bias) p.bias = flat(*p.bias, "bias");
  set(p.qweight, ScalarType::Byte, "qweight", w.q, w.q_bytes);
  set(p.scale, p.scale.scalar_type(), "scale", w.scale, w.scale_bytes);
  if (p.zero_point) set(*p.zero_point, ScalarType::Char, "zero_point", w.zero_point, w.zero_point_bytes);
  if (p.colsum) set(*p.colsum, ScalarType::Float, "colsum", w.colsum, w.colsum_bytes);
  if (p.bias) set(*p.bias, p.bias->scalar_type(), "bias", w.bias, w.bias_bytes);
  w.N = n;
  w.groups = p.scale.size(2);
  w.bits = narrow(bits, "bits");
  w.scale_dtype = number_of(p.scale.scalar_type(), "scale");
  w.bias_dtype = p.bias ? number_of(p.bias->scalar_type(), "bias") : 0;
  return w;
}

template <typename T>
void widen(const Tensor& t, std::vector<int64_t>& to) {
  const T* from = (const T*)t.const_data_ptr();
  to.assign(from, from + t.numel());
}

// index as int64: its own memory, or `copy` if it is of another type.
const int64_t* whole_numbers(const Tensor& t, std::vector<int64_t>& copy) {
  switch (t.scalar_type()) {
    case ScalarType::Long: return (const int64_t*)t.const_data_ptr();
    case ScalarType::Int: widen<int32_t>(t, copy); break;
    case ScalarType::Short: widen<int16_t>(t, copy); break;
    case ScalarType::Char: widen<int8_t>(t, copy); break;
    case ScalarType::Byte: widen<uint8_t>(t, copy); break;
    default: refuse("index", " must hold integers");
  }
  return copy.data();
}

// weight as float32: its own memory, or `copy`.
const float* shares(const Tensor& t, std::vector<float>& copy) {
  const void* from = t.const_data_ptr();
  if (t.scalar_type() == ScalarType::Float) return (const float*)from;
  copy.resize((size_t)t.numel());
  if (t.scalar_type() == ScalarType::Double) {
    for (size_t i = 0; i < copy.size(); i++) copy[i] = (float)((const double*)from)[i];
  } else {
    const qpass::DType dtype = (qpass::DType)number_of(t.scalar_type(), "weight");
    for (size_t i = 0; i < copy.size(); i++) copy[i] = qpass::load_float(from, dtype, (int64_t)i);
  }
  return copy.data();
}

// What both ops share, from `index` to `down_activation`.
struct Experts {
  Tensor index, weight;
  std::vector<Parts> parts;
  std::vector<int64_t> sizes, whole;
  std::vector<float> real;
  qp_gate gate = {};
  int32_t down_activation;

  explicit Experts(Arguments& args) : index(args.tensor()), weight(args.tensor()) {
    const std::vector<Tensor> tensors = args.tensors();
    const std::vector<int64_t> has = args.integers();
    sizes = args.integers();
    require(has.size() == 2, "experts have two weights");
    parts = split(tensors, has, has);
    require(sizes.size() == 7, "sizes must be seven numbers");
    const float alpha = (float)args.number(), limit = (float)args.number(), up_limit = (float)args.number();
    const float shift = (float)args.number(), none = __builtin_inff();
    down_activation = narrow(args.integer(), "down_activation");
    gate = {narrow(sizes[5], "function"), (int32_t)(sizes[6] & 1), alpha, sizes[6] & 2 ? limit : none,
            sizes[6] & 4 ? up_limit : none, shift};
  }

  Tensor run(qp_tokens& tokens, const Tensor& x, ScalarType dtype, int32_t activation, int64_t isa) {
    const int64_t E = sizes[0], H = sizes[1], I = sizes[2];
    require(x.dim() == 2 && index.dim() == 2 && weight.dim() == 2, "experts take x [T, H], index and weight [T, top_k]");
    if (x.size(1) != H) refuse("x", " has " + std::to_string(x.size(1)) + " features, experts take " + std::to_string(H));
    const int64_t T = x.size(0), places = index.size(1);
    require(index.size(0) == T && weight.size(0) == T && weight.size(1) == places,
            "index and weight must have one row a token, and one size");
    index = flat(index, "index"), weight = flat(weight, "weight");
    Tensor out = torch::stable::new_empty(x, {T, H}, dtype);
    tokens.index = whole_numbers(index, whole);
    tokens.weight = shares(weight, real);
    tokens.out = out.mutable_data_ptr();
    tokens.T = T, tokens.places = places, tokens.out_dtype = number_of(dtype, "the output");
    const qp_weight up = describe_experts(parts[0], gate.gated ? 2 * I : I, sizes[3]);
    const qp_weight down = describe_experts(parts[1], H, sizes[4]);
    succeed(qp_experts(narrow(isa, "isa"), &tokens, E, H, I, &gate, &up, activation, &down, down_activation,
                       (int32_t)torch::stable::get_num_threads()));
    return out;
  }
};

void experts(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 13);
  const Tensor x = flat(args.tensor(), "x");
  Experts call(args);
  const int32_t activation = narrow(args.integer(), "activation");
  const int64_t isa = args.integer();
  qp_tokens tokens = {};
  tokens.x = x.const_data_ptr();
  tokens.x_dtype = number_of(x.scalar_type(), "x");
  stack[0] = torch::stable::detail::from(call.run(tokens, x, x.scalar_type(), activation, isa));
}

void experts_q(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count, 15);
  const Tensor xq = args.tensor(), x_scale = args.tensor();
  const Maybe x_zero_point = args.maybe();
  Experts call(args);
  const ScalarType dtype = args.dtype();
  const int64_t isa = args.integer();
  const Codes codes(xq, x_scale, x_zero_point, call.sizes[1]);
  qp_tokens tokens = {};
  tokens.codes = (const int8_t*)codes.q.const_data_ptr();
  tokens.scale = (const float*)codes.scale.const_data_ptr();
  tokens.zero_point = codes.zero_point ? (const float*)codes.zero_point->const_data_ptr() : nullptr;
  stack[0] = torch::stable::detail::from(call.run(tokens, codes.q, dtype, codes.zero_point ? 2 : 1, isa));
}
