#include "../ms_deform_attn_kernels.h"

#include "arena.h"
#include "vec.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

constexpr int64_t kBlockSamples = 64;  // of a block of queries in the backward: their table stays in L1

// Where samples fall, and what they weigh.
template <class T>
struct SampleTable {
  SampleTable(int64_t samples, Arena& arena) {
    for (auto& p : pixel) p = arena.allocate<int32_t>(samples);
    for (auto& w : weight) w = arena.allocate<T>(samples);
    frac_y = arena.allocate<T>(samples);
    frac_x = arena.allocate<T>(samples);
  }
  int32_t* pixel[4];  // -1 outside the map
  T* weight[4];       // bilinear times attention
  T* frac_y;
  T* frac_x;
};

// Fills the table from locations (count, 2), weights (count), and the level of each sample.
template <class T>
void locate(int64_t count, const T* location, const T* weight, const int32_t* height, const int32_t* width,
            const SampleTable<T>& table) {
  const SampleTable<T> to = table;  // a local copy, so that the compiler knows its pointers to be constant
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const auto sample =
        make_sample(locate_share(location[2 * i + 1], height[i]), locate_share(location[2 * i], width[i]), width[i]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      to.pixel[k][i] = sample.pixel[k];
      to.weight[k][i] = sample.weight[k] * weight[i];
    }
    to.frac_y[i] = sample.frac_y;
    to.frac_x[i] = sample.frac_x;
  }
}

// Pointers to the table's pixels, `stride` apart from where each sample's map starts; to `outside` for those outside
// the map. (Choosing here, where it is vectorised, and not where they are read: a branch there is
// often mispredicted, and nothing is read ahead of it.)
template <class T, class Element>
inline void point(const SampleTable<T>& table, int64_t count, Element* maps, const int64_t* start, int64_t stride,
                  Element* outside, Element** const pointers[4]) {
  for (int k = 0; k < 4; ++k) {
    const int32_t* pixel = table.pixel[k];
    Element** to = pointers[k];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      Element* const inside = maps + start[i] + pixel[i] * stride;
      to[i] = pixel[i] < 0 ? outside : inside;
    }
  }
}

// `count` elements that will be read, or written, soon. (Rows of one head lie too far apart for the processor to
// guess.)
template <bool kWrite = false, class T>
inline void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, kWrite);
}

template <class T>
inline void copy(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T, class Element>
inline void copy(AttnWeights<const T, const Element> from, int64_t start, int64_t count, T* to) {
  if (from.wide) return copy(from.wide + start, count, to);
  if constexpr (!std::is_same_v<Element, T>)
    for_each_vector<T>(count, [&](int64_t v, int64_t lanes) {
      store(to + v * kLanes<T>, load(from.narrow + start + v * kLanes<T>, lanes), lanes);
    });
}

template <class T, class Element>
inline void copy(const T* from, int64_t count, AttnWeights<T, Element> to, int64_t start) {
  if (to.wide) return copy(from, count, to.wide + start);
  if constexpr (!std::is_same_v<Element, T>)
    for_each_vector<T>(count, [&](int64_t v, int64_t lanes) {
      store(to.narrow + start + v * kLanes<T>, load(from + v * kLanes<T>, lanes), lanes);
    });
}

// Calls visit<Vectors>(channel, lanes) for vectors of channels, several at once where there are enough: each has
// kLanes lanes, but for a last, partial one.
template <class T, class Visit>
inline void for_each_channels(int64_t channels, Visit visit) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) visit.template operator()<4>(c, L);
  if (c + 2 * L <= channels) visit.template operator()<2>(c, L), c += 2 * L;
  for (; c < channels; c += L) visit.template operator()<1>(c, lesser(L, channels - c));
}

template <class T, class Element>
struct ForwardScratch {
  ForwardScratch(const AttnForward<T, Element>& args, Arena arena)
      : table(args.shape.heads * args.shape.samples(), arena) {
    for (auto& p : pixel) p = arena.allocate<const Element*>(args.shape.heads * args.shape.samples());
    weights = arena.allocate<T>(args.weights.wide ? 0 : args.shape.heads * args.shape.samples());
    outside = arena.allocate<Element>(args.shape.channels);
    bytes = arena.used();
  }
  SampleTable<T> table;  // of a query, (heads, levels, points)
  const Element** pixel[4];
  T* weights;
  Element* outside;  // a pixel of zeros
  int64_t bytes;
};

