// The launch plan of `edited_projection`, a pure function of shapes and device, for its tests.
#pragma once

#include "device/element.h"
#include "status.h"

namespace perfusion {

struct EditedProjectionPlan {
  int rows, columns;            // of a block's tile
  int row_tiles, column_tiles;  // the result's
  int bytes;                    // of shared memory
  bool wide_encodings, wide_weight, wide_result, wide_tables;  // accesses of 16 bytes
};

// PERFUSION_UNSUPPORTED if no tile fits into the device's shared memory.
perfusion_status plan_edited_projection(const perfusion_edited_projection_params& params, const Device& device,
                                        EditedProjectionPlan* plan);

}  // namespace perfusion
