// The kernels on heap memory of exactly their tensors' sizes, under a sanitizer: what is read or written beyond an end, before
// its time or in a race is said by it. Results are held against the plain formulas in double. Returns the number of failures.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/host/block.h"
#include "../../csrc/host/numbers.h"
#include "../../csrc/include/perfusion_kernels.h"

using namespace perfusion;

namespace {

std::mt19937 generator(1);

float normal() { return std::normal_distribution<float>()(generator); }

// A dense tensor in memory of its own, 16-byte aligned.
template <class Element>
struct Tensor {
  Tensor(perfusion_dtype dtype, std::vector<int64_t> shape) {
    for (int64_t size : shape) count *= size;
    elements.reset(new Element[count]());
    view = {elements.get(), dtype, {}};
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) view.strides[i] = stride;
  }
  Tensor& random() {
    for (int64_t i = 0; i < count; ++i) elements[i] = from_float<Element>(normal());
    return *this;
  }
  double operator[](int64_t i) const { return to_float(elements[i]); }
  int64_t count = 1;
  std::unique_ptr<Element[]> elements;
  perfusion_tensor view;
};

bool failed(perfusion_status status, double worst, double bound, const char* what) {
  if (status != PERFUSION_OK) std::printf("%s: %s\n", what, perfusion_last_message());
  if (!(worst <= bound)) std::printf("%s: error %g, bound %g\n", what, worst, bound);
  return status != PERFUSION_OK || !(worst <= bound);
}

template <class Element>
int attention(perfusion_dtype dtype, int64_t N, int64_t T, int64_t d, int64_t J) {
  const int64_t B = 2, H = 2, S = J + 1, O = H * d;
  Tensor<Element> query(dtype, {B, N, H, d}), key(dtype, {B, T, H, d}), value(dtype, {B, T, H, d}), output(dtype, {B, N, H, d});
  Tensor<float> gates(PERFUSION_FLOAT32, {B, T, J}), components(PERFUSION_FLOAT32, {B, T, J});
  std::unique_ptr<int32_t[]> index(new int32_t[B * J]);
  for (int64_t i = 0; i < B * J; ++i) index[i] = i < J ? -1 : static_cast<int32_t>(1 + i % J);  // row 0 has no concept
  Tensor<Element> tables[4] = {{dtype, {S, O}}, {dtype, {S, O}}, {dtype, {S, O}}, {dtype, {S, O}}};
  for (auto* each : {&query, &key, &value}) each->random();
  for (auto& each : tables) each.random();
  gates.random(), components.random();
  perfusion_edited_attention_params p{};
  p.B = B, p.N = N, p.T = T, p.H = H, p.d = d, p.J = J, p.S = S;
  p.query = query.view, p.key = key.view, p.value = value.view, p.output = output.view;
  p.gates = gates.view, p.components = components.view, p.index = {index.get(), PERFUSION_INT32, {J, 1}};
  p.key_outputs = tables[0].view, p.key_targets = tables[1].view;
  p.value_outputs = tables[2].view, p.value_targets = tables[3].view;
  p.scale = 0.1f;
  const perfusion_status status = perfusion_edited_attention(&p, nullptr);

  double worst = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      const auto edited = [&](const Tensor<Element>& base, int side, int64_t t, int64_t x) {
        double sum = base[((b * T + t) * H + h) * d + x];
        for (int64_t j = 0; j < J; ++j) {
          const int64_t slot = index[b * J + j], i = (b * T + t) * J + j;
          if (slot >= 0) sum += gates[i] * tables[side][slot * O + h * d + x] - components[i] * tables[side + 1][slot * O + h * d + x];
        }
        return sum;
      };
      std::vector<double> k(T * d), v(T * d), weights(T);
      for (int64_t i = 0; i < T * d; ++i) k[i] = edited(key, 0, i / d, i % d), v[i] = edited(value, 2, i / d, i % d);
      for (int64_t n = 0; n < N; ++n) {
        const int64_t at = ((b * N + n) * H + h) * d;
        double sum = 0;
        for (int64_t t = 0; t < T; ++t) {
          double score = 0;
          for (int64_t x = 0; x < d; ++x) score += query[at + x] * k[t * d + x];
          sum += weights[t] = std::exp(0.1 * score);
        }
        for (int64_t x = 0; x < d; ++x) {
          double expected = 0;
          for (int64_t t = 0; t < T; ++t) expected += weights[t] / sum * v[t * d + x];
          worst = std::fmax(worst, std::fabs(output[at + x] - expected));
        }
      }
    }
  }
  return failed(status, worst, dtype == PERFUSION_FLOAT16 ? 0.02 : 0.15, "edited_attention");
}

