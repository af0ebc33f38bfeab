// Memory that is kept between calls.

#pragma once

#include <cstdint>
#include <vector>

namespace {

// Room for `count` elements. Buffers only grow: one that shrinks is filled with zeros when it grows again.
template <class T>
T* room(std::vector<T>& buffer, int64_t count) {
  if (int64_t(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

}  // namespace
