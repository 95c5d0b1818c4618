// Kernels of deformable RoI align. A row is a bin of a RoI. Its gradients with respect to offset and mask are sums over
// its samples and channels, so that one pass over the samples gives all gradients.
//   channels last    one warp for each row, with lanes for neighbouring channels
//   channels first   lanes for neighbouring rows, with a block's warps for different channels
#pragma once
#include "../deform_roi_align_shape.h"
#include "runtime.h"

namespace dcn::cuda {

template <class T>
struct RoIArgs {
  using A = Accum<T>;
  DeformRoIAlignShape shape;
  const T* input;
  const A* rois;    // (K, 5)
  const T* offset;  // (K, 2, oh, ow), x first, or null
  const T* mask;    // (K, 1, oh, ow), or null
  T* output;
  // For the backward. Each gradient may be null.
  const T* grad_output;
  A* grad_input;  // zero on entry
  T* grad_offset;
  T* grad_mask;

  constexpr int rows() const { return static_cast<int>(shape.rois * shape.bins()); }
};

// Kernels are compiled for one block an SM at least, so that no registers are spilled to fit more.
constexpr int kRoIThreads = 256, kRoIWarps = kRoIThreads / 32;
constexpr int kPlanarChannels = 4;  // channels first: how many a thread takes at once

template <class A>
struct Bin {
  int64_t image;  // 0, and no samples, where the RoI's batch index is out of range
  int row, column;
  RoIAxis<A> y, x;
  A shift_y, shift_x, mask, inverse_count;
  int first_row, end_row, first_column, end_column;  // samples that may fall on the map
};

template <class T>
DCN_DEVICE Bin<Accum<T>> make_bin(const RoIArgs<T>& args, int index) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int bins = static_cast<int>(s.bins());
  const int roi = index / bins, i = index - roi * bins;
  const A* const box = args.rois + static_cast<int64_t>(roi) * 5;
  Bin<A> bin = {};
  const bool inside = is_batch_index(box[0], s.batch);
  bin.image = inside ? static_cast<int64_t>(box[0]) : 0;
  bin.row = i / static_cast<int>(s.out_width), bin.column = i % static_cast<int>(s.out_width);
  const A scale = static_cast<A>(s.spatial_scale);
  bin.y = roi_axis(box[2], box[4], scale, s.out_height, s.sampling_ratio);
  bin.x = roi_axis(box[1], box[3], scale, s.out_width, s.sampling_ratio);
  const A gamma = static_cast<A>(s.gamma);
  bin.shift_x = args.offset ? gamma * bin.x.length * to_accum(args.offset[2 * static_cast<int64_t>(index) - i]) : A(0);
  bin.shift_y =
      args.offset ? gamma * bin.y.length * to_accum(args.offset[2 * static_cast<int64_t>(index) - i + bins]) : A(0);
  bin.mask = args.mask ? to_accum(args.mask[index]) : A(1);
  const A count = bin.y.samples * bin.x.samples;
  bin.inverse_count = A(1) / (count > A(1) ? count : A(1));
  if (inside) {
    const SampleRange rows = samples_near_map(bin.y, bin.row, bin.shift_y, static_cast<int32_t>(s.height));
    const SampleRange columns = samples_near_map(bin.x, bin.column, bin.shift_x, static_cast<int32_t>(s.width));
    bin.first_row = static_cast<int>(rows.begin), bin.end_row = static_cast<int>(rows.end);
    bin.first_column = static_cast<int>(columns.begin), bin.end_column = static_cast<int>(columns.end);
  }
  return bin;
}

// body(sample) for every sample of the bin on the map.
template <class A, class Body>
DCN_DEVICE void for_each_sample(const DeformRoIAlignShape& s, const Bin<A>& bin, const Body& body) {
  const int32_t height = static_cast<int32_t>(s.height), width = static_cast<int32_t>(s.width);
  for (int i = bin.first_row; i < bin.end_row; ++i) {
    const auto y = locate_clamped(sample_position(bin.y, bin.row, bin.shift_y, static_cast<A>(i)), height);
    if (y.low < 0) continue;
    for (int j = bin.first_column; j < bin.end_column; ++j) {
      const auto x = locate_clamped(sample_position(bin.x, bin.column, bin.shift_x, static_cast<A>(j)), width);
      if (x.low >= 0) body(make_sample(y, x, width));
    }
  }
}

// A bin's sums, over samples and channels, of the gradients of a sample's position and mask.
template <class A>
struct BinSums {
  A y, x, mask;

  __device__ void add(const Sample<A>& at, const A dot[4]) {
    const auto grad = sampling_gradient(at, dot, A(1));
    y += grad.y, x += grad.x, mask += grad.mask;
  }
};

