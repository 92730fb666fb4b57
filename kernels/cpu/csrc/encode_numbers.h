// Encoded numbers: the small floats and codebooks that weights become, and the code of one number, in plain C.
#pragma once
#include <cstdint>
#include <cstring>

#include "convert.h"

namespace qpass {
namespace {

// e2m3 has a byte of e4m3 for each value.
enum class Element : int32_t { e2m1, e4m3, e2m3, codebook };

// How a group's scale comes from its largest magnitude: a power of two; e4m3 times that of the tensor; a float, amax / 448;
// a float that the caller has; the magnitude itself; amax / 448 of a block of as many rows as columns.
enum class Rule : int32_t { exponent, nested, amax, given, absmax, block };

// The bounds between a codebook's values, ascending, and the codes between them; then the bounds of the third and fourth
// step of a search in halves, and the codes, each by the negative of how many bounds lie below.
struct Book {
  float bounds[15], third[8], fourth[8];
  uint8_t codes[16], backwards[16];
};

struct Job {
  int64_t K, group_size, groups;
  DType dtype;
  Element element;
  Rule rule;
  const float* given;  // nested: the tensor's scale; given: [N][groups]
  Book book;
};

// `given`: 15 bounds and 16 codes.
void read_book(const float* given, Book& book) {
  memcpy(book.bounds, given, sizeof(book.bounds));
  for (int i = 0; i < 4; i++) book.third[-i & 7] = book.third[4 - i] = given[i * 4 + 1];
  for (int i = 0; i < 8; i++) book.fourth[-i & 7] = given[i * 2];
  for (int i = 0; i < 16; i++) book.codes[i] = book.backwards[-i & 15] = (uint8_t)given[15 + i];
}

// exponent and mantissa of an element: its bias, mantissa bits, largest value.
template <Element kElement>
struct Numbers;
template <>
struct Numbers<Element::e2m1> {
  static constexpr int bias = 1, mantissa = 1;
  static constexpr float largest = 6;
};
template <>
struct Numbers<Element::e4m3> {
  static constexpr int bias = 7, mantissa = 3;
  static constexpr float largest = 448;
};
template <>
struct Numbers<Element::e2m3> {
  static constexpr int bias = 1, mantissa = 3;
  static constexpr float largest = 7.5f;
};

// The e4m3 bytes of e2m3's codes 0 to 7, its subnormals, and of 8, which is 1; those of all others too are 48 more than they.
constexpr uint8_t kSmallSixes[16] = {0, 0x20, 0x28, 0x2c, 0x30, 0x32, 0x34, 0x36, 0x38};

// The code of a magnitude, nearest, ties to even, too large the largest. Next to 1.5 * 2^(23 - mantissa) times the power
// of two below it, or below the least normal, the sum's bits count the steps that a code counts.
template <Element kElement>
inline uint32_t code_of(float size) {
  using N = Numbers<kElement>;
  const float least = float_of((uint32_t)(128 - N::bias) << 23);
  size = size < N::largest ? size : N::largest;
  const uint32_t binade = bits_of(size > least ? size : least) & 0x7f800000u;
  const float next = float_of(binade) * (1.5f * (1 << (23 - N::mantissa)));
  const uint32_t steps = bits_of(size + next) - bits_of(next);
  const uint32_t code = (binade >> (23 - N::mantissa)) + steps - ((128 - N::bias) << N::mantissa);
  if (kElement != Element::e2m3) return code;
  return code < 8 ? kSmallSixes[code] : code + 48;
}

inline uint32_t code_in_book(const Book& book, float v) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += v > book.bounds[i];
  return book.codes[rank];
}

// What a row's buffer holds of a code, so that pack_tile.h, which adds 8 or 128, leaves the code.
inline int8_t as_packed(Element element, uint32_t code) {
  return (int8_t)(element == Element::e2m1 || element == Element::codebook ? (int)code - 8 : (int)(code ^ 0x80));
}

// e4m3 byte to float, for bytes that are no NaN and not negative.
inline float from_e4m3(uint32_t byte) {
  return byte < 8 ? (float)byte * 0x1p-9f : float_of((byte + 960) << 20);
}

}  // namespace
}  // namespace qpass
