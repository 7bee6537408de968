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
  Tensor& random(float deviation = 1) {
    for (int64_t i = 0; i < count; ++i) elements[i] = from_float<Element>(deviation * normal());
    return *this;
  }
  // this[r, n] = Σ_k left[r, k] right[n, k], rounded
  void product(const Tensor& left, const Tensor& right, int64_t columns, int64_t depth) {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += left[i / columns * depth + k] * right[i % columns * depth + k];
      elements[i] = from_float<Element>(static_cast<float>(sum));
    }
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

// edited_attention, or with a D fused_edited_attention.
template <class Element>
int attention(perfusion_dtype dtype, int64_t N, int64_t T, int64_t d, int64_t J, int64_t D = 0) {
  const int64_t B = 2, H = 2, S = J + 1, O = H * d;
  Tensor<Element> query(dtype, {B, N, H, d}), key(dtype, {B, T, H, d}), value(dtype, {B, T, H, d}), output(dtype, {B, N, H, d});
  Tensor<float> gates(PERFUSION_FLOAT32, {B, T, J}), components(PERFUSION_FLOAT32, {B, T, J});
  std::unique_ptr<int32_t[]> index(new int32_t[B * J]);
  for (int64_t i = 0; i < B * J; ++i) index[i] = i < J ? -1 : static_cast<int32_t>(1 + i % J);  // row 0 has no concept
  Tensor<Element> tables[4] = {{dtype, {S, O}}, {dtype, {S, O}}, {dtype, {S, O}}, {dtype, {S, O}}};
  for (auto* each : {&query, &key, &value}) each->random();
  for (auto& each : tables) each.random();
  gates.random(), components.random();
  Tensor<Element> encodings(dtype, {B, T, D}), weights[2] = {{dtype, {O, D}}, {dtype, {O, D}}};
  const auto fill = [&](auto& p) {
    p.B = B, p.N = N, p.T = T, p.H = H, p.d = d, p.J = J, p.S = S;
    p.query = query.view, p.output = output.view;
    p.gates = gates.view, p.components = components.view, p.index = {index.get(), PERFUSION_INT32, {J, 1}};
    p.key_outputs = tables[0].view, p.key_targets = tables[1].view;
    p.value_outputs = tables[2].view, p.value_targets = tables[3].view;
    p.scale = 0.1f;
  };
  perfusion_status status;
  if (D == 0) {
    perfusion_edited_attention_params p{};
    fill(p);
    p.key = key.view, p.value = value.view;
    status = perfusion_edited_attention(&p, nullptr);
  } else {
    encodings.random();
    for (auto& each : weights) each.random(1 / std::sqrt(static_cast<float>(D)));
    key.product(encodings, weights[0], O, D);
    value.product(encodings, weights[1], O, D);
    perfusion_fused_edited_attention_params p{};
    fill(p);
    p.D = D, p.encodings = encodings.view, p.key_weight = weights[0].view, p.value_weight = weights[1].view;
    status = perfusion_fused_edited_attention(&p, nullptr);
  }

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
  return failed(status, worst, dtype == PERFUSION_FLOAT16 ? 0.02 : 0.15, D == 0 ? "edited_attention" : "fused_edited_attention");
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
  perfusion_concept_gates_workspace(&p, &p.workspace_bytes);
  Tensor<float> workspace(PERFUSION_FLOAT32, {p.workspace_bytes / 4});
  p.workspace = workspace.elements.get();
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

// The projection, then its derivatives for a random gradient of its result. Errors are relative to what is expected, or to 1.
template <class Element>
int projection(perfusion_dtype dtype, int64_t T, int64_t D, int64_t O, int64_t J) {
  const int64_t B = 2, S = J + 1;
  Tensor<Element> encodings(dtype, {B, T, D}), weight(dtype, {O, D}), outputs(dtype, {S, O}), targets(dtype, {S, O});
  Tensor<Element> result(dtype, {B, T, O}), gradient(dtype, {B, T, O});
  Tensor<float> gates(PERFUSION_FLOAT32, {B, T, J}), components(PERFUSION_FLOAT32, {B, T, J});
  std::unique_ptr<int32_t[]> index(new int32_t[B * J]);
  for (int64_t i = 0; i < B * J; ++i) index[i] = i < J ? -1 : static_cast<int32_t>(1 + i % J);  // row 0 has no concept
  for (auto* each : {&encodings, &weight, &outputs, &targets, &gradient}) each->random();
  gates.random(), components.random();
  perfusion_edited_projection_params p{};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = S;
  p.encodings = encodings.view, p.weight = weight.view, p.gates = gates.view, p.components = components.view;
  p.index = {index.get(), PERFUSION_INT32, {J, 1}}, p.outputs = outputs.view, p.projected_targets = targets.view;
  p.result = result.view;
  perfusion_status status = perfusion_edited_projection(&p, nullptr);

  double worst = 0;
  const auto compare = [&worst](double found, double expected) {
    worst = std::fmax(worst, std::fabs(found - expected) / (1 + std::fabs(expected)));
  };
  for (int64_t i = 0; i < B * T * O; ++i) {
    const int64_t m = i / O, o = i % O;
    double sum = 0;
    for (int64_t x = 0; x < D; ++x) sum += encodings[m * D + x] * weight[o * D + x];
    for (int64_t j = 0; j < J; ++j) {
      const int64_t slot = index[m / T * J + j];
      if (slot >= 0) sum += gates[m * J + j] * outputs[slot * O + o] - components[m * J + j] * targets[slot * O + o];
    }
    compare(result[i], sum);
  }
  const double bound = dtype == PERFUSION_FLOAT16 ? 0x1p-9 : 0x1p-6;
  int failures = failed(status, worst, bound, "edited_projection");

  Tensor<Element> by_encodings(dtype, {B, T, D}), by_outputs(dtype, {S, O}), by_targets(dtype, {S, O});
  Tensor<float> by_gates(PERFUSION_FLOAT32, {B, T, J}), by_components(PERFUSION_FLOAT32, {B, T, J});
  perfusion_edited_projection_backward_params q{};
  q.B = B, q.T = T, q.D = D, q.O = O, q.J = J, q.S = S;
  q.gradient = gradient.view, q.weight = p.weight, q.gates = p.gates, q.components = p.components, q.index = p.index;
  q.outputs = p.outputs, q.projected_targets = p.projected_targets;
  q.encodings_gradient = by_encodings.view, q.gates_gradient = by_gates.view, q.components_gradient = by_components.view;
  q.outputs_gradient = by_outputs.view, q.projected_targets_gradient = by_targets.view;
  status = perfusion_edited_projection_backward_workspace(&q, &q.workspace_bytes);
  std::unique_ptr<unsigned char[]> workspace(new unsigned char[q.workspace_bytes]);
  q.workspace = workspace.get();
  if (status == PERFUSION_OK) status = perfusion_edited_projection_backward(&q, nullptr);

  worst = 0;
  for (int64_t i = 0; i < B * T * D; ++i) {
    double sum = 0;
    for (int64_t o = 0; o < O; ++o) sum += gradient[i / D * O + o] * weight[o * D + i % D];
    compare(by_encodings[i], sum);
  }
  std::vector<double> do_(S * O), dp(S * O);
  for (int64_t i = 0; i < B * T * J; ++i) {
    const int64_t m = i / J, slot = index[m / T * J + i % J];
    double dg = 0, da = 0;
    for (int64_t o = 0; o < O && slot >= 0; ++o) {
      const double dy = gradient[m * O + o];
      dg += dy * outputs[slot * O + o], da -= dy * targets[slot * O + o];
      do_[slot * O + o] += gates[i] * dy, dp[slot * O + o] -= components[i] * dy;
    }
    compare(by_gates[i], dg), compare(by_components[i], da);
  }
  for (int64_t i = 0; i < S * O; ++i) compare(by_outputs[i], do_[i]), compare(by_targets[i], dp[i]);
  return failures + failed(status, worst, bound, "edited_projection_backward");
}

// Whether the kernels of `operation` are to run: all of them, unless a barrier in another operator's own files is left out.
bool concerned(const std::string& operation) {
  const std::string& dropped = host::machine().dropped;
  for (const char* each : {"concept_gates", "edited_projection", "edited_attention", "fused_edited_attention"}) {
    if (dropped.rfind(each, 0) == 0) return each == operation;
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
      host::machine().device.multiprocessors = 64;  // several
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 150, 16, 40, 9);
      host::machine().device.multiprocessors = 0;
    }
    if (concerned("fused_edited_attention")) {
      failures += attention<Half>(PERFUSION_FLOAT16, 33, 77, 40, 2, 100);
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 5, 81, 40, 1, 72);
    }
    if (concerned("edited_projection")) {
      host::machine().device.multiprocessors = 64;
      failures += projection<Half>(PERFUSION_FLOAT16, 17, 19, 300, 2);  // small tiles, two parts of a sum
      failures += projection<BFloat16>(PERFUSION_BFLOAT16, 3, 16, 24, 9);
      host::machine().device.multiprocessors = 0;  // large tiles
      failures += projection<BFloat16>(PERFUSION_BFLOAT16, 41, 72, 131, 1);
    }
    if (concerned("concept_gates")) {
      failures += gates<Half>(PERFUSION_FLOAT16, 18, 37, 3);
      failures += gates<BFloat16>(PERFUSION_BFLOAT16, 5, 64, 8);
      failures += gates<float>(PERFUSION_FLOAT32, 5, 64, 11);
      failures += gates<Half>(PERFUSION_FLOAT16, 17, 192, 130);  // in the workspace
      failures += gates<BFloat16>(PERFUSION_BFLOAT16, 17, 603, 2);  // more slices than warps
    }
  }
  if (count > 1 && host::machine().drops == 0) std::printf("no kernel came to a barrier at %s\n", arguments[1]);
  return failures;
}