template <class T>
DCN_DEVICE void store_sampling_gradients(const RoIArgs<T>& args, const Bin<Accum<T>>& bin,
                                         const BinSums<Accum<T>>& sums, int index) {
  const int bins = static_cast<int>(args.shape.bins());
  const int64_t to = 2 * static_cast<int64_t>(index) - index % bins;
  if (args.grad_offset) {
    const Accum<T> scale = bin.mask * bin.inverse_count * static_cast<Accum<T>>(args.shape.gamma);
    args.grad_offset[to] = round_to<T>(scale * bin.x.length * sums.x);
    args.grad_offset[to + bins] = round_to<T>(scale * bin.y.length * sums.y);
  }
  if (args.grad_mask) args.grad_mask[index] = round_to<T>(bin.inverse_count * sums.mask);
}

// ---- Channels last

template <class T, int V>
__global__ void __launch_bounds__(kRoIThreads, 1) roi_forward_channels_last(RoIArgs<T> args) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int lane = threadIdx.x % 32, channels = static_cast<int>(s.channels);
  for (int64_t row = thread_index() / 32; row < args.rows(); row += thread_count() / 32) {
    const int index = static_cast<int>(row);
    const Bin<A> bin = make_bin(args, index);
    const A scale = bin.mask * bin.inverse_count;
    for (int c = lane * V; c < channels; c += 32 * V) {
      const T* const map = args.input + bin.image * s.height * s.width * s.channels + c;
      Vec<A, V> sum = {};
      for_each_sample(s, bin, [&](const Sample<A>& at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto value = load<V>(map + at.pixel[i] * s.channels);
#pragma unroll
          for (int v = 0; v < V; ++v) sum.lane[v] += at.weight[i] * to_accum(value.lane[v]);
        }
      });
      Vec<T, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.lane[v] = round_to<T>(scale * sum.lane[v]);
      store(args.output + static_cast<int64_t>(index) * s.channels + c, out);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kRoIThreads, 1) roi_backward_channels_last(RoIArgs<T> args) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int lane = threadIdx.x % 32, channels = static_cast<int>(s.channels);
  for (int64_t row = thread_index() / 32; row < args.rows(); row += thread_count() / 32) {
    const int index = static_cast<int>(row);
    const Bin<A> bin = make_bin(args, index);
    const A scale = bin.mask * bin.inverse_count;
    BinSums<A> sums = {};
    for (int c = lane * V; c < channels; c += 32 * V) {
      const int64_t start = bin.image * s.height * s.width * s.channels + c;
      const auto grad = load<V>(args.grad_output + static_cast<int64_t>(index) * s.channels + c);
      for_each_sample(s, bin, [&](const Sample<A>& at) {
        A dot[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t pixel = start + at.pixel[i] * s.channels;
          const auto value = load<V>(args.input + pixel);
          Vec<A, V> contribution;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A g = to_accum(grad.lane[v]);
            dot[i] += g * to_accum(value.lane[v]);
            contribution.lane[v] = scale * at.weight[i] * g;
          }
          if (args.grad_input) atomic_add(args.grad_input + pixel, contribution);
        }
        sums.add(at, dot);
      });
    }
    sums = {warp_sum(sums.y), warp_sum(sums.x), warp_sum(sums.mask)};
    if (lane == 0) store_sampling_gradients(args, bin, sums, index);
  }
}

// grad_input without atomics, bitwise repeatable: a warp owns 32 channels, one a lane, of a band of an image's map
// rows, and adds what falls there in order of bins and samples. The lanes search for such bins in parallel, one bin a
// lane.
template <class T>
__global__ void __launch_bounds__(kRoIThreads, 1) roi_scatter_in_order(RoIArgs<T> args, int band_rows) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int lane = threadIdx.x % 32;
  const int bands = (static_cast<int>(s.height) + band_rows - 1) / band_rows;
  const int slabs = (static_cast<int>(s.channels) + 31) / 32;
  const int task = static_cast<int>(thread_index() / 32);
  if (task >= s.batch * slabs * bands) return;  // all lanes of the warp together
  const int band = task % bands, slab = task / bands % slabs, image = task / bands / slabs;
  const int channel = slab * 32 + lane;
  const int32_t first_row = band * band_rows, end_row = first_row + band_rows;
  const int32_t begin = first_row * static_cast<int32_t>(s.width);
  const int64_t end = static_cast<int64_t>(end_row) * s.width;
  A* const map = args.grad_input + static_cast<int64_t>(image) * s.height * s.width * s.channels + channel;
  for (int first = 0; first < args.rows(); first += 32) {
    bool hit = false;
    if (first + lane < args.rows()) {
      const Bin<A> bin = make_bin(args, first + lane);
      for (int i = bin.first_row; bin.image == image && i < bin.end_row; ++i) {
        const auto y = locate_clamped(sample_position(bin.y, bin.row, bin.shift_y, static_cast<A>(i)),
                                      static_cast<int32_t>(s.height));
        hit |= y.high >= first_row && y.low < end_row;
      }
    }
    for (unsigned hits = __ballot_sync(kFullWarp, hit); hits; hits &= hits - 1) {
      const int index = first + __ffs(hits) - 1;
      const Bin<A> bin = make_bin(args, index);
      if (channel >= s.channels) continue;
      const A grad =
          bin.mask * bin.inverse_count * to_accum(args.grad_output[static_cast<int64_t>(index) * s.channels + channel]);
      for_each_sample(s, bin, [&](const Sample<A>& at) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at.pixel[i] >= begin && at.pixel[i] < end) map[at.pixel[i] * s.channels] += at.weight[i] * grad;
      });
    }
  }
}

