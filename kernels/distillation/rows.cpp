// Rows of logits -> divergence, cross-entropy and gradient in place, on the CPU.
//
// A thread owns whole rows; a row is read twice (three times for the Jensen-Shannon divergence): once for its sums, once
// to overwrite the student's logits with the gradient. Both rows stay in the core's cache in between. Exponentials are
// recomputed rather than stored. Sums are fp32 within a block of BLOCK elements, double over blocks, in a fixed order.
// The formulas are those of rows.py.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalars.h"

namespace {

constexpr int64_t BLOCK = 1024;
constexpr float MINUS_INFINITY = -INFINITY;
enum Kind { FORWARD_KL = 0, REVERSE_KL = 1, JSD = 2 };

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x to 1 ulp for x <= 88; below -87.3, where the result would be subnormal, 0. NaN stays NaN.
inline float exponential(float x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const float shifted = fma(x, 1.44269504f, MAGIC);
  const float n = shifted - MAGIC;
  const float r = fma(n, -1.42860677e-6f, fma(n, -0.693145752f, x));
  float p = fma(r, 1.0f / 720, 1.0f / 120);
  p = fma(p, r, 1.0f / 24);
  p = fma(p, r, 1.0f / 6);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  const float power = from_bits((bits_of(shifted) + 127) << 23);
  return x < -87.3f ? 0.0f : p * power;
}

// ln x for positive normal x: x = m 2^e with m in [sqrt(1/2), sqrt(2)), by the series of atanh((m - 1) / (m + 1)).
inline float logarithm(float x) {
  const uint32_t bits = bits_of(x) - 0x3F3504F3u;
  const float e = float(int32_t(bits) >> 23);
  const float m = from_bits((bits & 0x007FFFFFu) + 0x3F3504F3u);
  const float s = (m - 1) / (m + 1), z = s * s;
  float p = fma(z, 2.0f / 9, 2.0f / 7);
  p = fma(p, z, 2.0f / 5);
  p = fma(p, z, 2.0f / 3);
  return fma(e, 0.693147181f, fma(p * z, s, 2 * s));
}

// A product in which a probability of 0 counts as 0 whatever the other factor.
inline float weigh(float probability, float value) { return probability > 0 ? probability * value : 0.0f; }

template <class T>
inline float highest(const T* row, int64_t n) {
  float high = MINUS_INFINITY;
#pragma omp simd reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const float x = load(row[i]);
    high = x > high ? x : high;
  }
  return high;
}

struct Sum {  // sum of exponentials relative to the highest logit so far, and one more sum on the same footing
  double exponentials = 0, others = 0;
  float high = MINUS_INFINITY;

  void raise(float to, float inverse) {
    if (!(to > high)) return;
    const double shrink = std::exp((double(high) - to) * inverse);
    exponentials *= shrink;
    others *= shrink;
    high = to;
  }

  double logsumexp(float inverse) const { return double(high) * inverse + std::log(exponentials); }
};

struct Problem {
  float inverse, beta, factor, hard;  // 1 / T, beta, (1 - ce_weight) T, ce_weight
  int64_t size;
  bool labelled, cool;  // cool: T = 1, where the cross-entropy shares the divergence's exponentials
};

struct Row {
  double lse_student, lse_teacher, lse_hard, mean;  // mean: expected difference of logits / T (not for JSD)
};

