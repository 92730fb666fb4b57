// Experts: sorts tokens by expert, rounds each token once, and runs every expert's two products over its tokens.
//
// The work of a product is cut into (expert, run of columns) and handed to whichever thread is free: experts are uneven.
// No result depends on that: an output is computed by one thread from one row and one column, and a token's experts are
// added in the order of its places. Of experts that no token chose no byte is read.
#include "experts.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "convert.h"
#include "experts_blocks.h"
#include "experts_gate.h"
#include "scratch.h"

namespace qpass {

const Isa* available_isa(int32_t isa);

namespace {

constexpr int64_t kWorkspace = 256 << 20, kMinTokens = 64;
constexpr int64_t kMinWork = 1 << 15;  // multiply-adds that are worth a thread
constexpr int64_t kColumns = 512;      // whose sum over a token's experts is worth one

// Rows of a product's activation in the work space: codes with what belongs to them, or floats.
struct Rows {
  int8_t* q = nullptr;
  float *scale = nullptr, *zero_point = nullptr, *x = nullptr;
  int32_t* sums = nullptr;
};

// Hands out parts of one allocation; the first pass, over no memory, only adds up.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* at = base ? (T*)(base + used) : nullptr;
    used += padded(count * (int64_t)sizeof(T), 64);
    return at;
  }
  Rows rows(int64_t count, int64_t Kp, int32_t activation) {
    Rows r;
    if (activation == 0) {
      r.x = take<float>(count * Kp);
      return r;
    }
    r.q = take<int8_t>(count * Kp);
    r.scale = take<float>(count);
    r.zero_point = take<float>(count);
    r.sums = take<int32_t>(count * (Kp / 32));
    return r;
  }
};

// One expert's rows [begin, begin + count) of the sorted pairs, where its input begins, and a run of 16-column blocks.
struct Task {
  int64_t expert, begin, count, from, block_begin, block_end;
};

struct Call {
  const Isa& isa;
  const qp_tokens& tokens;
  const qp_gate& gate;
  Blocks up, down;
  int32_t activation, down_activation;
  int64_t E, H, I;
  int32_t threads;
};

// Tokens [t0, t0 + T) in the work space.
struct Space {
  Rows token, sorted, hidden;  // [T], [pairs], [pairs]
  float *y, *z, *total;        // [pairs, up outputs], [pairs, H], [T, H]
  Space(Arena& arena, const Call& c, int64_t T) {
    const int64_t P = T * c.tokens.places;
    token = arena.rows(T, c.up.first.Kp, c.activation);
    sorted = arena.rows(P, c.up.first.Kp, c.activation);
    hidden = arena.rows(P, c.down.first.Kp, c.down_activation);
    y = arena.take<float>(P * c.up.first.N);
    z = arena.take<float>(P * c.H);
    total = arena.take<float>(T * c.H);
  }
};

// Token t as the first product wants it, row `row` of the work space.
void read_token(const Call& c, int64_t t, const Rows& to, int64_t row) {
  const int64_t H = c.H, Kp = c.up.first.Kp;
  const DType dtype = (DType)c.tokens.x_dtype;
  if (c.tokens.codes) {
    int8_t* q = to.q + row * Kp;
    memcpy(q, c.tokens.codes + t * H, (size_t)H);
    memset(q + H, 0, (size_t)(Kp - H));
    to.scale[row] = c.tokens.scale[t];
    if (c.tokens.zero_point) to.zero_point[row] = c.tokens.zero_point[t];
    return sum_runs(q, Kp, to.sums + row * (Kp / 32));
  }
  const char* from = (const char*)c.tokens.x + t * H * bytes_of(dtype);
  if (c.activation) {
    return c.isa.quantize(from, dtype, 1, H, Kp, c.activation == 2, to.q + row * Kp, to.scale + row,
                          to.zero_point + row, to.sums + row * (Kp / 32));
  }
  float* x = to.x + row * Kp;
  for (int64_t k = 0; k < H; k++) x[k] = load_float(from, dtype, k);
  memset(x + H, 0, (size_t)(Kp - H) * 4);
}

void copy_row(const Rows& from, int64_t i, const Rows& to, int64_t j, int64_t Kp) {
  if (from.x) {
    memcpy(to.x + j * Kp, from.x + i * Kp, (size_t)Kp * 4);
    return;
  }
  memcpy(to.q + j * Kp, from.q + i * Kp, (size_t)Kp);
  memcpy(to.sums + j * (Kp / 32), from.sums + i * (Kp / 32), (size_t)(Kp / 32) * 4);
  to.scale[j] = from.scale[i];
  to.zero_point[j] = from.zero_point[i];
}

