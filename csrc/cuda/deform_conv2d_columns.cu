// The drivers of deformable convolution by columns.
#include "columns_product.h"
#include "deform_conv2d_columns_depthwise.cuh"
#include "deform_conv2d_launch.h"
#include "elementwise.cuh"

namespace dcn::cuda {
namespace {

// The most memory for columns. The tests make it small.
#ifndef DCN_CHUNK_BYTES
#define DCN_CHUNK_BYTES (64 << 20)
#endif
constexpr int64_t kChunkBytes = DCN_CHUNK_BYTES;

// Whether a lane can take 16 bytes of channels at once, which must be neighbours in input and columns.
template <class T>
bool samples_vectors(const ConvTensors& t) {
  return (t.shape.group_channels() == 1 || supports_vectors<T>(t.input, t.shape.group_channels())) &&
         supports_vectors<T>(t.input, t.shape.deform_group_channels());
}

dim3 tiles_of(const DeformConv2dShape& s, const Chunk& chunk, int64_t tile_deform_taps) {
  const int64_t blocks = divide_up(chunk.rows(), kTileRows) * divide_up(s.deform_groups * s.taps(), tile_deform_taps);
  check(blocks <= INT32_MAX, "weight has too many taps for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

template <class T>
void launch_sample(const DeviceScope& device, const ColumnsArgs<T>& args, bool channels_last, bool vectors) {
  if (!channels_last)
    device.launch(sample_channels_first<T>, {tiles_of(args.shape, args.chunk, 1), kColumnThreads}, args);
  else
    device.launch(vectors ? sample_channels_last<T, 16 / sizeof(T)> : sample_channels_last<T, 1>,
                  {tiles_of(args.shape, args.chunk, kTileDeformTaps), kColumnThreads}, args);
}

template <class T>
void launch_scatter(const DeviceScope& device, const ColumnsArgs<T>& args, bool channels_last, bool vectors) {
  if (!channels_last)
    return device.launch(scatter_channels_first<T>, {tiles_of(args.shape, args.chunk, 1), kColumnThreads}, args);
  const int64_t items = args.shape.deform_group_channels() / (vectors ? 16 / sizeof(T) : 1);
  int lanes = 1;
  while (lanes < 32 && lanes < items) lanes *= 2;
  device.launch(vectors ? scatter_channels_last<T, 16 / sizeof(T)> : scatter_channels_last<T, 1>,
                {tiles_of(args.shape, args.chunk, kTileDeformTaps), kColumnThreads}, args, lanes);
}

template <class T>
void launch_in_order(const DeviceScope& device, const ColumnsArgs<T>& args) {
  constexpr int64_t kBandRows = 4, kWarps = kColumnThreads / 32;
  const int64_t warps =
      args.chunk.images * divide_up(args.shape.channels, 32) * divide_up(args.shape.height, kBandRows);
  device.launch(scatter_in_order<T>, {blocks_for(warps, kWarps), kColumnThreads}, args, static_cast<int>(kBandRows));
}

// Divides the batch: several images a chunk where one image fits, else equal parts of one.
class Chunks {
 public:
  Chunks(const DeformConv2dShape& s, int64_t element_bytes) : shape_(s) {
    const int64_t row_bytes = s.channels * s.taps() * element_bytes;
    const int64_t rows = std::max<int64_t>(kTileRows, kChunkBytes / row_bytes), positions = s.positions();
    parts_ = divide_up(positions, rows);
    span_ = divide_up(positions, parts_);
    images_ = parts_ > 1 ? 1 : std::min(s.batch, rows / positions);
  }
  int64_t most_images() const { return images_; }
  int64_t most_rows() const { return images_ * span_; }

  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t image = 0; image < shape_.batch; image += images_)
      for (int64_t first = 0; first < shape_.positions(); first += span_)
        body(Chunk{image, std::min(images_, shape_.batch - image), first, std::min(span_, shape_.positions() - first)});
  }

 private:
  const DeformConv2dShape& shape_;
  int64_t parts_, span_, images_;
};

// The GEMMs: PyTorch's matrix products, or kernels where groups have one input channel.
template <class T>
DepthwiseArgs<T> depthwise_args(const ConvTensors& t, const Chunk& chunk, const Tensor& columns, const Tensor& output) {
  return {t.shape, chunk, t.channels_last, data<T>(columns), data<T>(t.weight), data<T>(output)};
}

template <class T>
void multiply_output(const DeviceScope& device, const ConvTensors& t, const Chunk& chunk, const Tensor& columns,
                     const Tensor& output) {
  const DeformConv2dShape& s = t.shape;
  if (s.group_channels() > 1) return product_output(s, chunk, t.channels_last, t.weight, columns, output);
  device.launch(depthwise_output<T>, {blocks_for(chunk.rows() * s.out_channels, 256), 256},
                depthwise_args<T>(t, chunk, columns, output));
}

template <class T>
void multiply_grad_columns(const DeviceScope& device, const ConvTensors& t, const Chunk& chunk,
                           const Tensor& grad_output, const Tensor& columns) {
  const DeformConv2dShape& s = t.shape;
  if (s.group_channels() > 1) return product_grad_columns(s, chunk, t.channels_last, t.weight, grad_output, columns);
  device.launch(depthwise_grad_columns<T>, {blocks_for(chunk.rows() * s.channels, 256), 256},
                depthwise_args<T>(t, chunk, columns, grad_output));
}

// grad_weight, summed over chunks in order, in Accum<T>.
template <class T>
class WeightGradient {
 public:
  using A = Accum<T>;
  static constexpr int64_t kMostParts = 64, kLeastPartRows = 32;  // depthwise: parts of a chunk's rows