template <int KIND, class T>
Row sums(const T* student, const T* teacher, const Problem& p) {
  Sum q, t, hard;
  const bool separate = p.labelled && !p.cool;
  for (int64_t start = 0; start < p.size; start += BLOCK) {
    const int64_t n = p.size - start < BLOCK ? p.size - start : BLOCK;
    const T *s = student + start, *y = teacher + start;
    q.raise(highest(s, n), p.inverse);
    t.raise(highest(y, n), p.inverse);
    const float high_q = q.high, high_t = t.high, inverse = p.inverse;
    float sum_q = 0, sum_t = 0, difference = 0;
#pragma omp simd reduction(+ : sum_q, sum_t, difference)
    for (int64_t i = 0; i < n; ++i) {
      const float x = load(s[i]), wanted = load(y[i]);
      const float e_q = exponential((x - high_q) * inverse), e_t = exponential((wanted - high_t) * inverse);
      sum_q += e_q;
      sum_t += e_t;
      if (KIND == FORWARD_KL) difference += weigh(e_t, (wanted - x) * inverse);
      if (KIND == REVERSE_KL) difference += weigh(e_q, (x - wanted) * inverse);
    }
    q.exponentials += sum_q;
    t.exponentials += sum_t;
    (KIND == FORWARD_KL ? t : q).others += difference;
    if (separate) {
      hard.raise(high_q, 1);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += exponential(load(s[i]) - high_q);
      hard.exponentials += sum;
    }
  }
  const double mean = KIND == FORWARD_KL ? t.others / t.exponentials : q.others / q.exponentials;
  const double lse = q.logsumexp(p.inverse);
  return {lse, t.logsumexp(p.inverse), separate ? hard.logsumexp(1) : lse, mean};
}

struct Mixed {
  float q, p, student, teacher;  // probabilities, and log(q / m), log(p / m)
};

inline Mixed mix(float s, float y, float lse_s, float lse_t, const Problem problem) {
  const float q = exponential(fma(s, problem.inverse, -lse_s)), p = exponential(fma(y, problem.inverse, -lse_t));
  const float m = fma(problem.beta, p, (1 - problem.beta) * q);
  const float over = 1 / (m > 0 ? m : 1.0f);  // where q or p is 0, its logarithm is finite, and multiplied with 0
  return {q, p, logarithm(q * over), logarithm(p * over)};
}

struct Parts {
  double student = 0, teacher = 0;  // KL(q || m), KL(p || m)
};

template <class T>
Parts jensen_shannon(const T* student, const T* teacher, const Row& row, const Problem p) {
  Parts parts;
  const float lse_s = row.lse_student, lse_t = row.lse_teacher;
  for (int64_t start = 0; start < p.size; start += BLOCK) {
    const int64_t n = p.size - start < BLOCK ? p.size - start : BLOCK;
    const T *s = student + start, *y = teacher + start;
    float sum_student = 0, sum_teacher = 0;
#pragma omp simd reduction(+ : sum_student, sum_teacher)
    for (int64_t i = 0; i < n; ++i) {
      const Mixed m = mix(load(s[i]), load(y[i]), lse_s, lse_t, p);
      sum_student += m.q * m.student;
      sum_teacher += m.p * m.teacher;
    }
    parts.student += sum_student;
    parts.teacher += sum_teacher;
  }
  return parts;
}

template <int KIND, bool SEPARATE, class T>
void slope(T* student, const T* teacher, const Row& row, float mean, const Problem p) {
  const float lse_s = row.lse_student, lse_t = row.lse_teacher, lse_hard = row.lse_hard;
  const float factor = KIND == JSD ? p.factor * (1 - p.beta) : p.factor;
  const float shared = p.labelled && p.cool ? p.hard : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < p.size; ++i) {
    const float s = load(student[i]), y = load(teacher[i]);
    float q, gradient;
    if (KIND == FORWARD_KL) {
      q = exponential(fma(s, p.inverse, -lse_s));
      gradient = q - exponential(fma(y, p.inverse, -lse_t));
    } else if (KIND == REVERSE_KL) {
      q = exponential(fma(s, p.inverse, -lse_s));
      gradient = weigh(q, (s - y) * p.inverse - mean);
    } else {
      const Mixed m = mix(s, y, lse_s, lse_t, p);
      q = m.q;
      gradient = q * (m.student - mean);
    }
    const float hard = SEPARATE ? p.hard * exponential(s - lse_hard) : shared * q;
    student[i] = store<T>(fma(factor, gradient, hard));
  }
}