// ---- Channels first

template <class T>
__global__ void __launch_bounds__(kRoIThreads, 1) roi_forward_channels_first(RoIArgs<T> args) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int index = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
  if (index >= args.rows()) return;
  const Bin<A> bin = make_bin(args, index);
  const int bins = static_cast<int>(s.bins());
  const int64_t pixels = s.height * s.width, roi = index / bins;
  const A scale = bin.mask * bin.inverse_count;
  const int step = kPlanarChannels * kRoIWarps;
  for (int64_t c = threadIdx.x / 32 * kPlanarChannels; c < s.channels; c += step) {
    const T* const map = args.input + (bin.image * s.channels + c) * pixels;
    const int count = static_cast<int>(s.channels - c < kPlanarChannels ? s.channels - c : kPlanarChannels);
    A sum[kPlanarChannels] = {};
    for_each_sample(s, bin, [&](const Sample<A>& at) {
#pragma unroll
      for (int k = 0; k < kPlanarChannels; ++k) {
        if (k >= count) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[k] += at.weight[i] * to_accum(map[k * pixels + at.pixel[i]]);
      }
    });
#pragma unroll
    for (int k = 0; k < kPlanarChannels; ++k)
      if (k < count) args.output[(roi * s.channels + c + k) * bins + index - roi * bins] = round_to<T>(scale * sum[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(kRoIThreads, 1) roi_backward_channels_first(RoIArgs<T> args) {
  using A = Accum<T>;
  const DeformRoIAlignShape& s = args.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int index = static_cast<int>(blockIdx.x * 32 + lane);
  const bool valid = index < args.rows();
  const Bin<A> bin = make_bin(args, valid ? index : 0);
  const int bins = static_cast<int>(s.bins());
  const int64_t pixels = s.height * s.width, roi = index / bins;
  const A scale = bin.mask * bin.inverse_count;
  const int step = kPlanarChannels * kRoIWarps;
  BinSums<A> sums = {};
  for (int64_t c = warp * kPlanarChannels; valid && c < s.channels; c += step) {
    const int64_t start = (bin.image * s.channels + c) * pixels;
    const int count = static_cast<int>(s.channels - c < kPlanarChannels ? s.channels - c : kPlanarChannels);
    A grad[kPlanarChannels];
#pragma unroll
    for (int k = 0; k < kPlanarChannels; ++k)
      grad[k] = k < count ? to_accum(args.grad_output[(roi * s.channels + c + k) * bins + index - roi * bins]) : A(0);
    for_each_sample(s, bin, [&](const Sample<A>& at) {
      A dot[4] = {};
#pragma unroll
      for (int k = 0; k < kPlanarChannels; ++k) {
        if (k >= count) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t pixel = start + k * pixels + at.pixel[i];
          dot[i] += grad[k] * to_accum(args.input[pixel]);
          if (args.grad_input) atomic_add(args.grad_input + pixel, scale * at.weight[i] * grad[k]);
        }
      }
      sums.add(at, dot);
    });
  }
  DCN_SHARED(A, partials, [kRoIWarps][3][32]);
  partials[warp][0][lane] = sums.y, partials[warp][1][lane] = sums.x, partials[warp][2][lane] = sums.mask;
  __syncthreads();
  if (warp > 0 || !valid) return;
  for (int other = 1; other < kRoIWarps; ++other)
    sums.y += partials[other][0][lane], sums.x += partials[other][1][lane], sums.mask += partials[other][2][lane];
  store_sampling_gradients(args, bin, sums, index);
}

}  // namespace dcn::cuda