  WeightGradient(const DeviceScope& device, const ConvTensors& t, const std::optional<Tensor>& grad)
      : device_(device),
        t_(t),
        count_(grad ? grad->numel() : 0),
        depthwise_(t.shape.group_channels() == 1),
        grad_(grad ? *grad : empty(t.input, {0}, t.type())),
        total_(std::is_same_v<T, A> ? grad_ : empty(t.input, {count_}, compute_type(t.type()))),
        share_(empty(t.input, {depthwise_ ? kMostParts * count_ : count_},
                     depthwise_ ? compute_type(t.type()) : t.type())) {}

  void add(const Chunk& chunk, const Tensor& grad_output, const Tensor& columns) {
    if (depthwise_) {
      auto args = depthwise_args<T>(t_, chunk, columns, grad_output);
      const int64_t parts = std::clamp<int64_t>(chunk.rows() / kLeastPartRows, 1, kMostParts);
      const int64_t threads = parts * count_ * (t_.channels_last ? 1 : 32);
      device_.launch(depthwise_grad_weight<T>, {blocks_for(threads, 256), 256}, args, data<A>(share_), parts);
      device_.launch(accumulate<A, A>, {blocks_for(count_, 256), 256}, data<A>(total_), data<A>(share_), count_, parts,
                     first_);
      first_ = false;
      return;
    }
    product_grad_weight(t_.shape, chunk, t_.channels_last, grad_output, columns, share_, [&] {
      device_.launch(accumulate<T, A>, {blocks_for(count_, 256), 256}, data<A>(total_), data<T>(share_), count_,
                     int64_t(1), first_);
      first_ = false;
    });
  }

  void finish() {
    if constexpr (!std::is_same_v<T, A>)
      device_.launch(round_sums<T>, {blocks_for(count_, 256), 256}, data<T>(grad_), data<A>(total_), count_);
  }

 private:
  const DeviceScope& device_;
  const ConvTensors& t_;
  int64_t count_;
  bool depthwise_, first_ = true;
  Tensor grad_, total_, share_;
};

template <class T>
void run_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  const DeformConv2dShape& s = t.shape;
  const Chunks chunks(s, sizeof(T));
  const Tensor columns = empty(t.input, {chunks.most_rows() * s.channels * s.taps()}, t.type());
  ColumnsArgs<T> args{s, {}, data<T>(t.input), planes<const T>(t.offset), planes<const T>(t.mask), data<T>(columns)};
  chunks.for_each([&](const Chunk& chunk) {
    args.chunk = chunk;
    launch_sample(device, args, t.channels_last, samples_vectors<T>(t));
    multiply_output<T>(device, t, chunk, columns, output);
  });
  if (t.bias)
    device.launch(add_bias<T>, {blocks_for(output.numel(), 256), 256}, data<T>(output), data<T>(t.bias), output.numel(),
                  t.channels_last ? 1 : s.positions(), s.out_channels);
}

template <class T>
void run_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, bool deterministic,
                  const ConvGradients& grad) {
  using A = Accum<T>;
  const DeformConv2dShape& s = t.shape;
  const bool need_columns = grad.input || grad.offset || grad.mask, vectors = samples_vectors<T>(t);
  const int64_t image_size = s.channels * s.height * s.width;
  const Chunks chunks(s, sizeof(T));
  const Tensor columns = empty(t.input, {chunks.most_rows() * s.channels * s.taps()}, t.type());
  // grad_input is summed in Accum<T>: in place, or a chunk's images at a time in a buffer.
  constexpr bool kSameType = std::is_same_v<T, A>;
  const Tensor sums =
      empty(t.input, {grad.input && !kSameType ? chunks.most_images() * image_size : 0}, compute_type(t.type()));
  WeightGradient<T> grad_weight(device, t, grad.weight);

  ColumnsArgs<T> args{s, {}, data<T>(t.input), planes<const T>(t.offset), planes<const T>(t.mask), data<T>(columns)};
  args.grad_offset = planes<T>(grad.offset), args.grad_mask = planes<T>(grad.mask);
  args.keep_samples = grad.weight.has_value();
  chunks.for_each([&](const Chunk& chunk) {
    args.chunk = chunk;
    const int64_t start = chunk.first_image * image_size, count = chunk.images * image_size;
    if (grad.input) {
      Tensor map = kSameType ? view(*grad.input, {count}, {1}, start) : view(sums, {count}, {1});
      if (chunk.first_position == 0) torch::stable::zero_(map);
      args.grad_input = data<A>(map);
    }
    if (need_columns) {
      multiply_grad_columns<T>(device, t, chunk, grad_output, columns);
      if (deterministic && grad.input) {
        launch_in_order(device, args);
        args.grad_input = nullptr;
      }
      launch_scatter(device, args, t.channels_last, vectors);
    } else {
      launch_sample(device, args, t.channels_last, vectors);
    }
    if (grad.weight) grad_weight.add(chunk, grad_output, columns);
    if constexpr (!kSameType)
      if (grad.input && chunk.first_position + chunk.span == s.positions())
        device.launch(round_sums<T>, {blocks_for(count, 256), 256}, data<T>(grad.input) + start, data<A>(sums), count);
  });
  if (grad.weight) grad_weight.finish();
}

}  // namespace

void columns_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  dispatch(t.type(), [&]<class T>(T) { run_forward<T>(device, t, output); });
}

void columns_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, bool deterministic,
                      const ConvGradients& grad) {
  dispatch(t.type(), [&]<class T>(T) { run_backward<T>(device, t, grad_output, deterministic, grad); });
}

}  // namespace dcn::cuda
