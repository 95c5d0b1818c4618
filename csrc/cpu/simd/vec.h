// Vectors of the instruction set's widest registers. Everything in cpu/simd is compiled once per instruction set
// (setup.py lists them) into a namespace of its own, DCN_ISA, and calls no external inline function of other code
// (inline.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../bfloat16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef DCN_ISA
#error "DCN_ISA names the instruction set a file of cpu/simd is compiled for"
#endif

namespace dcn::cpu::DCN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// GCC and Clang compile operators on these types to vector instructions, and a * b + c to fused multiply-adds.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first `count` lanes, the others zero; nothing past them is touched.
template <class T>
static inline Vec<T> load(const T* p, int64_t count) {
  if (count == kLanes<T>) return load(p);
  Vec<T> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v, int64_t count) {
  if (count == kLanes<T>) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// Calls visit(v, count) for each vector of `width` elements: count is the constant `lanes` but for a last, partial one.
template <class T, class Visit>
static inline void for_each_vector(int64_t width, Visit visit) {
  int64_t v = 0;
  for (; (v + 1) * kLanes<T> <= width; ++v) visit(v, static_cast<int64_t>(kLanes<T>));
  if (v * kLanes<T> < width) visit(v, width - v * kLanes<T>);
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

// GCC makes five instructions of __builtin_convertvector where the processor has one.
static inline FloatBits widen(HalfBits v) {
#if defined(__AVX512F__)
  return (FloatBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (FloatBits)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, FloatBits);
#endif
}

static inline HalfBits narrow(FloatBits v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

static inline Vec<float> load(const Bfloat16* p) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec<float>>(widen(half) << 16);
}

// Rounded to bfloat16, in the upper half of each lane; the lower is undefined.
static inline FloatBits rounded(Vec<float> v) {
  const FloatBits bits = reinterpret_cast<FloatBits>(v);
  const FloatBits quiet_nan = FloatBits{} + 0x7fc00000;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : quiet_nan;
}

static inline HalfBits to_bfloat16(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (HalfBits)_mm512_cvtneps_pbh((__m512)v);
#else
  return narrow(rounded(v) >> 16);
#endif
}

static inline void store(Bfloat16* p, Vec<float> v) {
  const HalfBits half = to_bfloat16(v);
  __builtin_memcpy(p, &half, sizeof(half));
}

// Two vectors of bfloat16 as pairs of a lane's low and high halves, and each half as float.
static inline FloatBits load_bits(const Bfloat16* p) {
  FloatBits both;
  __builtin_memcpy(&both, p, sizeof(both));
  return both;
}

static inline Vec<float> low_halves(FloatBits both) { return reinterpret_cast<Vec<float>>(both << 16); }
static inline Vec<float> high_halves(FloatBits both) { return reinterpret_cast<Vec<float>>(both & 0xffff0000); }

// Rounds and writes pairs, to two places: those of the first half of the lanes and those of the second.
static inline void store_pairs(Bfloat16* first, Bfloat16* second, Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  // For memcpy of its halves GCC would write the vector to the stack and read it back.
  const __m256i halves[2] = {_mm512_maskz_extracti64x4_epi64(0xff, both, 0),
                             _mm512_maskz_extracti64x4_epi64(0xff, both, 1)};
  __builtin_memcpy(first, &halves[0], sizeof(halves[0]));
  __builtin_memcpy(second, &halves[1], sizeof(halves[1]));
#else
  const FloatBits both = widen(to_bfloat16(low)) | widen(to_bfloat16(high)) << 16;
  __builtin_memcpy(first, &both, sizeof(both) / 2);
  __builtin_memcpy(second, reinterpret_cast<const char*>(&both) + sizeof(both) / 2, sizeof(both) / 2);
#endif
}

// Rounds and writes one half of each pair: first the low one (`second` 0), then the high one (1) beside it.
static inline void store_half(Bfloat16* p, Vec<float> v, uint32_t second) {
  const FloatBits both = (load_bits(p) & (0 - second)) | widen(to_bfloat16(v)) << 16 * second;
  __builtin_memcpy(p, &both, sizeof(both));
}

#if defined(__AVX512F__)
// With masks; for these types better matches than the templates above.
static inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

static inline Vec<float> load(const float* p, int64_t count) {
  if (count == kLanes<float>) return load(p);
  return (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(count), p);
}

static inline void store(float* p, Vec<float> v, int64_t count) {
  if (count == kLanes<float>) return store(p, v);
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}

static inline Vec<double> load(const double* p, int64_t count) {
  if (count == kLanes<double>) return load(p);
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p);
}

static inline void store(double* p, Vec<double> v, int64_t count) {
  if (count == kLanes<double>) return store(p, v);
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), (__m512d)v);
}