template <class T, class Element>
int64_t forward_scratch_bytes(const AttnForward<T, Element>& args) {
  return ForwardScratch<T, Element>(args, Arena(nullptr)).bytes;
}

// The weighted sum of samples [begin, end) of the table.
template <class T, int Vectors, class Element>
inline void attend(const ForwardScratch<T, Element>& scratch, int64_t begin, int64_t end, int64_t channel,
                   int64_t lanes, Element* out) {
  constexpr int kChains = Vectors == 4 ? 2 : 4;     // of additions, which would wait for each other in one
  const ForwardScratch<T, Element> from = scratch;  // a local copy, as in locate
  Vec<T> sums[kChains][Vectors] = {};
  for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Element* pixel = from.pixel[k][i] + channel;
      const T weight = from.table.weight[k][i];
      Vec<T> value[Vectors];
      load_many(pixel, lanes, value);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[k % kChains][v] += weight * value[v];
    }
  }
#pragma GCC unroll 4
  for (int chain = 1; chain < kChains; ++chain)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums[0][v] += sums[chain][v];
  store_many(out, sums[0], lanes);
}

template <class T, class Element>
void forward(const AttnForward<T, Element>& args, int64_t image, int64_t first_query, int64_t queries, void* memory) {
  const MSDeformAttnShape& s = args.shape;
  const ForwardScratch<T, Element> scratch(args, Arena(memory));
  for (int64_t c = 0; c < s.channels; ++c) scratch.outside[c] = Element{};
  const int64_t samples = s.samples(), stride = s.pixel_stride(), count = s.heads * samples;
  const Element* maps = args.value + image * s.keys * stride;
  for (int64_t query = image * s.queries + first_query, end = query + queries; query < end; ++query) {
    const T* weights = args.weights.wide + query * count;
    if (!args.weights.wide) copy(args.weights, query * count, count, scratch.weights), weights = scratch.weights;
    locate(count, args.locations + 2 * query * count, weights, args.height, args.width, scratch.table);
    point<T, const Element>(scratch.table, count, maps, args.start, stride, scratch.outside, scratch.pixel);
    for (int64_t head = 0; head < s.heads; ++head) {
      Element* out = args.output + query * stride + head * s.channels;
      for_each_channels<T>(s.channels, [&]<int Vectors>(int64_t channel, int64_t lanes) {
        attend<T, Vectors>(scratch, head * samples, (head + 1) * samples, channel, lanes, out + channel);
      });
    }
  }
}

template <class T, class Element>
struct BackwardScratch {
  BackwardScratch(const AttnBackward<T, Element>& args, LevelRange range, Arena arena)
      : samples((range.end - range.begin) * args.shape.points),
        queries(divide_up(kBlockSamples, samples > 0 ? samples : 1)),
        rows(divide_up(queries * samples, kLanes<T>) * kLanes<T>),
        channels(divide_up(args.shape.channels, kLanes<T>) * kLanes<T>),
        table(rows, arena) {
    locations = arena.allocate<T>(2 * rows);
    weights = arena.allocate<T>(rows);
    height = arena.allocate<int32_t>(rows);
    width = arena.allocate<int32_t>(rows);
    start = arena.allocate<int64_t>(rows);
    grad_start = arena.allocate<int64_t>(rows);
    for (auto& p : pixel) p = arena.allocate<const Element*>(args.grad_locations ? rows : 0);
    for (auto& p : grad_pixel) p = arena.allocate<T*>(args.grad_value ? rows : 0);
    dots = arena.allocate<T>(args.grad_locations ? 4 * rows * kLanes<T> : 0);
    outside = arena.allocate<Element>(args.shape.channels);
    unused = arena.allocate<T>(channels);
    grad_map = arena.allocate<T>(args.grad_value ? range.pixels(args.levels) * channels : 0);
    bytes = arena.used();
  }
  int64_t samples;                  // of a query
  int64_t queries, rows, channels;  // of a block, and its samples; channels are padded to whole vectors
  SampleTable<T> table;             // of a block, (queries, samples)
  T* locations;
  T* weights;
  int32_t* height;  // of each sample's map
  int32_t* width;
  int64_t* start;       // where it begins among an image's values
  int64_t* grad_start;  // and in grad_map
  const Element** pixel[4];
  T** grad_pixel[4];
  T* dots;           // (4, rows) vectors: for sampling_gradient, before the sum over lanes
  Element* outside;  // a pixel of zeros
  T* unused;         // what takes the gradients of pixels outside the map
  T* grad_map;       // (pixels of the levels, channels)
  int64_t bytes;
};

