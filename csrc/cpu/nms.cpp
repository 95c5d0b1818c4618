// Non-maximum suppression, for mmcv without its compiled operators (dcn_plugin/mmdet/mmcv_ext).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../tensor.h"

namespace dcn::cpu {
namespace {

enum SoftNmsMethod : int64_t { kNaive, kLinear, kGaussian };  // mmcv's numbers

template <class T>
struct Box {
  T x1, y1, x2, y2, area, score;
  int64_t index;
};

// The intersection over union of boxes whose sides are x2 - x1 + extra; not a number where both are empty.
template <class T>
T overlap(const Box<T>& a, T x1, T y1, T x2, T y2, T area, T extra) {
  const T width = std::max(T(0), std::min(a.x2, x2) - std::max(a.x1, x1) + extra);
  const T height = std::max(T(0), std::min(a.y2, y2) - std::max(a.y1, y1) + extra);
  const T intersection = width * height;
  return intersection / (a.area + area - intersection);
}

template <class T>
void find_suppressors(int64_t count, const T* columns, T threshold, T extra, int32_t* suppressor) {
  const T *x1 = columns, *y1 = x1 + count, *x2 = y1 + count, *y2 = x2 + count;
  std::vector<T> areas(count);
  for (int64_t i = 0; i < count; ++i) areas[i] = (x2[i] - x1[i] + extra) * (y2[i] - y1[i] + extra);
  std::fill_n(suppressor, count, -1);
  for (int64_t i = 0; i < count; ++i) {
    if (suppressor[i] >= 0) continue;
    suppressor[i] = static_cast<int32_t>(i);
    const Box<T> box{x1[i], y1[i], x2[i], y2[i], areas[i]};
    for (int64_t j = i + 1; j < count; ++j) {  // without branches: the compiler vectorises it
      const bool suppressed = overlap(box, x1[j], y1[j], x2[j], y2[j], areas[j], extra) > threshold;
      suppressor[j] = suppressed & (suppressor[j] < 0) ? static_cast<int32_t>(i) : suppressor[j];
    }
  }
}

Tensor nms_suppressors(const Tensor& boxes, double iou_threshold, int64_t offset) {
  check_floating(boxes, "boxes");
  check(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4), got ", sizes(boxes));
  const int64_t count = boxes.size(0);
  check(count <= std::numeric_limits<int32_t>::max(), "boxes must be at most 2147483647, got ", count);
  const ScalarType type = compute_type(boxes.scalar_type());
  const Tensor columns = as(torch::stable::transpose(boxes, 0, 1), type);
  const Tensor suppressor = empty(boxes, {count}, ScalarType::Int);
  const auto run = [&]<class T>(T) {
    find_suppressors(count, data<T>(columns), static_cast<T>(iou_threshold), T(offset), data<int32_t>(suppressor));
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return torch::stable::to(suppressor, ScalarType::Long);
}

// Moves the boxes that remain to the front, best first, and returns their number. Their order is mmcv's for equal
// scores too: the best changes places with the first, and what falls out with the last.
template <class T>
int64_t decay_scores(std::vector<Box<T>>& boxes, T threshold, T sigma, T min_score, int64_t method, T extra) {
  auto end = boxes.end();
  for (auto best = boxes.begin(); best != end; ++best) {
    std::swap(*best, *std::max_element(best, end, [](const Box<T>& a, const Box<T>& b) { return a.score < b.score; }));
    for (auto box = best + 1; box != end;) {
      const T iou = overlap(*best, box->x1, box->y1, box->x2, box->y2, box->area, extra);
      if (method == kGaussian)
        box->score *= std::exp(-(iou * iou) / sigma);
      else if (iou >= threshold)
        box->score *= method == kLinear ? 1 - iou : T(0);
      if (box->score < min_score)
        *box = *--end;
      else
        ++box;
    }
  }
  return end - boxes.begin();
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                    double min_score, int64_t method, int64_t offset) {
  check_floating(boxes, "boxes");
  check(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4), got ", sizes(boxes));
  const int64_t count = boxes.size(0);
  check_like_input(scores, boxes, "scores");
  check_shape(sizes(scores), {count}, "scores", "(N,)");
  check(method >= kNaive && method <= kGaussian, "method must be 0 (naive), 1 (linear) or 2 (gaussian), got ", method);
  const ScalarType type = compute_type(boxes.scalar_type());
  const Tensor corners = as(boxes, type), given = as(scores, type);
  Tensor kept, indices;
  const auto run = [&]<class T>(T) {
    std::vector<Box<T>> all(count);
    const T extra = T(offset);
    for (int64_t i = 0; i < count; ++i) {
      const T* box = data<T>(corners) + 4 * i;
      const T area = (box[2] - box[0] + extra) * (box[3] - box[1] + extra);
      all[i] = {box[0], box[1], box[2], box[3], area, data<T>(given)[i], i};
    }
    const int64_t remaining = decay_scores(all, T(iou_threshold), T(sigma), T(min_score), method, extra);
    kept = empty(boxes, {remaining, 5}, type);
    indices = empty(boxes, {remaining}, ScalarType::Long);
    for (int64_t i = 0; i < remaining; ++i) {
      const Box<T>& box = all[i];
      std::copy_n(std::array{box.x1, box.y1, box.x2, box.y2, box.score}.data(), 5, data<T>(kept) + 5 * i);
      data<int64_t>(indices)[i] = box.index;
    }
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {as(kept, boxes.scalar_type()), indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("nms_suppressors", TORCH_BOX(&nms_suppressors));
  m.impl("soft_nms", TORCH_BOX(&soft_nms));
}

}  // namespace dcn::cpu
