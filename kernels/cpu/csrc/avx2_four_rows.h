// AVX2: assembly of a line of codes times four rows, for the products whose codes lie ready in the L1 cache.
//
// Written out because GCC adds products to each other first, or keeps some of the eight sums in memory, which takes a
// quarter to a half of the speed. Products wait for the next row's before they are added: Zen 3 has two ports for
// multiplications, which additions take too, and gets to 1.55 multiplications a cycle this way, 1.5 in the plain order.
//
// Registers: ymm0 to 7 the sums, two a row; 8 to 11 products and inputs; 12 and 13 the codes. %0 points to the codes, %1
// to the inputs of the four rows.
#pragma once

// Inputs of a row, `at` bytes from %1, times both registers of codes, into p and q.
#define QPASS_MULTIPLY(load, multiply, at, p, q)                             \
  load " " #at "(%1), %%ymm" #q "\n\t" multiply " %%ymm" #q ", %%ymm12, %%ymm" #p \
  "\n\t" multiply " %%ymm" #q ", %%ymm13, %%ymm" #q "\n\t"
#define QPASS_ADD(add, p, q, a, b) \
  add " %%ymm" #p ", %%ymm" #a ", %%ymm" #a "\n\t" add " %%ymm" #q ", %%ymm" #b ", %%ymm" #b "\n\t"

// A line of 64 bytes, `codes` bytes from %0, times inputs at x0 to x3. `load` fills a register with a row's inputs.
#define QPASS_LINE(load, multiply, add, codes, x0, x1, x2, x3)                                                     \
  "vmovdqa " #codes "(%0), %%ymm12\n\tvmovdqa " #codes "+32(%0), %%ymm13\n\t"                                      \
  QPASS_MULTIPLY(load, multiply, x0, 8, 9) QPASS_MULTIPLY(load, multiply, x1, 10, 11) QPASS_ADD(add, 8, 9, 0, 1)   \
  QPASS_MULTIPLY(load, multiply, x2, 8, 9) QPASS_ADD(add, 10, 11, 2, 3) QPASS_MULTIPLY(load, multiply, x3, 10, 11) \
  QPASS_ADD(add, 8, 9, 4, 5) QPASS_ADD(add, 10, 11, 6, 7)