template <class T, class Element>
int64_t backward_scratch_bytes(const AttnBackward<T, Element>& args, LevelRange range) {
  return BackwardScratch<T, Element>(args, range, Arena(nullptr)).bytes;
}

// For `Vectors` vectors of the channels of a block's queries: adds to grad_map and to dots.
template <class T, int Vectors, bool kValue, bool kSampling, class Element>
inline void scatter(const BackwardScratch<T, Element>& scratch, int64_t queries, const Element* grad, int64_t stride,
                    int64_t channel, int64_t lanes) {
  constexpr int L = kLanes<T>;
  const BackwardScratch<T, Element> to = scratch;  // a local copy, as in locate
  int64_t i = 0;
  for (int64_t query = 0; query < queries; ++query) {
    Vec<T> g[Vectors];
    load_many(grad + query * stride + channel, lanes, g);
    for (int64_t p = 0; p < to.samples; ++p, ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (kSampling) {
          const Element* from = to.pixel[k][i] + channel;
          T* dot = to.dots + (k * to.rows + i) * L;
          Vec<T> value[Vectors];
          load_many(from, lanes, value);
          Vec<T> total = g[0] * value[0];
#pragma GCC unroll 4
          for (int v = 1; v < Vectors; ++v) total += g[v] * value[v];
          store(dot, channel == 0 ? total : load(dot) + total);
        }
        if (kValue) {
          T* sums = to.grad_pixel[k][i] + channel;
          const T weight = to.table.weight[k][i];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) store(sums + v * L, load(sums + v * L) + weight * g[v]);
        }
      }
    }
  }
}

// The gradients of a block's locations, (count, 2), and weights, in place of these.
template <class T, class Element>
void sampling_gradients(const BackwardScratch<T, Element>& scratch, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  const BackwardScratch<T, Element> from = scratch;  // a local copy, as in locate
  T* dot[4];
  for (int k = 0; k < 4; ++k) {
    dot[k] = from.dots + k * from.rows * L;
    for (int64_t i = 0; i < count; i += L) store(dot[k] + i, sums(dot[k] + i * L));
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    // Only the weights, without attention's, and the fractions are needed here, not the pixels.
    const auto sample = make_sample<T>({0, 0, from.table.frac_y[i]}, {0, 0, from.table.frac_x[i]}, 0);
    const T dots[4] = {dot[0][i], dot[1][i], dot[2][i], dot[3][i]};
    const auto gradient = sampling_gradient(sample, dots, from.weights[i]);
    from.locations[2 * i] = gradient.x * T(from.width[i]);
    from.locations[2 * i + 1] = gradient.y * T(from.height[i]);
    from.weights[i] = gradient.mask;
  }
}

