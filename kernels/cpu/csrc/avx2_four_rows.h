// AVX2: assembly of a line of codes times four rows, for the products whose codes lie ready in the L1 cache.
//
// Written out because GCC adds products to each other first, or keeps some of the eight sums in memory, which takes a
// quarter to a half of the speed. Products wait for the next row's before they are added: Zen 3 has two ports for
// multiplications, which additions take too, and gets to 1.55 multiplications a cycle this way, 1.5 in the plain order.
//
// Registers: ymm0 to 7 the sums, two a row; 8 to 11 products and inputs; 12 and 13 the codes; 14 ones. %0 points to the
// codes, %1 to the inputs of the four rows, %3 to where their int16 sums start, %4 to their int32 totals or outputs.
#pragma once

// Inputs of a row, `at` bytes from %1, times both registers of codes, into p and q.
#define QPASS_MULTIPLY(load, multiply, at, p, q)                             \
  load " " #at "(%1), %%ymm" #q "\n\t" multiply " %%ymm" #q ", %%ymm12, %%ymm" #p \
  "\n\t" multiply " %%ymm" #q ", %%ymm13, %%ymm" #q "\n\t"
#define QPASS_ADD(add, p, q, a, b) \
  add " %%ymm" #p ", %%ymm" #a ", %%ymm" #a "\n\t" add " %%ymm" #q ", %%ymm" #b ", %%ymm" #b "\n\t"

// A line of 64 bytes, `codes` bytes from %0, times inputs at x0 to x3. `load` fills a register with a row's inputs.
#define QPASS_LINE(load, multiply, add, codes, x0, x1, x2, x3)                                                     \
  "vmovdqu " #codes "(%0), %%ymm12\n\tvmovdqu " #codes "+32(%0), %%ymm13\n\t"                                      \
  QPASS_MULTIPLY(load, multiply, x0, 8, 9) QPASS_MULTIPLY(load, multiply, x1, 10, 11) QPASS_ADD(add, 8, 9, 0, 1)   \
  QPASS_MULTIPLY(load, multiply, x2, 8, 9) QPASS_ADD(add, 10, 11, 2, 3) QPASS_MULTIPLY(load, multiply, x3, 10, 11) \
  QPASS_ADD(add, 8, 9, 4, 5) QPASS_ADD(add, 10, 11, 6, 7)

// Both int16 sums of a row start at `at`, and end in its totals.
#define QPASS_BEGIN(at, a, b) "vpbroadcastd " #at "(%3), %%ymm" #a "\n\tvmovdqa %%ymm" #a ", %%ymm" #b "\n\t"
#define QPASS_END(at, a) \
  "vpmaddwd %%ymm14, %%ymm" #a ", %%ymm" #a "\n\tvpaddd " #at "(%4), %%ymm" #a ", %%ymm" #a "\n\tvmovdqa %%ymm" #a ", " #at "(%4)\n\t"
// The same for the only sum of a group: times the scales of its outputs, in ymm12 or 13, added to floats.
#define QPASS_END_SCALED(at, a, scale)                                                                     \
  "vpmaddwd %%ymm14, %%ymm" #a ", %%ymm" #a "\n\tvcvtdq2ps %%ymm" #a ", %%ymm" #a "\n\tvfmadd213ps " #at \
  "(%4), %%ymm" #scale ", %%ymm" #a "\n\tvmovaps %%ymm" #a ", " #at "(%4)\n\t"
#define QPASS_ALL(DO) DO(0, 0) DO(32, 1) DO(64, 2) DO(96, 3) DO(128, 4) DO(160, 5) DO(192, 6) DO(224, 7)

// Four lines of bytes, added in int16.
#define QPASS_LINE4(codes, x0, x1, x2, x3) QPASS_LINE("vpbroadcastd", "vpmaddubsw", "vpaddw", codes, x0, x1, x2, x3)
#define QPASS_LINES4                                                                    \
  QPASS_LINE4(0, 0, 4, 8, 12) QPASS_LINE4(64, 16, 20, 24, 28) QPASS_LINE4(128, 32, 36, 40, 44) \
  QPASS_LINE4(192, 48, 52, 56, 60)