template <int KIND, class T>
void run(T* student, const T* teacher, const int64_t* labels, float* divergence, float* cross_entropy,
         int64_t rows, const Problem& p, int want_gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    T* s = student + r * p.size;
    const T* y = teacher + r * p.size;
    const Row row = sums<KIND>(s, y, p);
    double mean = row.mean;
    if (KIND == JSD) {
      const Parts parts = jensen_shannon(s, y, row, p);
      divergence[r] = float(p.beta * parts.teacher + (1 - double(p.beta)) * parts.student);
      mean = parts.student;
    } else {
      const double apart = row.lse_student - row.lse_teacher;
      divergence[r] = float(KIND == FORWARD_KL ? mean + apart : mean - apart);
    }
    if (labels) cross_entropy[r] = float(row.lse_hard - load(s[labels[r]]));
    if (!want_gradient) continue;
    const bool separate = p.labelled && !p.cool;
    (separate ? slope<KIND, true, T> : slope<KIND, false, T>)(s, y, row, float(mean), p);
    if (labels) s[labels[r]] = store<T>(load(s[labels[r]]) - p.hard);
  }
}

template <class T>
void divergence_of(int kind, T* student, const T* teacher, const int64_t* labels, float* divergence,
                   float* cross_entropy, int64_t rows, const Problem& p, int want_gradient, int threads) {
  const auto selected = kind == FORWARD_KL ? run<FORWARD_KL, T> : kind == REVERSE_KL ? run<REVERSE_KL, T> : run<JSD, T>;
  selected(student, teacher, labels, divergence, cross_entropy, rows, p, want_gradient, threads);
}

template <class T>
void logsumexp_of(const T* logits, float* out, int64_t rows, int64_t size, float inverse, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    Sum total;
    for (int64_t start = 0; start < size; start += BLOCK) {
      const T* x = logits + r * size + start;
      const int64_t n = size - start < BLOCK ? size - start : BLOCK;
      total.raise(highest(x, n), inverse);
      if (total.high == MINUS_INFINITY) continue;
      const float high = total.high;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += exponential((load(x[i]) - high) * inverse);
      total.exponentials += sum;
    }
    out[r] = total.high == MINUS_INFINITY ? MINUS_INFINITY : float(total.logsumexp(inverse));
  }
}

template <class T>
void exponentials_of(T* logits, const float* factor, const float* shift, const float* hard_shift, int64_t rows,
                     int64_t size, float inverse, float hard, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    T* x = logits + r * size;
    const float f = factor[r], offset = shift[r], hard_offset = hard_shift[r];
    if (hard == 0) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) x[i] = store<T>(f * exponential(fma(load(x[i]), inverse, -offset)));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float value = load(x[i]), second = hard * exponential(value - hard_offset);
        x[i] = store<T>(fma(f, exponential(fma(value, inverse, -offset)), second));
      }
    }
  }
}

}  // namespace

// dtype of logits: 0 fp32, 1 bf16.
extern "C" {

// student [rows, size] (overwritten if want_gradient), teacher [rows, size], labels [rows] or null,
// divergence [rows], cross_entropy [rows].
void qatapult_divergence(int dtype, int kind, void* student, const void* teacher, const int64_t* labels,
                         float* divergence, float* cross_entropy, int64_t rows, int64_t size, float temperature,
                         float beta, float ce_weight, int want_gradient, int threads) {
  const Problem p{1 / temperature, beta,  (1 - ce_weight) * temperature, ce_weight,
                  size,            labels != nullptr, temperature == 1.0f};
  with_fp32_or_bf16(dtype, [&](auto type) {
    using T = decltype(type);
    divergence_of(kind, static_cast<T*>(student), static_cast<const T*>(teacher), labels, divergence, cross_entropy,
                  rows, p, want_gradient, threads);
  });
}

// out[r] = log sum_i exp(logits[r, i] * inverse); -inf for a row of -inf.
void qatapult_logsumexp(int dtype, const void* logits, float* out, int64_t rows, int64_t size, float inverse,
                        int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    logsumexp_of(static_cast<const decltype(type)*>(logits), out, rows, size, inverse, threads);
  });
}

// logits[r, i] = factor[r] exp(logits[r, i] * inverse - shift[r]) + hard exp(logits[r, i] - hard_shift[r]).
void qatapult_exponentials(int dtype, void* logits, const float* factor, const float* shift, const float* hard_shift,
                           int64_t rows, int64_t size, float inverse, float hard, int threads) {
  with_fp32_or_bf16(dtype, [&](auto type) {
    exponentials_of(static_cast<decltype(type)*>(logits), factor, shift, hard_shift, rows, size, inverse, hard,
                    threads);
  });
}
}
