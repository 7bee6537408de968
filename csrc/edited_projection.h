// The launch plans of `edited_projection` and its derivatives, pure functions of shapes and device, so that tests can call them.
#pragma once

#include "device/element.h"
#include "status.h"

namespace perfusion {

struct EditedProjectionPlan {
  int rows, columns;            // of a block's tile
  int row_tiles, column_tiles;  // the result's
  int bytes;                    // of shared memory
  bool wide_encodings, wide_weight, wide_result, wide_tables;  // accesses of 16 bytes
  int64_t blocks() const { return int64_t{row_tiles} * column_tiles; }
};

// PERFUSION_UNSUPPORTED if no tile fits into the device's shared memory, or a launch cannot have as many blocks. `operation`: for messages.
perfusion_status plan_edited_projection(const char* operation, const perfusion_edited_projection_params& params, const Device& device,
                                        EditedProjectionPlan* plan);

struct EditedProjectionBackwardPlan {
  int row_tiles, column_tiles;  // of the encodings' gradient
  int splits, steps;            // blocks that share a tile's sum over O, and the product's steps in each
  int64_t pitch;                // of the partial sums in the workspace, float32 [splits, B T, pitch]
  int64_t workspace_bytes;
};

EditedProjectionBackwardPlan plan_edited_projection_backward(const perfusion_edited_projection_backward_params& params,
                                                             const Device& device);

}  // namespace perfusion