template <class Element>
int gates(perfusion_dtype dtype, int64_t T, int64_t D, int64_t J) {
  const int64_t B = 2, S = J + 1;
  Tensor<Element> encodings(dtype, {B, T, D});
  Tensor<float> targets(PERFUSION_FLOAT32, {S, D}), bias(PERFUSION_FLOAT32, {B, J}), temperature(PERFUSION_FLOAT32, {B, J});
  Tensor<float> result(PERFUSION_FLOAT32, {B, T, J}), components(PERFUSION_FLOAT32, {B, T, J});
  std::unique_ptr<int32_t[]> index(new int32_t[B * J]);
  for (int64_t i = 0; i < B * J; ++i) index[i] = i < J ? -1 : static_cast<int32_t>(1 + i % J);
  encodings.random(), targets.random();
  for (int64_t i = 0; i < B * J; ++i) temperature.elements[i] = 0.5f;
  perfusion_concept_gates_params p{};
  p.B = B, p.T = T, p.D = D, p.J = J, p.S = S;
  p.encodings = encodings.view, p.targets = targets.view, p.metric_targets = targets.view;  // C = 1
  p.index = {index.get(), PERFUSION_INT32, {J, 1}}, p.bias = bias.view, p.temperature = temperature.view;
  p.gates = result.view, p.components = components.view;
  const perfusion_status status = perfusion_concept_gates(&p, nullptr);

  double worst = 0;
  for (int64_t i = 0; i < T * J; ++i) worst = std::fmax(worst, std::fabs(result[i]) + std::fabs(components[i]));  // row 0
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t j = 0; j < J; ++j) {  // e - Σ_k a_k i*_k is orthogonal to every i*_j
      double product = 0, energy = 0, rest = 0;
      for (int64_t x = 0; x < D; ++x) {
        const double e = encodings[(T + t) * D + x], i = targets[index[J + j] * D + x];
        product += e * i, energy += i * i, rest += e * i;
        for (int64_t k = 0; k < J; ++k) rest -= components[(T + t) * J + k] * targets[index[J + k] * D + x] * i;
      }
      worst = std::fmax(worst, std::fabs(result[(T + t) * J + j] - 1 / (1 + std::exp(-product / energy / 0.5))));
      worst = std::fmax(worst, std::fabs(rest / energy));
    }
  }
  return failed(status, worst, 1e-4, "concept_gates");
}

// Whether the kernels of `operation` are to run: all of them, unless a barrier in another operator's own file is left out.
bool concerned(const std::string& operation) {
  const std::string& dropped = host::machine().dropped;
  const std::string file = dropped.substr(0, dropped.find('.'));
  for (const char* each : {"concept_gates", "edited_attention"}) {
    if (file == each) return file == operation;
  }
  return true;
}

}  // namespace

// Arguments: nothing, or FILE:LINE of a barrier to leave out.
int main(int count, char** arguments) {
  int failures = 0;
  if (count > 1) host::machine().dropped = arguments[1];
  for (host::Order order : {host::Order::forward, host::Order::backward}) {
    host::machine().order = order;
    host::machine().device.multiprocessors = 0;  // one block a head
    if (concerned("edited_attention")) {
      failures += attention<Half>(PERFUSION_FLOAT16, 70, 77, 40, 2);
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 5, 81, 40, 1);
      failures += attention<Half>(PERFUSION_FLOAT16, 17, 1, 64, 3);
      host::machine().device.multiprocessors = 64;
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 150, 16, 64, 9);
    }
    if (concerned("concept_gates")) {
      failures += gates<Half>(PERFUSION_FLOAT16, 18, 37, 3);
      failures += gates<BFloat16>(PERFUSION_BFLOAT16, 5, 64, 8);
      failures += gates<float>(PERFUSION_FLOAT32, 5, 64, 11);
    }
  }
  if (count > 1 && host::machine().drops == 0) std::printf("no kernel came to a barrier at %s\n", arguments[1]);
  return failures;
}
