// Errors a user can act on: RuntimeError in Python, with nothing but the message.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

// The parts of the message are put into words only where the condition fails.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// `what` names the expected shape in words, for example "(N, C, H, W)".
inline void check_rank(Sizes sizes, size_t rank, const char* name, const char* what) {
  check(sizes.size() == rank, name, " must have shape ", what, ", got ", sizes);
}

inline void check_shape(Sizes sizes, std::initializer_list<int64_t> expected, const char* name, const char* what) {
  const Sizes wanted(expected.begin(), expected.size());
  check(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()), name, " must have shape ", what, " = ",
        wanted, ", got ", sizes);
}

}  // namespace dcn
