// Causal attention for inference: fp32 arithmetic on fp32 or bf16 queries, keys and values, without gradients.
//
// y[b, s, h, :] = sum over t of softmax(scale * q[b, h, s] . k[b, g, t]) * v[b, g, t], t <= T - S + s, g = h / (H / G)
//
// Many queries: keys are transposed and values widened once a key head; a block of queries then runs over blocks of keys
// in products of MR queries by NV vectors that stay in registers. Scores of a block are held for all keys: the softmax
// is that of the definition, without rescaling. Compiled with contraction of multiply and add.

#include <algorithm>

#include "buffer.h"
#include "vector.h"

#define UNROLL _Pragma("GCC unroll 6")

namespace {

#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#else
constexpr int MR = 6, NV = 2;
#endif
constexpr int64_t WIDTH = NV * LANES;  // keys of a block
constexpr int64_t QUERIES = 8 * MR;    // of a block

struct Shape {
  int64_t batch, heads, key_heads, queries, keys, size;

  int64_t seen(int64_t query) const { return keys - queries + query + 1; }  // keys that a query may look at
};

template <class T>
struct Tensor {  // [batch, heads, tokens, size]
  const T* values;
  int64_t batch, head, token;  // strides; elements of a token are contiguous

  const T* at(int64_t b, int64_t h, int64_t t) const { return values + b * batch + h * head + t * token; }
};

// c[m, :] (+)= sum over `depth` of a[m, d] * b[d, :], M rows and N vectors.
template <int M, int N, class T>
inline void multiply(const float* a, int64_t a_row, const T* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                     bool add) {
  Floats sums[M][N];
UNROLL
  for (int m = 0; m < M; ++m)
UNROLL
    for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_row + n * LANES) : Floats{};
  for (int64_t d = 0; d < depth; ++d) {
    Floats row[N];
UNROLL
    for (int n = 0; n < N; ++n) row[n] = load(b + d * b_row + n * LANES);
UNROLL
    for (int m = 0; m < M; ++m) {
      const float factor = a[m * a_row + d];
UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] += factor * row[n];
    }
  }
UNROLL
  for (int m = 0; m < M; ++m)
UNROLL
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * LANES, sums[m][n]);
}

// The same for up to MR rows and a number of columns that LANES divides.
template <class T>
void product(int64_t rows, int64_t columns, const float* a, int64_t a_row, const T* b, int64_t b_row, int64_t depth,
             float* c, int64_t c_row, bool add) {
  static constexpr decltype(&multiply<1, NV, T>) wide[] = {multiply<1, NV, T>, multiply<2, NV, T>, multiply<3, NV, T>,
                                                           multiply<4, NV, T>, multiply<5, NV, T>, multiply<6, NV, T>};
  static constexpr decltype(&multiply<1, 1, T>) narrow[] = {multiply<1, 1, T>, multiply<2, 1, T>, multiply<3, 1, T>,
                                                            multiply<4, 1, T>, multiply<5, 1, T>, multiply<6, 1, T>};
  int64_t n = 0;
  for (; n + WIDTH <= columns; n += WIDTH) wide[rows - 1](a, a_row, b + n, b_row, depth, c + n, c_row, add);
  for (; n < columns; n += LANES) narrow[rows - 1](a, a_row, b + n, b_row, depth, c + n, c_row, add);
}

// Scores -> exp(score - largest), zeros from `count` up to `padded`; the sum of what is left.
float softmax(float* scores, int64_t count, int64_t padded) {
  for (int64_t t = count; t < padded; ++t) scores[t] = -3e38f;
  Floats top = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) {
    const Floats v = load(scores + t);
    top = v > top ? v : top;
  }
  float largest = top[0];
  for (int i = 1; i < LANES; ++i) largest = top[i] > largest ? top[i] : largest;
  Floats total{};
  for (int64_t t = 0; t < padded; t += LANES) {
    const Floats p = exp_of(load(scores + t) - largest);
    store(scores + t, p);
    total += p;
  }
  for (int64_t t = count; t < padded; ++t) scores[t] = 0;
  return sum_of(total);
}

inline int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

template <class T>
void scaled_row(const T* from, float* to, int64_t size, float scale) {
  for (int64_t d = 0; d < size; d += LANES) store(to + d, load(from + d) * scale);
}

// One query: every key and value is read once, as it lies there.
template <class T>
void single(const Shape& shape, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, T* y, float scale,
            int threads) {
  const int64_t heads = shape.heads, size = shape.size, keys = shape.keys;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < shape.batch * heads; ++task) {
    thread_local std::vector<float> buffer;
    float* const scores = room(buffer, padded(keys, WIDTH) + 2 * size);
    float *const query = scores + padded(keys, WIDTH), *const sums = query + size;
    const int64_t b = task / heads, h = task % heads, g = h / (heads / shape.key_heads);
    scaled_row(q.at(b, h, 0), query, size, scale);
    for (int64_t t = 0; t < keys; ++t) {
      const T* key = k.at(b, g, t);
      Floats sum{};
      for (int64_t d = 0; d < size; d += LANES) sum += load(query + d) * load(key + d);
      scores[t] = sum_of(sum);
    }
    const float total = softmax(scores, keys, padded(keys, LANES));
    product(1, size, scores, 0, v.at(b, g, 0), v.token, keys, sums, size, false);
    for (int64_t d = 0; d < size; d += LANES) store(y + task * size + d, load(sums + d) / total);
  }
}