static inline Vec<float> load(const Bfloat16* p, int64_t count) {
  if (count == kLanes<float>) return load(p);
  const HalfBits half = (HalfBits)_mm256_maskz_loadu_epi16(first_lanes(count), p);
  return reinterpret_cast<Vec<float>>(widen(half) << 16);
}

static inline void store(Bfloat16* p, Vec<float> v, int64_t count) {
  if (count == kLanes<float>) return store(p, v);
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)to_bfloat16(v));
}
#else
static inline Vec<float> load(const Bfloat16* p, int64_t count) {
  if (count == kLanes<float>) return load(p);
  Bfloat16 lanes[kLanes<float>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

static inline void store(Bfloat16* p, Vec<float> v, int64_t count) {
  if (count == kLanes<float>) return store(p, v);
  Bfloat16 lanes[kLanes<float>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
#endif

template <class T>
static inline T sum(Vec<T> v) {
  T lane[kLanes<T>];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Several vectors of elements in a row, in an order that only store_many need know: it is their own but for an even
// number of vectors of Bfloat16, where each two hold the even and the odd elements of their place, which costs less.
template <int Vectors, class T>
static inline void load_many(const T* p, int64_t count, Vec<T> (&v)[Vectors]) {
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) v[i] = load(p + i * kLanes<T>, count);
}

template <int Vectors, class T>
static inline void store_many(T* p, const Vec<T> (&v)[Vectors], int64_t count) {
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) store(p + i * kLanes<T>, v[i], count);
}

template <int Vectors>
static inline void load_many(const Bfloat16* p, int64_t count, Vec<float> (&v)[Vectors]) {
  constexpr int L = kLanes<float>;
  if constexpr (Vectors % 2 == 1) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) v[i] = load(p + i * L, count);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i += 2) {
      FloatBits pairs;
      __builtin_memcpy(&pairs, p + i * L, sizeof(pairs));
      v[i] = reinterpret_cast<Vec<float>>(pairs << 16);
      v[i + 1] = reinterpret_cast<Vec<float>>(pairs & 0xffff0000u);
    }
  }
}

template <int Vectors>
static inline void store_many(Bfloat16* p, const Vec<float> (&v)[Vectors], int64_t count) {
  constexpr int L = kLanes<float>;
  if constexpr (Vectors % 2 == 1) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) store(p + i * L, v[i], count);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; i += 2) {
      const FloatBits pairs = rounded(v[i]) >> 16 | (rounded(v[i + 1]) & 0xffff0000u);
      __builtin_memcpy(p + i * L, &pairs, sizeof(pairs));
    }
  }
}

// Lanes of vectors of L elements: of `a`, and from L on of `b`. (GCC 11 has no __builtin_shufflevector.)
template <int... Lane, class V>
static inline V shuffled(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Lane...);
#else
  using Indices = decltype(a == b);
  return __builtin_shuffle(a, b, Indices{Lane...});
#endif
}

// Every second lane of `a` and then of `b`, from `First` on.
template <class T, int First>
static inline Vec<T> every_second(Vec<T> a, Vec<T> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return shuffled<(First + 2 * I)...>(a, b);
  }(std::make_integer_sequence<int, kLanes<T>>());
}

// The sums of neighbouring lanes: those of a, then those of b.
template <class T>
static inline Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
  return every_second<T, 0>(a, b) + every_second<T, 1>(a, b);
}

// Writes the sums of the lanes of four vectors.
template <class T>
static inline void store_sums(T* p, const Vec<T> v[4]) {
  if constexpr (kLanes<T> == 2) {
    store(p, add_neighbours<T>(v[0], v[1]));
    store(p + 2, add_neighbours<T>(v[2], v[3]));
  } else {
    Vec<T> sums = add_neighbours<T>(add_neighbours<T>(v[0], v[1]), add_neighbours<T>(v[2], v[3]));
#pragma GCC unroll 4
    for (int lanes = kLanes<T>; lanes > 4; lanes /= 2) sums = add_neighbours<T>(sums, sums);
    __builtin_memcpy(p, &sums, 4 * sizeof(T));
  }
}

// The sums of each of as many vectors as one has lanes.
template <class T>
static inline Vec<T> sums(const T* vectors) {
  constexpr int L = kLanes<T>;
  Vec<T> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = load(vectors + i * L);
#pragma GCC unroll 4
  for (int n = L / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = add_neighbours<T>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

}  // namespace dcn::cpu::DCN_ISA