template <class T, bool kValue, bool kSampling, class Element>
void backward(const AttnBackward<T, Element>& args, int64_t image, int64_t head, LevelRange range, void* memory) {
  const MSDeformAttnShape& s = args.shape;
  const BackwardScratch<T, Element> scratch(args, range, Arena(memory));
  const int64_t stride = s.pixel_stride(), pixels = range.pixels(args.levels);
  const int64_t first_pixel = range.begin < range.end ? args.levels[range.begin].start : 0;
  const int64_t map = image * s.keys * stride + head * s.channels;
  for (int64_t c = 0; c < s.channels; ++c) scratch.outside[c] = Element{};
  for (int64_t c = 0; c < scratch.channels; ++c) scratch.unused[c] = T(0);
  for (int64_t c = 0; kValue && c < pixels * scratch.channels; ++c) scratch.grad_map[c] = T(0);
  for (int64_t i = 0; i < scratch.queries * scratch.samples; ++i) {
    const Level level = args.levels[range.begin + i % scratch.samples / s.points];
    scratch.height[i] = level.height;
    scratch.width[i] = level.width;
    scratch.start[i] = level.start * stride;
    scratch.grad_start[i] = (level.start - first_pixel) * scratch.channels;
  }
  for (int64_t begin = 0; begin < s.queries; begin += scratch.queries) {
    const int64_t queries = lesser(scratch.queries, s.queries - begin), count = queries * scratch.samples;
    const int64_t query = image * s.queries + begin;
    const auto first_sample = [&](int64_t q) {
      return (((query + q) * s.heads + head) * s.levels + range.begin) * s.points;
    };
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t next = first_sample(q + scratch.queries);
      prefetch(args.locations + 2 * next, 2 * scratch.samples);
      if (args.weights.wide) prefetch(args.weights.wide + next, scratch.samples);
      prefetch(args.grad_output + (query + q + scratch.queries) * stride + head * s.channels, s.channels);
      if (kSampling) {
        prefetch<true>(args.grad_locations + 2 * next, 2 * scratch.samples);
        if (args.grad_weights.wide) prefetch<true>(args.grad_weights.wide + next, scratch.samples);
      }
      copy(args.locations + 2 * first_sample(q), 2 * scratch.samples, scratch.locations + 2 * q * scratch.samples);
      copy(args.weights, first_sample(q), scratch.samples, scratch.weights + q * scratch.samples);
    }
    locate(count, scratch.locations, scratch.weights, scratch.height, scratch.width, scratch.table);
    if (kSampling)
      point<T, const Element>(scratch.table, count, args.value + map, scratch.start, stride, scratch.outside,
                              scratch.pixel);
    if (kValue)
      point<T, T>(scratch.table, count, scratch.grad_map, scratch.grad_start, scratch.channels, scratch.unused,
                  scratch.grad_pixel);
    const Element* grad = args.grad_output + query * stride + head * s.channels;
    for_each_channels<T>(s.channels, [&]<int Vectors>(int64_t channel, int64_t lanes) {
      scatter<T, Vectors, kValue, kSampling>(scratch, queries, grad, stride, channel, lanes);
    });
    if (!kSampling) continue;
    sampling_gradients(scratch, count);
    for (int64_t q = 0; q < queries; ++q) {
      copy(scratch.locations + 2 * q * scratch.samples, 2 * scratch.samples, args.grad_locations + 2 * first_sample(q));
      copy(scratch.weights + q * scratch.samples, scratch.samples, args.grad_weights, first_sample(q));
    }
  }
  for (int64_t pixel = 0; kValue && pixel < pixels; ++pixel)
    for_each_channels<T>(s.channels, [&]<int Vectors>(int64_t channel, int64_t lanes) {
      Vec<T> sums[Vectors];
      load_many<Vectors, T>(scratch.grad_map + pixel * scratch.channels + channel, kLanes<T>, sums);
      store_many(args.grad_value + map + (first_pixel + pixel) * stride + channel, sums, lanes);
    });
}

template <class T, class Element>
void backward(const AttnBackward<T, Element>& args, int64_t image, int64_t head, LevelRange range, void* memory) {
  if (!args.grad_value)
    backward<T, false, true>(args, image, head, range, memory);
  else if (!args.grad_locations)
    backward<T, true, false>(args, image, head, range, memory);
  else
    backward<T, true, true>(args, image, head, range, memory);
}

template <class T, class Element>
AttnFunctions<T, Element> functions() {
  return {forward_scratch_bytes<T, Element>, forward<T, Element>, backward_scratch_bytes<T, Element>,
          backward<T, Element>};
}

}  // namespace

template <class T>
MSDeformAttnKernels<T> ms_deform_attn_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return {functions<T, T>(), functions<T, Bfloat16>()};
  else
    return {functions<T, T>(), {}};
}
template MSDeformAttnKernels<float> ms_deform_attn_kernels();
template MSDeformAttnKernels<double> ms_deform_attn_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
