// Errors a user can act on: RuntimeError in Python, with nothing but the message.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <sstream>
#include <stdexcept>

namespace dcn {

using Sizes = std::span<const int64_t>;

inline std::ostream& operator<<(std::ostream& text, Sizes sizes) {
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text << (sizes.size() == 1 ? ",)" : ")");
}

// The parts of the message are formatted only where the condition fails.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// `what` is the expected shape in symbols, for example "(N, C, H, W)".
inline void check_rank(Sizes sizes, size_t rank, const char* name, const char* what) {
  check(sizes.size() == rank, name, " must have shape ", what, ", got ", sizes);
}

inline void check_shape(Sizes sizes, std::initializer_list<int64_t> expected, const char* name, const char* what) {
  const Sizes wanted(expected.begin(), expected.size());
  check(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()), name, " must have shape ", what, " = ",
        wanted, ", got ", sizes);
}

inline void check_positive_pair(Sizes pair, const char* name) {
  check(pair.size() == 2 && pair[0] > 0 && pair[1] > 0, name, " must be two positive integers, got ", pair);
}

// Of (N, C, H, W): pixels of a map are indexed in 32 bits.
inline void check_maps(Sizes input) {
  check(input[1] > 0 && input[2] > 0 && input[3] > 0, "input must have at least one channel and one pixel, got shape ",
        input);
  check(input[2] <= std::numeric_limits<int32_t>::max() / input[3],
        "input's maps must have less than 2^31 pixels, got shape ", input);
}

}  // namespace dcn
