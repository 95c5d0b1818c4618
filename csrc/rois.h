// What the RoI operators have in common: rois is (K, 5), each row (batch index, x1, y1, x2, y2).
#pragma once
#include "check.h"
#include "sampling.h"

namespace dcn {

inline void check_roi_sizes(Sizes input, Sizes rois, Sizes output_size, const char* input_shape) {
  check_rank(input, 4, "input", input_shape);
  check_rank(rois, 2, "rois", "(K, 5)");
  check(rois[1] == 5, "rois must have shape (K, 5), each row (batch index, x1, y1, x2, y2), got ", rois);
  check_positive_pair(output_size, "output_size");
  check_maps(input);
}

// NaN is no index. CUDA kernels take nothing from a RoI without one: an error would have to wait for the device.
template <class T>
DCN_INLINE bool is_batch_index(T index, int64_t batch) {
  return index > T(-1) && index < T(batch);
}

template <class T>
void check_batch_indices(const T* rois, int64_t count, int64_t batch) {
  for (int64_t k = 0; k < count; ++k)
    check(is_batch_index(rois[k * 5], batch), "rois[", k, ", 0] = ", rois[k * 5], " is not an index into a batch of ",
          batch, " images");
}

}  // namespace dcn
