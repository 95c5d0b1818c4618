// The three GEMMs of the column path (deform_conv2d_columns.cuh has the columns' layout): PyTorch's matrix products,
// written directly into their outputs.
#pragma once
#include <array>

#include "deform_conv2d_columns.cuh"

namespace dcn::cuda {

// out = a b, for matrices or batches of them.
inline void matmul_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(out.dim() == 2 ? "aten::mm" : "aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the handle
}

// A batch of matrices in a tensor's memory.
struct Matrices {
  const Tensor& tensor;
  int64_t offset, batch_stride, row_stride, column_stride;

  Matrices transposed() const { return {tensor, offset, batch_stride, column_stride, row_stride}; }
  Tensor of(int64_t batch, int64_t rows, int64_t columns) const {
    if (batch == 1) return view(tensor, {rows, columns}, {row_stride, column_stride}, offset);
    return view(tensor, {batch, rows, columns}, {batch_stride, row_stride, column_stride}, offset);
  }
  Matrices moved(int64_t by) const { return {tensor, offset + by, batch_stride, row_stride, column_stride}; }
};

// out (batch, m, n) = a (batch, m, k) b (batch, k, n)
inline void multiply(int64_t batch, int64_t m, int64_t k, int64_t n, const Matrices& out, const Matrices& a,
                     const Matrices& b) {
  matmul_into(out.of(batch, m, n), a.of(batch, m, k), b.of(batch, k, n));
}

// The operands for a chunk. Channels last, each matrix has a row for each row of the chunk, and the batch is the
// groups. Channels first, each image has matrices of its own, in which positions are columns, and the batch is the
// images, or, for each image in turn, its groups.
struct Operands {
  Operands(const DeformConv2dShape& s, const Chunk& chunk, bool channels_last)
      : depth(s.group_channels() * s.taps()), group_out_channels(s.group_out_channels()) {
    if (channels_last) {
      batch = s.groups, repeats = 1, rows = chunk.rows();
      column_strides = {depth, s.groups * depth, 1};
      output_strides = {group_out_channels, s.out_channels, 1};
      output_offset = (chunk.first_image * s.positions() + chunk.first_position) * s.out_channels;
      return;
    }
    const bool by_image = s.groups == 1;
    batch = by_image ? chunk.images : s.groups, repeats = by_image ? 1 : chunk.images, rows = chunk.span;
    column_strides = {depth * rows, 1, rows};
    output_strides = {group_out_channels * s.positions(), 1, s.positions()};
    output_offset = chunk.first_image * s.out_channels * s.positions() + chunk.first_position;
    column_repeat = s.channels * s.taps() * rows, output_repeat = s.out_channels * s.positions();
    same_weight = by_image;
  }

  Matrices columns(const Tensor& t, int64_t repeat) const {  // (rows, depth)
    return {t, repeat * column_repeat, column_strides[0], column_strides[1], column_strides[2]};
  }
  Matrices output(const Tensor& t, int64_t repeat) const {  // (rows, group_out_channels)
    return {t, output_offset + repeat * output_repeat, output_strides[0], output_strides[1], output_strides[2]};
  }
  Matrices weight(const Tensor& t) const {  // (group_out_channels, depth)
    return {t, 0, same_weight ? 0 : group_out_channels * depth, depth, 1};
  }

  int64_t depth, group_out_channels, batch, repeats, rows;
  std::array<int64_t, 3> column_strides, output_strides;
  int64_t output_offset, column_repeat = 0, output_repeat = 0;
  bool same_weight = false;
};

inline void product_output(const DeformConv2dShape& s, const Chunk& chunk, bool channels_last, const Tensor& weight,
                           const Tensor& columns, const Tensor& output) {
  const Operands o(s, chunk, channels_last);
  for (int64_t i = 0; i < o.repeats; ++i) {
    if (channels_last)
      multiply(o.batch, o.rows, o.depth, o.group_out_channels, o.output(output, i), o.columns(columns, i),
               o.weight(weight).transposed());
    else
      multiply(o.batch, o.group_out_channels, o.depth, o.rows, o.output(output, i).transposed(), o.weight(weight),
               o.columns(columns, i).transposed());
  }
}

inline void product_grad_columns(const DeformConv2dShape& s, const Chunk& chunk, bool channels_last,
                                 const Tensor& weight, const Tensor& grad_output, const Tensor& columns) {
  const Operands o(s, chunk, channels_last);
  for (int64_t i = 0; i < o.repeats; ++i) {
    if (channels_last)
      multiply(o.batch, o.rows, o.group_out_channels, o.depth, o.columns(columns, i), o.output(grad_output, i),
               o.weight(weight));
    else
      multiply(o.batch, o.depth, o.group_out_channels, o.rows, o.columns(columns, i).transposed(),
               o.weight(weight).transposed(), o.output(grad_output, i).transposed());
  }
}

// Calls `add` each time `addend` holds the gradient of some rows.
template <class Add>
void product_grad_weight(const DeformConv2dShape& s, const Chunk& chunk, bool channels_last, const Tensor& grad_output,
                         const Tensor& columns, const Tensor& addend, const Add& add) {
  const Operands o(s, chunk, channels_last);
  // The gradient is the sum over a batch of images.
  const int64_t images = o.same_weight ? o.batch : 1, batch = o.same_weight ? 1 : o.batch;
  for (int64_t i = 0; i < o.repeats; ++i)
    for (int64_t image = 0; image < images; ++image) {
      const Matrices grad = o.output(grad_output, i).moved(image * o.output_strides[0]);
      const Matrices samples = o.columns(columns, i).moved(image * o.column_strides[0]);
      multiply(batch, o.group_out_channels, o.rows, o.depth, o.weight(addend), grad.transposed(), samples);
      add();
    }
}

}  // namespace dcn::cuda