// h = gate(y), rounded or padded for the second product.
void make_hidden(const Call& c, float* y, int64_t p, const Rows& to) {
  const int64_t I = c.I, Kp = c.down.first.Kp;
  if (c.down_activation == 0) {
    float* x = to.x + p * Kp;
    apply_gate(c.gate, y, I, x);
    memset(x + I, 0, (size_t)(Kp - I) * 4);
    return;
  }
  apply_gate(c.gate, y, I, y);
  c.isa.quantize(y, DType::f32, 1, I, Kp, c.down_activation == 2, to.q + p * Kp, to.scale + p, to.zero_point + p,
                 to.sums + p * (Kp / 32));
}

void multiply(const Call& c, const Blocks& blocks, int32_t activation, int parts, const Rows& rows, float* y,
              const Task& task) {
  const Weight w = blocks.of(task.expert);
  Output out = blocks.out;
  out.data = y + task.begin * w.N;
  if (out.bias) out.bias = (const char*)out.bias + task.expert * blocks.bias_bytes;
  if (activation == 0) {
    const FloatRows x = {rows.x + task.from * w.Kp, task.count, w.Kp, parts};
    return c.isa.product_f(w, x, out, task.block_begin, task.block_end);
  }
  const QuantRows x = {rows.q + task.from * w.Kp, rows.scale + task.from,
                       activation == 2 ? rows.zero_point + task.from : nullptr, rows.sums + task.from * (w.Kp / 32),
                       task.count, w.Kp};
  c.isa.product_q(w, x, out, task.block_begin, task.block_end);
}

// (expert, columns) pieces in the order in which threads take them: each a quarter of what two threads would have left to
// do, so that long runs of weights are read without a break, and the last pieces, on which threads wait, are short. Many
// rows are prepared anew for each piece, which then must be worth it.
std::vector<Task> tasks_of(const std::vector<int64_t>& starts, const Weight& w, int64_t E, int64_t threads, bool one_row) {
  std::vector<Task> tasks;
  const int64_t units = w.Np / 32;
  int64_t left = starts[E] * units;
  for (int64_t e = 0; e < E; e++) {
    const int64_t count = starts[e + 1] - starts[e], least = count <= 8 ? 2 : 8;
    for (int64_t u = 0; count > 0 && u < units;) {
      int64_t step = left / (2 * threads) / count;
      if (step < least) step = least;
      if (step > units - u) step = units - u;
      tasks.push_back({e, starts[e], count, one_row ? 0 : starts[e], u * 2, (u + step) * 2});
      u += step, left -= step * count;
    }
  }
  return tasks;
}

// out = the weighted sum of token t's experts, in the order of its places, for kColumns columns from n0 on.
void add_places(const Call& c, const Space& s, int64_t t0, int64_t t, const int64_t* at, int64_t n0) {
  const int64_t places = c.tokens.places, H = c.H, n1 = n0 + kColumns < H ? n0 + kColumns : H;
  float* total = s.total + t * H;
  for (int64_t n = n0; n < n1; n++) total[n] = 0;
  for (int64_t j = 0; j < places; j++) {
    if (at[j] < 0) continue;
    const float* z = s.z + at[j] * H;
    const float weight = c.tokens.weight[(t0 + t) * places + j];
    for (int64_t n = n0; n < n1; n++) total[n] = total[n] + z[n] * weight;
  }
  for (int64_t n = n0; n < n1; n++) store_float(c.tokens.out, (DType)c.tokens.out_dtype, (t0 + t) * H + n, total[n]);
}

