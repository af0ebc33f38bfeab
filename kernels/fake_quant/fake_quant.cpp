// Fake-quantization on the CPU: one read and one write of each element, vectorised by the compiler.
//
// Tensors are [blocks, size], contiguous, with one scale a block. A block is cut into pieces of at most PIECE
// elements, the unit of work of a thread. Sums are fp32 within a piece, double over pieces, in a fixed order: the
// result does not depend on the number of threads. Compiled without contraction and reassociation (common/cpp.py);
// the formulas are those of reference.py.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "scalars.h"

namespace {

constexpr int64_t PIECE = 4096;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
enum Rule { STE = 0, LSQ = 1, PACT = 2 };

inline float load(_Float16 x) { return float(x); }

inline float clamp(float x, float low, float high) {  // NaN stays NaN
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline float round_half_even(float x) { return (x + MAGIC) - MAGIC; }

struct Block {
  float scale, zero, low, high, offset;

  Block(float scale, float zero, int qmin, int qmax, float offset)
      : scale(scale), zero(zero), low(qmin - zero), high(qmax - zero), offset(offset) {}

  inline float level(float quotient) const { return round_half_even(clamp(quotient - offset, low, high)); }
};

struct Grid {
  const float* scales;
  const float* zeros;  // may be null
  int qmin, qmax;
  float offset;

  Block block(int64_t index) const {
    return Block(scales[index], zeros ? round_half_even(zeros[index]) : 0.0f, qmin, qmax, offset);
  }
};

inline int64_t pieces_of(int64_t size) { return (size + PIECE - 1) / PIECE; }

// Calls work(block, first element, count, piece) for every piece, on all threads.
template <class Work>
void for_pieces(int64_t blocks, int64_t size, int threads, const Work& work) {
  const int64_t pieces = pieces_of(size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < blocks * pieces; ++piece) {
    const int64_t block = pieces == 1 ? piece : piece / pieces;
    const int64_t begin = (piece - block * pieces) * PIECE;
    work(block, block * size + begin, size - begin < PIECE ? size - begin : PIECE, piece);
  }
}

template <class T, class O>
void values_of(const T* x, O* out, int64_t count, const Block& block) {
  const Block b = block;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = store<O>((b.level(load(x[i]) / b.scale) + b.offset) * b.scale);
}

template <class T>
void codes_of(const T* x, int8_t* out, int64_t count, const Block& block) {
  const Block b = block;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float quotient = load(x[i]) / b.scale;
    out[i] = int8_t(int32_t(b.level(quotient == quotient ? quotient : 0.0f) + b.zero));
  }
}

template <class T, class G, int RULE, bool BINARY, bool ZERO>
void gradients_of(const G* grad, const T* x, T* grad_x, int64_t count, const Block& block, float* sums) {
  const Block b = block;
  const float top = b.high + 2 * b.offset;
  float scale_sum = 0, zero_sum = 0;
#pragma omp simd reduction(+ : scale_sum, zero_sum)
  for (int64_t i = 0; i < count; ++i) {
    const float g = load(grad[i]);
    const float quotient = load(x[i]) / b.scale;
    const bool inside = (quotient >= b.low) & (quotient <= top);
    grad_x[i] = store<T>(inside ? g : 0.0f);
    if (RULE != STE) {
      const float level = b.level(quotient) + b.offset;
      const float within = RULE == PACT ? 0.0f : level - quotient;
      scale_sum += g * (BINARY && RULE == LSQ ? level : inside ? within : level);
      if (ZERO) zero_sum -= inside ? 0.0f : g;
    }
  }
  sums[0] = scale_sum;
  sums[1] = zero_sum;
}

template <class T, class O>
void forward(const T* x, O* out, int64_t blocks, int64_t size, const Grid& grid, int threads) {
  for_pieces(blocks, size, threads, [&](int64_t block, int64_t at, int64_t count, int64_t) {
    values_of(x + at, out + at, count, grid.block(block));
  });
}

template <class T>
void quantize(const T* x, int8_t* out, int64_t blocks, int64_t size, const Grid& grid, int threads) {
  for_pieces(blocks, size, threads, [&](int64_t block, int64_t at, int64_t count, int64_t) {
    codes_of(x + at, out + at, count, grid.block(block));
  });
}

template <class T, class G, int RULE, bool BINARY, bool ZERO>
void backward(const G* grad, const T* x, T* grad_x, float* grad_scale, float* grad_zero, int64_t blocks,
              int64_t size, const Grid& grid, float factor, int threads) {
  const int64_t pieces = pieces_of(size);
  std::vector<float> sums(RULE == STE ? 0 : 2 * blocks * pieces);
  for_pieces(blocks, size, threads, [&](int64_t block, int64_t at, int64_t count, int64_t piece) {
    float unused[2];
    float* own = RULE == STE ? unused : &sums[2 * piece];
    gradients_of<T, G, RULE, BINARY, ZERO>(grad + at, x + at, grad_x + at, count, grid.block(block), own);
  });
  if (RULE == STE) return;
  for (int64_t block = 0; block < blocks; ++block) {
    double scale_sum = 0, zero_sum = 0;
    for (int64_t piece = block * pieces; piece < (block + 1) * pieces; ++piece) {
      scale_sum += sums[2 * piece];
      zero_sum += sums[2 * piece + 1];
    }
    grad_scale[block] = float(scale_sum) * factor;
    if (ZERO) grad_zero[block] = float(zero_sum) * grid.scales[block] * factor;
  }
}

template <class T, class G, int RULE, bool BINARY>
void backward_with(const G* grad, const T* x, T* grad_x, float* grad_scale, float* grad_zero, int64_t blocks,
                   int64_t size, const Grid& grid, float factor, int threads) {
  auto run = grid.zeros ? backward<T, G, RULE, BINARY, true> : backward<T, G, RULE, BINARY, false>;
  run(grad, x, grad_x, grad_scale, grad_zero, blocks, size, grid, factor, threads);
}

// How a scale is derived from the range of a row (ranges.py).
struct Range {
  float steps;   // scales between zero and the end of the range; asymmetric: between both ends
  int stored;    // dtype of deployed scales: 0 fp32, 1 bf16, 2 fp16
  int symmetric;

