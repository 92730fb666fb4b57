// AVX2: attention over float keys and values where they lie. Included inside a region for its instructions only.
//
// One number's way does not depend on the other rows of its block: a score is one chain of FMA over its key, an output
// one chain over the keys of a chunk, and what a mask hides adds nothing, NaN and Inf included.
#pragma once

namespace qpass {
namespace {

constexpr int64_t kTile = 32;  // keys or values that stay in the first cache while all rows meet them

// The mask of one row: where it starts in memory, and how many keys it may see at most.
struct Line {
  int64_t at, limit;
};

inline Line line_of(const FloatAttention& c, const Block& block, int64_t r) {
  const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
  return {block.b * c.mask.batch + head * c.mask.head + m * c.mask.token, c.causal && m + 1 < c.S ? m + 1 : c.S};
}

// What is added to the scores of keys t to t + 7: -inf hides one.
inline __m256 added8(const FloatAttention& c, const Line& line, int64_t t) {
  const __m256 hide = _mm256_set1_ps(-INFINITY);
  if (t + 8 <= line.limit) {
    if (c.mask_dtype == 0) return _mm256_setzero_ps();
    if (c.mask_dtype > 1) return load8(c.mask.data, (DType)(c.mask_dtype - 2), line.at + t);
    const __m128i seen = _mm_loadl_epi64((const __m128i*)((const uint8_t*)c.mask.data + line.at + t));
    const __m256i zero = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(seen), _mm256_setzero_si256());
    return _mm256_and_ps(hide, _mm256_castsi256_ps(zero));
  }
  alignas(32) float add[8];
  _mm256_store_ps(add, hide);
  for (int64_t j = 0; j < 8 && t + j < line.limit; j++) {
    if (c.mask_dtype > 1) add[j] = load_float(c.mask.data, (DType)(c.mask_dtype - 2), line.at + t + j);
    else if (c.mask_dtype == 0 || ((const uint8_t*)c.mask.data)[line.at + t + j]) add[j] = 0;
  }
  return _mm256_load_ps(add);
}

inline int hidden8(__m256 add) {
  return _mm256_movemask_ps(_mm256_cmp_ps(add, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
}

// Which of the keys [from, to) some row of the block sees: from a multiple of 8 beyond `from`, up to `to` at most.
inline void seen_range(const FloatAttention& c, const Block& block, int64_t from, int64_t to, int64_t& low, int64_t& high) {
  low = to, high = from;
  for (int64_t r = 0; r < block.count; r++) {
    if (r && c.mask.head == 0 && (block.first + r) % c.shared) continue;  // the query's first row had the same mask
    const Line line = line_of(c, block, r);
    const int64_t end = line.limit < to ? line.limit : to;
    int64_t t = from;
    while (t < low && t < end && hidden8(added8(c, line, t)) == 255) t += 8;
    if (t < end && t < low) low = t;
    t = from + padded(end > from ? end - from : 0, 8);
    while (t > high && t > from && hidden8(added8(c, line, t - 8)) == 255) t -= 8;
    if (t > high) high = t;
  }
  high = high < to ? high : to;
}

// Scores of ROWS rows with 8 / ROWS keys, of which `left` exist: beyond them they are the last one's.
template <DType dtype, int ROWS>
inline void scores(const float* q, int64_t D, const char* key, int64_t step, int64_t left, float* s) {
  constexpr int KEYS = 8 / ROWS;
  const char* k[KEYS];
  for (int j = 0; j < KEYS; j++) k[j] = key + (j < left ? j : left - 1) * step;
  __m256 a[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_ps();
  for (int64_t i = 0; i < D; i += 8) {
    __m256 x[KEYS];
    for (int j = 0; j < KEYS; j++) x[j] = load8(k[j], dtype, i);
    for (int r = 0; r < ROWS; r++) {
      const __m256 y = _mm256_loadu_ps(q + r * D + i);
      for (int j = 0; j < KEYS; j++) a[r * KEYS + j] = _mm256_fmadd_ps(y, x[j], a[r * KEYS + j]);
    }
  }
  const __m256 one = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 two = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  alignas(32) float all[8];
  _mm256_store_ps(all, _mm256_add_ps(_mm256_permute2f128_ps(one, two, 0x20), _mm256_permute2f128_ps(one, two, 0x31)));
  for (int r = 0; r < ROWS; r++) __builtin_memcpy(s + r * kChunk, all + r * KEYS, 4 * KEYS);
}

template <DType dtype, int ROWS>
inline void tile_scores(const FloatAttention& c, const float* q, const char* key, int64_t step, int64_t count, float* s) {
  for (int64_t t = 0; t < count; t += 8 / ROWS) scores<dtype, ROWS>(q, c.D, key + t * step, step, count - t, s + t);
}

// Adds weight times value, over `count` values, to 8 * VECS outputs of ROWS rows.
template <DType dtype, int ROWS, int VECS>
inline void values(const float* p, const char* value, int64_t step, int64_t count, float* sum, int64_t Dv, int64_t i) {
  __m256 a[ROWS][VECS];
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECS; n++) a[r][n] = _mm256_loadu_ps(sum + r * Dv + i + 8 * n);
  for (int64_t t = 0; t < count; t++) {
    __m256 x[VECS];
    for (int n = 0; n < VECS; n++) x[n] = load8(value + t * step, dtype, i + 8 * n);
    for (int r = 0; r < ROWS; r++) {
      const __m256 y = _mm256_broadcast_ss(p + r * kChunk + t);
      for (int n = 0; n < VECS; n++) a[r][n] = _mm256_fmadd_ps(y, x[n], a[r][n]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECS; n++) _mm256_storeu_ps(sum + r * Dv + i + 8 * n, a[r][n]);
}

template <DType dtype, int ROWS>
inline void tile_values(const FloatAttention& c, const float* p, const char* value, int64_t step, int64_t count, float* sum) {
  constexpr int VECS = 8 / ROWS;
  int64_t i = 0;
  for (; i + 8 * VECS <= c.Dv; i += 8 * VECS) values<dtype, ROWS, VECS>(p, value, step, count, sum, c.Dv, i);
  for (; i < c.Dv; i += 8) values<dtype, ROWS, 1>(p, value, step, count, sum, c.Dv, i);
}

// Scores of one row, [low, high) of a chunk at s, to weights exp(score - most). False if one is NaN or +inf: then so is
// the row, and its weights are 0.
inline bool weigh(const FloatAttention& c, const Line& line, int64_t from, int64_t low, int64_t high, float* s, float& most,
                  float& total) {
  const __m256 hide = _mm256_set1_ps(-INFINITY);
  __m256 largest = hide, wrong = _mm256_setzero_ps(), sum = wrong;
  for (int64_t t = low; t < high; t += 8) {
    const __m256 add = added8(c, line, t);
    __m256 x = _mm256_add_ps(_mm256_loadu_ps(s + t - from), add);
    x = _mm256_blendv_ps(x, hide, _mm256_cmp_ps(add, hide, _CMP_EQ_OQ));
    wrong = _mm256_or_ps(wrong, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    largest = _mm256_max_ps(largest, x);
    _mm256_storeu_ps(s + t - from, x);
  }
  most = max_of(largest), total = 0;
  const bool right = _mm256_movemask_ps(wrong) == 0 && most != INFINITY;
  const __m256 base = _mm256_set1_ps(most);
  for (int64_t t = low; t < high; t += 8) {
    const __m256 e = right && most != -INFINITY ? exp8(_mm256_sub_ps(_mm256_loadu_ps(s + t - from), base))
                                                : _mm256_setzero_ps();
    _mm256_storeu_ps(s + t - from, e);
    sum = _mm256_add_ps(sum, e);
  }
  total = sum8(sum);
  return right;
}

// A row whose sum has a NaN: it is one of a value that the row sees, or 0 times what a mask hides, which is left out.
template <DType dtype>
void sum_of_seen(const FloatAttention& c, const Line& line, const float* p, const char* value, int64_t step, int64_t low,
                 int64_t high, float* sum) {
  for (int64_t i = 0; i < c.Dv; i++) sum[i] = 0;
  for (int64_t t = low; t < high; t++) {
    if (hidden8(added8(c, line, t)) & 1) continue;
    const __m256 y = _mm256_set1_ps(p[t - low]);
    for (int64_t i = 0; i < c.Dv; i += 8)
      _mm256_storeu_ps(sum + i, _mm256_fmadd_ps(y, load8(value + (t - low) * step, dtype, i), _mm256_loadu_ps(sum + i)));
  }
}

template <DType dtype>
void chunk(const FloatAttention& c, const Block& block, int64_t from, const Piece& out) {
  const int64_t bytes = bytes_of(dtype), to = from + kChunk < c.S ? from + kChunk : c.S;
  const float* q = block.work;
  float* s = block.work + kRowBlock * c.D;
  int64_t low, high;
  seen_range(c, block, from, to, low, high);
  for (int64_t r = 0; r < block.count; r++) out.most[r] = -INFINITY;
  if (low >= high) return;
  const int64_t k_step = c.k.token * bytes, v_step = c.v.token * bytes;
  const char* key = (const char*)c.k.data + (block.b * c.k.batch + block.h * c.k.head) * bytes;
  const char* value = (const char*)c.v.data + (block.b * c.v.batch + block.h * c.v.head) * bytes;
  for (int64_t t = low; t < high; t += kTile) {
    const int64_t count = high - t < kTile ? high - t : kTile;
    int64_t r = 0;
    for (; r + 4 <= block.count; r += 4)
      tile_scores<dtype, 4>(c, q + r * c.D, key + t * k_step, k_step, count, s + r * kChunk + t - from);
    if (block.count & 2) {
      tile_scores<dtype, 2>(c, q + r * c.D, key + t * k_step, k_step, count, s + r * kChunk + t - from);
      r += 2;
    }
    if (block.count & 1) tile_scores<dtype, 1>(c, q + r * c.D, key + t * k_step, k_step, count, s + r * kChunk + t - from);
  }
  uint32_t wrong = 0;
  for (int64_t r = 0; r < block.count; r++)
    if (!weigh(c, line_of(c, block, r), from, low, high, s + r * kChunk, out.most[r], out.total[r])) wrong |= 1u << r;
  for (int64_t i = 0; i < block.count * c.Dv; i++) out.sum[i] = 0;
  for (int64_t t = low; t < high; t += kTile) {
    const int64_t count = high - t < kTile ? high - t : kTile;
    int64_t r = 0;
    for (; r + 4 <= block.count; r += 4)
      tile_values<dtype, 4>(c, s + r * kChunk + t - from, value + t * v_step, v_step, count, out.sum + r * c.Dv);
    if (block.count & 2) {
      tile_values<dtype, 2>(c, s + r * kChunk + t - from, value + t * v_step, v_step, count, out.sum + r * c.Dv);
      r += 2;
    }
    if (block.count & 1)
      tile_values<dtype, 1>(c, s + r * kChunk + t - from, value + t * v_step, v_step, count, out.sum + r * c.Dv);
  }
  for (int64_t r = 0; r < block.count; r++) {
    float* sum = out.sum + r * c.Dv;
    bool number = true;
    for (int64_t i = 0; i < c.Dv; i++) number &= sum[i] == sum[i];
    if (wrong >> r & 1) {
      out.most[r] = 0, out.total[r] = NAN;
      for (int64_t i = 0; i < c.Dv; i++) sum[i] = NAN;
    } else if (!number) {
      sum_of_seen<dtype>(c, line_of(c, block, r), s + r * kChunk + low - from, value + low * v_step, v_step, low, high, sum);
    }
  }
}

void begin(const FloatAttention& c, const Block& block) {
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
    const int64_t at = block.b * c.q.batch + head * c.q.head + m * c.q.token;
    for (int64_t i = 0; i < c.D; i += 8)
      _mm256_storeu_ps(block.work + r * c.D + i,
                       _mm256_mul_ps(_mm256_set1_ps(c.scale), load8(c.q.data, c.dtype, at + i)));
  }
}

void join(const FloatAttention& c, const Block& block, const Piece& into, const Piece& one) {
  for (int64_t r = 0; r < block.count; r++) {
    if (one.most[r] == -INFINITY) continue;
    const bool first = into.most[r] == -INFINITY;
    const float most = first || one.most[r] > into.most[r] ? one.most[r] : into.most[r];
    const float mine = first ? 0 : std::exp(into.most[r] - most), theirs = std::exp(one.most[r] - most);
    into.most[r] = most;
    into.total[r] = (first ? 0 : into.total[r] * mine) + one.total[r] * theirs;
    float* sum = into.sum + r * c.Dv;
    for (int64_t i = 0; i < c.Dv; i++) sum[i] = (first ? 0 : sum[i] * mine) + one.sum[r * c.Dv + i] * theirs;
  }
}

void finish(const FloatAttention& c, const Block& block, const Piece& piece) {
  for (int64_t r = 0; r < block.count; r++) {
    const int64_t m = (block.first + r) / c.shared, head = block.h * c.shared + (block.first + r) % c.shared;
    const int64_t at = ((block.b * c.M + m) * c.Hq + head) * c.Dv;
    const bool seen = piece.most[r] != -INFINITY;
    const __m256 factor = _mm256_set1_ps(seen ? 1 / piece.total[r] : 0);
    for (int64_t i = 0; i < c.Dv; i += 8)
      store8(c.out, c.dtype, at + i, seen ? _mm256_mul_ps(factor, _mm256_loadu_ps(piece.sum + r * c.Dv + i)) : factor);
  }
}

void chunk_of_any(const FloatAttention& c, const Block& block, int64_t from, const Piece& out) {
  if (c.dtype == DType::f32) return chunk<DType::f32>(c, block, from, out);
  if (c.dtype == DType::bf16) return chunk<DType::bf16>(c, block, from, out);
  chunk<DType::f16>(c, block, from, out);
}

}  // namespace
}  // namespace qpass