// Keys [size, padded keys] and values [keys, size] in fp32.
template <class T>
void widen(const Shape& shape, const Tensor<T>& k, const Tensor<T>& v, int64_t b, int64_t g, float* keys, float* values) {
  const int64_t size = shape.size, row = padded(shape.keys, WIDTH);
  for (int64_t t = 0; t < shape.keys; ++t) {
    const T* key = k.at(b, g, t);
    for (int64_t d = 0; d < size; d += LANES) {
      const Floats part = load(key + d);
      for (int i = 0; i < LANES; ++i) keys[(d + i) * row + t] = part[i];
      store(values + t * size + d, load(v.at(b, g, t) + d));
    }
  }
}

// A block of queries of one head, from `first` on; `scores`: [QUERIES, padded keys], `sums`: [QUERIES, size].
template <class T>
void block(const Shape& shape, const Tensor<T>& q, int64_t b, int64_t h, int64_t first, const float* keys,
           const float* values, T* y, float scale, float* scores, float* sums, float* query) {
  const int64_t size = shape.size, row = padded(shape.keys, WIDTH);
  const int64_t count = std::min<int64_t>(QUERIES, shape.queries - first);
  float totals[QUERIES];
  for (int64_t i = 0; i < count; ++i) scaled_row(q.at(b, h, first + i), query + i * size, size, scale);
  for (int64_t t = 0; t < shape.seen(first + count - 1); t += WIDTH) {
    for (int64_t i = 0; i < count; i += MR) {
      const int64_t rows = std::min<int64_t>(MR, count - i);
      if (t < shape.seen(first + i + rows - 1))
        product(rows, WIDTH, query + i * size, size, keys + t, row, size, scores + i * row + t, row, false);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t strip = std::min(i / MR * MR + MR, count);
    totals[i] = softmax(scores + i * row, shape.seen(first + i), padded(shape.seen(first + strip - 1), LANES));
  }
  for (int64_t t = 0; t < shape.seen(first + count - 1); t += WIDTH) {
    for (int64_t i = 0; i < count; i += MR) {
      const int64_t rows = std::min<int64_t>(MR, count - i), left = shape.seen(first + i + rows - 1) - t;
      if (left > 0)
        product(rows, size, scores + i * row + t, row, values + t * size, size, std::min(left, WIDTH), sums + i * size,
                size, t > 0);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < size; d += LANES)
      store(y + ((b * shape.queries + first + i) * shape.heads + h) * size + d, load(sums + i * size + d) / totals[i]);
}

template <class T>
void many(const Shape& shape, const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, T* y, float scale,
          int threads) {
  const int64_t row = padded(shape.keys, WIDTH), size = shape.size, pairs = shape.batch * shape.key_heads;
  const int64_t blocks = (shape.queries + QUERIES - 1) / QUERIES, repeats = shape.heads / shape.key_heads;
  thread_local std::vector<float> wide;
  float* const keys = room(wide, pairs * (row + shape.keys) * size);
  float* const values = keys + pairs * row * size;
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<float> buffer;
    float* const scores = room(buffer, QUERIES * (row + 2 * size));
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pairs; ++p)
      widen(shape, k, v, p / shape.key_heads, p % shape.key_heads, keys + p * row * size, values + p * shape.keys * size);
    // The last queries see the most keys: they come first.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * shape.batch * shape.heads; ++task) {
      const int64_t pair = task % (pairs * repeats) / repeats, h = pair % shape.key_heads * repeats + task % repeats;
      const int64_t first = (blocks - 1 - task / (pairs * repeats)) * QUERIES;
      block(shape, q, pair / shape.key_heads, h, first, keys + pair * row * size, values + pair * shape.keys * size, y,
            scale, scores, scores + QUERIES * row, scores + QUERIES * (row + size));
    }
  }
}

template <class T>
void attention(const Shape& shape, const void* q, const void* k, const void* v, const int64_t* strides, void* y,
               float scale, int threads) {
  const auto tensor = [](const void* values, const int64_t* s) {
    return Tensor<T>{static_cast<const T*>(values), s[0], s[1], s[2]};
  };
  auto run = shape.queries == 1 ? single<T> : many<T>;
  run(shape, tensor(q, strides), tensor(k, strides + 3), tensor(v, strides + 6), static_cast<T*>(y), scale, threads);
}

}  // namespace

extern "C" {

int qatapult_lanes() { return LANES; }

// dtype: 0 fp32, 1 bf16. sizes: batch, heads, key heads, queries, keys, size of a head (a multiple of LANES).
// strides: of batch, head and token of q, k and v, in elements. y: [batch, queries, heads, size], contiguous.
void qatapult_attention(int dtype, const void* q, const void* k, const void* v, const int64_t* sizes,
                        const int64_t* strides, void* y, float scale, int threads) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  if (dtype == 0) attention<float>(shape, q, k, v, strides, y, scale, threads);
  if (dtype == 1) attention<BFloat16>(shape, q, k, v, strides, y, scale, threads);
}
}
