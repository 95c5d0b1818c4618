// Vectors of the instruction set's widest registers. Everything in cpu/simd is compiled once per instruction set
// (setup.py lists them) into a namespace of its own, DCN_ISA, and calls no external inline function of other code
// (inline.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../bfloat16.h"

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
  typedef int32_t indices __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t indices __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using LaneIndices = typename VectorOf<T>::indices;

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

static inline Vec<float> load(const Bfloat16* p) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, FloatBits) << 16);
}

// Rounded to bfloat16, in the upper half of each lane; the lower is undefined.
static inline FloatBits rounded(Vec<float> v) {
  const FloatBits bits = reinterpret_cast<FloatBits>(v);
  const FloatBits quiet_nan = FloatBits{} + 0x7fc00000;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : quiet_nan;
}

static inline void store(Bfloat16* p, Vec<float> v) {
  const HalfBits half = __builtin_convertvector(rounded(v) >> 16, HalfBits);
  __builtin_memcpy(p, &half, sizeof(half));
}

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

// Every second lane of `a` and then of `b`, from `First` on.
template <class T, int First>
static inline Vec<T> every_second(Vec<T> a, Vec<T> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (First + 2 * I)...);
#else
    return __builtin_shuffle(a, b, LaneIndices<T>{(First + 2 * I)...});
#endif
  }(std::make_integer_sequence<int, kLanes<T>>());
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
    for (int i = 0; i < n; ++i)
      v[i] = every_second<T, 0>(v[2 * i], v[2 * i + 1]) + every_second<T, 1>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

}  // namespace dcn::cpu::DCN_ISA