  float scale_of(float width) const {
    float scale = width / steps;
    if (stored == 0) scale = scale > FLT_MAX ? FLT_MAX : scale;
    if (stored == 1) scale = load(store<BFloat16>(scale > 0x1.FEp127f ? 0x1.FEp127f : scale));
    if (stored == 2) scale = load(store<_Float16>(scale > 65504.0f ? 65504.0f : scale));
    return scale == 0.0f ? 1.0f : scale;
  }
};

// Largest magnitude, compared as integers, which order as non-negative floats do; NaN counts as 0, inf as FLT_MAX.
template <class T>
float largest(const T* x, int64_t count) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits = int32_t(bits_of(load(x[i])) & 0x7FFFFFFF);
    bits = bits > 0x7F800000 ? 0 : bits > 0x7F7FFFFF ? 0x7F7FFFFF : bits;
    top = bits > top ? bits : top;
  }
  return from_bits(uint32_t(top));
}

template <class T>
void ends(const T* x, int64_t count, float& low, float& high) {
  float bottom = 0, top = 0;
#pragma omp simd reduction(min : bottom) reduction(max : top)
  for (int64_t i = 0; i < count; ++i) {
    float value = load(x[i]);
    value = value == value ? value : 0.0f;
    bottom = value < bottom ? value : bottom;
    top = value > top ? value : top;
  }
  low = bottom < -FLT_MAX ? -FLT_MAX : bottom;
  high = top > FLT_MAX ? FLT_MAX : top;
}

// Rows of any length, each by one thread. Either values or codes with scales and zeros are written.
template <class T>
void dynamic(const T* x, T* out, int8_t* codes, float* scales, float* zeros, int64_t rows, int64_t size, int qmin,
             int qmax, float offset, const Range& range, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* own = x + row * size;
    float low = 0, high, zero = 0;
    if (range.symmetric) high = largest(own, size);
    else ends(own, size, low, high);
    const float scale = range.scale_of(high - low);
    if (!range.symmetric) zero = round_half_even(clamp(qmin - low / scale, qmin, qmax));
    const Block block(scale, zero, qmin, qmax, offset);
    if (out) values_of(own, out + row * size, size, block);
    if (!codes) continue;
    codes_of(own, codes + row * size, size, block);
    scales[row] = scale;
    if (zeros) zeros[row] = zero;
  }
}

template <class Call>
void with_type(int dtype, const Call& call) {
  if (dtype == 0) call(float());
  if (dtype == 1) call(BFloat16());
  if (dtype == 2) call(_Float16());
}

// The second dtype is the first, or bf16 beside fp32: weights in fp32 whose products are in bf16.
template <class Call>
void with_types(int dtype, int other, const Call& call) {
  if (dtype == 0 && other == 1) return call(float(), BFloat16());
  with_type(dtype, [&](auto type) { call(type, type); });
}

}  // namespace

// dtype: 0 fp32, 1 bf16, 2 fp16, of x and grad_x; out and grad have another where `with_types` says so.
extern "C" {

// Writes values, or int8 codes where `codes` is set.
void qatapult_forward(int dtype, int out_dtype, const void* x, void* out, int codes, const float* scales,
                      const float* zeros, int64_t blocks, int64_t size, int qmin, int qmax, float offset,
                      int threads) {
  const Grid grid{scales, zeros, qmin, qmax, offset};
  with_types(dtype, out_dtype, [&](auto type, auto out_type) {
    using T = decltype(type);
    using O = decltype(out_type);
    const T* from = static_cast<const T*>(x);
    if (codes) quantize(from, static_cast<int8_t*>(out), blocks, size, grid, threads);
    else forward(from, static_cast<O*>(out), blocks, size, grid, threads);
  });
}

void qatapult_backward(int dtype, int grad_dtype, const void* grad, const void* x, void* grad_x, float* grad_scale,
                       float* grad_zero, const float* scales, const float* zeros, int64_t blocks, int64_t size,
                       int qmin, int qmax, float offset, int rule, float factor, int threads) {
  const Grid grid{scales, zeros, qmin, qmax, offset};
  with_types(dtype, grad_dtype, [&](auto type, auto grad_type) {
    using T = decltype(type);
    using G = decltype(grad_type);
    auto run = backward_with<T, G, STE, false>;
    if (rule == LSQ) run = qmax - qmin == 1 ? backward_with<T, G, LSQ, true> : backward_with<T, G, LSQ, false>;
    if (rule == PACT) run = backward_with<T, G, PACT, false>;
    run(static_cast<const G*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x), grad_scale, grad_zero,
        blocks, size, grid, factor, threads);
  });
}

void qatapult_dynamic(int dtype, const void* x, void* out, int8_t* codes, float* scales, float* zeros,
                      int64_t rows, int64_t size, int qmin, int qmax, float offset, float steps, int stored,
                      int symmetric, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    dynamic(static_cast<const T*>(x), static_cast<T*>(out), codes, scales, zeros, rows, size, qmin, qmax, offset,
            Range{steps, stored, symmetric}, threads);
  });
}
}
