// What a decoder layer of LLaMA's kind computes between its integer products, and the layer as two calls.
//
// Tensors are fp32 or bf16 (dtype 0 or 1); arithmetic is fp32 and every result is rounded to the dtype where transformers'
// own modules round it. Compiled without contraction, so that these functions and the layer give the same bits.

#include "buffer.h"
#include "vector.h"

namespace {

// Work of fewer elements than this is done by the calling thread.
constexpr int64_t SMALL = 8192;

int team(int64_t elements, int threads) { return elements < SMALL ? 1 : threads; }

// y = weight * (x / sqrt(mean(x^2) + eps)), row by row; sums in LANES parts.
template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * size;
    T* to = y + row * size;
    Floats squares{};
    for (int64_t i = 0; i < size; i += LANES) {
      const Floats v = load(from + i);
      squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum_of(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += LANES)
      store(to + i, load(weight + i) * rounded<T>(load(from + i) * factor));
  }
}

// y = silu(gate) * up; gate and up are rows of `size` in steps of `stride`.
template <class T>
void silu_product(const T* gate, const T* up, T* y, int64_t rows, int64_t size, int64_t stride, int threads) {
#pragma omp parallel for num_threads(team(rows * size, threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < size; i += LANES) {
      const Floats g = load(gate + row * stride + i);
      store(y + row * size + i, rounded<T>(g / (1.0f + exp_of(-g))) * load(up + row * stride + i));
    }
  }
}

// y = x + delta
template <class T>
void add(const T* x, const T* delta, T* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(team(count, threads)) schedule(static)
  for (int64_t i = 0; i < count; i += LANES) store(y + i, load(x + i) + load(delta + i));
}

// Heads of tokens: x[b, s, h, :] in rows of `stride` -> y[b, h, s, :], turned by cos and sin [b, s, size] if given.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t batch, int64_t tokens, int64_t heads, int64_t size,
            int64_t stride, int threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(team(batch * tokens * heads * size, threads)) schedule(static)
  for (int64_t row = 0; row < batch * tokens; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x + row * stride + h * size;
      T* to = y + ((row / tokens * heads + h) * tokens + row % tokens) * size;
      if (!cos) {
        std::memcpy(to, from, size * sizeof(T));
        continue;
      }
      const T *c = cos + row * size, *s = sin + row * size;
      for (int64_t i = 0; i < half; i += LANES) {
        const Floats first = load(from + i), second = load(from + half + i);
        store(to + i, rounded<T>(first * load(c + i)) + rounded<T>(-second * load(s + i)));
        store(to + half + i, rounded<T>(second * load(c + half + i)) + rounded<T>(first * load(s + half + i)));
      }
    }
  }
}

// As `qatapult_vnni_linear`: the product of a weight with quantized tokens.
using Linear = void (*)(const void* weight, const void* x, int x_dtype, const float* token_scale, int64_t count, void* y,
                        int y_dtype, int threads);

struct Layer {
  Linear linear;
  const void *qkv, *out, *gate_up, *down;   // weights
  const void *input_norm, *post_norm;       // of the dtype
  int64_t hidden, heads, key_heads, head_size, intermediate;
  float input_eps, post_eps;
};

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr int number = 0;
};
template <>
struct Type<BFloat16> {
  static constexpr int number = 1;
};

template <class T>
void project(const Layer& layer, const T* x, const T* cos, const T* sin, int64_t batch, int64_t tokens, T* q, T* k, T* v,
             int threads) {
  thread_local std::vector<T> norm_buffer, product_buffer;
  const int64_t rows = batch * tokens, size = layer.head_size, heads = layer.heads, key_heads = layer.key_heads;
  const int64_t stride = (heads + 2 * key_heads) * size;
  T* const normed = room(norm_buffer, rows * layer.hidden);
  T* const from = room(product_buffer, rows * stride);
  rms_norm(x, static_cast<const T*>(layer.input_norm), normed, rows, layer.hidden, layer.input_eps, threads);
  layer.linear(layer.qkv, normed, Type<T>::number, nullptr, rows, from, Type<T>::number, threads);
  rotate(from, cos, sin, q, batch, tokens, heads, size, stride, threads);
  rotate(from + heads * size, cos, sin, k, batch, tokens, key_heads, size, stride, threads);
  rotate<T>(from + (heads + key_heads) * size, nullptr, nullptr, v, batch, tokens, key_heads, size, stride, threads);
}

template <class T>
void finish(const Layer& layer, const T* x, const T* attended, T* y, int64_t rows, int threads) {
  thread_local std::vector<T> norm_buffer, delta_buffer, wide_buffer, gated_buffer;
  const int64_t hidden = layer.hidden, size = layer.intermediate;
  constexpr int number = Type<T>::number;
  T* const normed = room(norm_buffer, rows * hidden);
  T* const delta = room(delta_buffer, rows * hidden);
  T* const wide = room(wide_buffer, rows * 2 * size);
  T* const gated = room(gated_buffer, rows * size);
  layer.linear(layer.out, attended, number, nullptr, rows, delta, number, threads);
  add(x, delta, y, rows * hidden, threads);
  rms_norm<T>(y, static_cast<const T*>(layer.post_norm), normed, rows, hidden, layer.post_eps, threads);
  layer.linear(layer.gate_up, normed, number, nullptr, rows, wide, number, threads);
  silu_product<T>(wide, wide + size, gated, rows, size, 2 * size, threads);
  layer.linear(layer.down, gated, number, nullptr, rows, delta, number, threads);
  add<T>(y, delta, y, rows * hidden, threads);
}

}  // namespace

// Sizes are multiples of the number that `qatapult_lanes` gives, head sizes of twice that.
extern "C" {

int qatapult_lanes() { return LANES; }

void qatapult_rms_norm(int dtype, const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps,
                       int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    using T = decltype(type);
    rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), rows, size, eps, threads);
  });
}

void qatapult_silu_product(int dtype, const void* gate, const void* up, void* y, int64_t rows, int64_t size, int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    using T = decltype(type);
    silu_product(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), rows, size, size, threads);
  });
}

// x: [batch, tokens, hidden]; cos, sin: [batch, tokens, head size]; q: [batch, heads, tokens, head size], k and v with
// the heads of keys.
void qatapult_layer_project(const Layer* layer, int dtype, const void* x, const void* cos, const void* sin, int64_t batch,
                            int64_t tokens, void* q, void* k, void* v, int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    using T = decltype(type);
    project(*layer, static_cast<const T*>(x), static_cast<const T*>(cos), static_cast<const T*>(sin), batch, tokens,
            static_cast<T*>(q), static_cast<T*>(k), static_cast<T*>(v), threads);
  });
}

// x, y: [rows, hidden]; attended: [rows, heads * head size].
void qatapult_layer_finish(const Layer* layer, int dtype, const void* x, const void* attended, void* y, int64_t rows,
                           int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    using T = decltype(type);
    finish(*layer, static_cast<const T*>(x), static_cast<const T*>(attended), static_cast<T*>(y), rows, threads);
  });
}
}
