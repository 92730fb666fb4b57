// The plan of one K chunk on AMX: which tiles multiply, and where groups open and close; the same for every row block.
#pragma once
#include <cstdint>

#include "amx_rows.h"
#include "product.h"

namespace qpass {
namespace {

constexpr int64_t kSplitTile = 1536;   // inputs 0..31, zeros, inputs 32..63: see `splits`
constexpr int kMaxSteps = 24, kMaxSegments = 16;

// One multiplication of a row tile with a column tile, as byte offsets into the chunk's panels.
struct Step {
  int32_t a, b;
};

// Steps [begin, end) belong to one group. It starts at zero or at the sums that the chunk before left in memory.
struct Segment {
  int begin, end;
  int64_t group;
  bool opens, closes;
};

struct Plan {
  Step steps[kMaxSteps];
  Segment segments[kMaxSegments];
  int step_count, segment_count;
};

// Whether a group ends between the two halves of 64-input block `k`. Such a block is unpacked with 512 zero bytes
// between its halves, so that (half, zeros) and (zeros, half) are two tiles: a tile product costs the same at any depth.
inline bool splits(const Weight& w, int64_t k) {
  const int64_t runs = w.group_size / 32, next = 2 * k + 1;
  return next % runs == 0 && next < w.groups * runs;
}

struct Planner {
  Plan& plan;
  int64_t runs, last;  // runs of 32 inputs per group, and in all groups

  void open(int64_t run, bool continues) {
    plan.segments[plan.segment_count++] = {plan.step_count, plan.step_count, run / runs, !continues, false};
  }
  void step(int64_t a, int64_t b) {
    plan.steps[plan.step_count++] = {(int32_t)a, (int32_t)b};
    plan.segments[plan.segment_count - 1].end = plan.step_count;
  }
  // After the runs before `run`: closes the group that ends there. Returns whether one did.
  bool close(int64_t run) {
    if (run % runs != 0 && run < last) return false;
    return plan.segments[plan.segment_count - 1].closes = true;
  }
};

// Codes: blocks [k, k + count) of 64 inputs, one row tile each; k is a multiple of kTilesTogether.
inline void plan_codes(const Weight& w, const RowTiles& tiles, int64_t k, int64_t count, Plan& plan) {
  plan.step_count = plan.segment_count = 0;
  Planner p{plan, w.group_size / 32, w.groups * (w.group_size / 32)};
  const int64_t slot = p.runs % 2 ? kSplitTile : kTile;
  bool open = false;
  for (int64_t i = 0; i < count; i++) {
    const int64_t run = 2 * (k + i);
    if (!open) p.open(run, run % p.runs != 0);
    p.step(tiles.block(i), i * slot);
    if (splits(w, k + i)) {
      p.close(run + 1);
      p.open(run + 1, false);
      p.step(tiles.block(i), i * slot + 512);
    }
    open = !p.close(run + 2);
  }
}

}  // namespace
}  // namespace qpass