void mix_tokens(const Call& c, const Space& s, int64_t t0, int64_t T) {
  const int64_t places = c.tokens.places, H = c.H, Kp = c.up.first.Kp;
  const int64_t* index = c.tokens.index + t0 * places;
  const auto known = [&](int64_t pair) { return index[pair] >= 0 && index[pair] < c.E; };
  std::vector<int64_t> starts((size_t)c.E + 1), at((size_t)(T * places)), token((size_t)(T * places));
  for (int64_t pair = 0; pair < T * places; pair++) starts[known(pair) ? index[pair] + 1 : 0]++;
  starts[0] = 0;
  for (int64_t e = 0; e < c.E; e++) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts);
  for (int64_t pair = 0; pair < T * places; pair++) {
    at[pair] = known(pair) ? next[index[pair]]++ : -1;
    if (at[pair] >= 0) token[at[pair]] = pair / places;
  }
  const int64_t P = starts[c.E], work = P * (c.up.first.Np + c.down.first.Np) * Kp;
  const int64_t worth = work / kMinWork + 1;
  const int64_t team = team_size(c.threads, worth);
  bool one_row = T == 1;  // of which every expert takes the same one, in place
  for (int64_t e = 0; e < c.E; e++) one_row = one_row && starts[e + 1] - starts[e] <= 1;
  const std::vector<Task> first = tasks_of(starts, c.up.first, c.E, team, one_row);
  const std::vector<Task> second = tasks_of(starts, c.down.first, c.E, team, false);
  const int parts = c.tokens.x_dtype == (int)DType::bf16 ? 1 : c.tokens.x_dtype == (int)DType::f16 ? 2 : 3;
  bool no_memory = false;  // an exception must not leave a parallel region
  const auto guarded = [&](const auto& body) {
    try {
      body();
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
    }
  };
  if (one_row) read_token(c, t0, s.token, 0);
#pragma omp parallel num_threads((int)team) if (team > 1)
  {
    if (!one_row) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < T; t++) read_token(c, t0 + t, s.token, t);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < P; p++) copy_row(s.token, token[p], s.sorted, p, Kp);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)first.size(); i++)
      guarded([&] { multiply(c, c.up, c.activation, parts, one_row ? s.token : s.sorted, s.y, first[i]); });
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; p++) make_hidden(c, s.y + p * c.up.first.N, p, s.hidden);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)second.size(); i++)
      guarded([&] { multiply(c, c.down, c.down_activation, 3, s.hidden, s.z, second[i]); });
    const int64_t runs = padded(H, kColumns) / kColumns;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < T * runs; i++) add_places(c, s, t0, i / runs, at.data() + i / runs * places, i % runs * kColumns);
  }
  if (no_memory) throw std::bad_alloc();
}

}  // namespace
}  // namespace qpass

using namespace qpass;

extern "C" int32_t qp_experts(int32_t isa, const qp_tokens* tokens, int64_t experts, int64_t hidden,
                              int64_t intermediate, const qp_gate* gate, const qp_weight* up, int32_t activation,
                              const qp_weight* down, int32_t down_activation, int32_t threads) {
  const Isa* found = available_isa(isa);
  if (!found) return fail("experts: this machine does not have instruction set %d", (int)isa);
  if (!tokens || !gate || !up || !down) return fail("experts: a null pointer was given");
  const int64_t most = int64_t(1) << 20, T = tokens->T, places = tokens->places;
  if (experts < 1 || experts > most || hidden < 1 || hidden > most || intermediate < 1 || intermediate > most || T < 0 ||
      T > (int64_t(1) << 32) || places < 0 || places > most)
    return fail("experts: sizes are out of range");
  if (tokens->x_dtype < 0 || tokens->x_dtype > 2 || tokens->out_dtype < 0 || tokens->out_dtype > 2)
    return fail("experts: unknown dtype");
  if (T > 0 && (!(tokens->codes ? (const void*)tokens->scale : tokens->x) || !tokens->out ||
                (places > 0 && (!tokens->index || !tokens->weight))))
    return fail("experts: a null pointer was given");
  if (tokens->codes && activation != (tokens->zero_point ? 2 : 1)) return fail("experts: codes do not fit the activation");
  if (gate->function < 0 || gate->function > kIdentity) return fail("experts: unknown gate function");
  Call call = {*found, *tokens, *gate, {}, {}, activation, down_activation, experts, hidden, intermediate, threads};
  if (const char* why = read_blocks(*up, experts, gate->gated ? 2 * intermediate : intermediate, hidden, activation, call.up))
    return fail("experts: first weight: %s", why);
  if (const char* why = read_blocks(*down, experts, hidden, intermediate, down_activation, call.down))
    return fail("experts: second weight: %s", why);
  try {
    Arena one = {nullptr};
    const Space sizes(one, call, 1);
    int64_t rows = kWorkspace / one.used;
    if (rows < kMinTokens) rows = kMinTokens;
    if (rows > T) rows = T;
    for (int64_t t = 0; t < T; t += rows) {
      const int64_t n = T - t < rows ? T - t : rows;
      Arena measure = {nullptr};
      const Space measured(measure, call, n);
      Arena arena = {(char*)scratch(0, measure.used)};
      mix_tokens(call, Space(arena, call, n), t, n);
    }
  } catch (const std::bad_alloc&) {
    return fail("experts: out of memory for the work space");
  }
  return 0;
}
