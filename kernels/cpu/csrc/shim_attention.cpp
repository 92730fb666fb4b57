// Shim of the op for attention over float keys and values. Schema: kernels/cpu/x86_ops.py.
#include "shim_tensors.h"

namespace {

// A tensor whose last dimension lies side by side; a copy if it does not.
Tensor side_by_side(const Tensor& t, const char* what) {
  require(t.is_cpu(), what, " must be on the CPU");
  const int64_t last = t.dim() - 1;
  require(last >= 0, what, " must have dimensions");
  for (int64_t i = 0; i < last; i++)
    if (t.size(i) > 1 && t.stride(i) < 0) return torch::stable::contiguous(t);
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// The tensor as [batch, head, token, :]; dimensions of one, and those that a mask lacks, are stepped over by 0.
qp_rows rows_in(const Tensor& t, const int64_t* expected, const char* what) {
  const int64_t dims = t.dim();
  require(dims >= 1 && dims <= 4, what, " must have up to 4 dimensions");
  int64_t step[3] = {0, 0, 0}, count = t.size(dims - 1);
  for (int64_t i = 0; i < dims - 1; i++) {
    const int64_t at = i + 4 - dims, size = t.size(i);
    require(size == 1 || size == expected[at], what, " has another size than the queries and keys");
    step[at] = size == 1 ? 0 : t.stride(i);
    count += (size - 1) * step[at];
  }
  return {t.const_data_ptr(), step[0], step[1], step[2], count};
}

void attention(StableIValue* stack, uint64_t arguments, uint64_t) {
  Arguments args(stack, arguments, 7);
  const Tensor q = side_by_side(args.tensor(), "query"), k = side_by_side(args.tensor(), "key");
  const Tensor v = side_by_side(args.tensor(), "value");
  const Maybe given = args.maybe();
  const bool causal = args.truth();
  const double scale = args.number();
  const int32_t isa = (int32_t)args.integer();
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "query, key and value must be [B, H, T, D]");
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "one dtype must serve all");
  require(q.size(0) == k.size(0) && q.size(0) == v.size(0), "query, key and value must be of one batch");
  require(q.size(3) == k.size(3), "query and key must have one head size");
  require(k.size(1) == v.size(1) && k.size(2) == v.size(2), "there must be as many values as keys");
  const int64_t sizes[7] = {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  Tensor out = torch::stable::new_empty(q, {sizes[0], sizes[3], sizes[1], sizes[6]}, q.scalar_type());
  const int64_t queries[3] = {sizes[0], sizes[1], sizes[3]}, keys[3] = {sizes[0], sizes[2], sizes[4]};
  const qp_rows rows[3] = {rows_in(q, queries, "query"), rows_in(k, keys, "key"), rows_in(v, keys, "value")};
  qp_rows shown = {};
  int32_t mask_dtype = 0;
  Maybe mask;
  if (given) {
    require(given->dim() > 0 && given->size(given->dim() - 1) == sizes[4], "mask must have a place for every key");
    mask = side_by_side(*given, "mask");
    shown = rows_in(*mask, queries, "mask");
    mask_dtype = mask->scalar_type() == ScalarType::Bool ? 1 : 2 + number_of(mask->scalar_type(), "mask");
  }
  const int32_t dtype = number_of(q.scalar_type(), "query");
  if (out.numel())
    succeed(qp_float_attention(isa, sizes, dtype, &rows[0], &rows[1], &rows[2], &shown, mask_dtype, causal,
                               (float)scale, out.mutable_data_ptr(), out.numel(), (int32_t)torch::stable::get_num_threads()));
  stack[0] = torch::stable::detail::from(out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qpass_x86, CPU, m) { m.impl("attention", &attention); }
