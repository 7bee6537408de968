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
int projection(perfusion_dtype dtype, int64_t T, int64_t D, int64_t O, int64_t J) {
  const int64_t B = 2, S = J + 1;
  Tensor<Element> encodings(dtype, {B, T, D}), weight(dtype, {O, D}), tables[2] = {{dtype, {S, O}}, {dtype, {S, O}}}, result(dtype, {B, T, O});
  Tensor<float> gates(PERFUSION_FLOAT32, {B, T, J}), components(PERFUSION_FLOAT32, {B, T, J});
  std::unique_ptr<int32_t[]> index(new int32_t[B * J]);
  for (int64_t i = 0; i < B * J; ++i) index[i] = i < J ? -1 : static_cast<int32_t>(1 + i % J);
  encodings.random(), weight.random(1 / std::sqrt(static_cast<float>(D)));
  for (auto& each : tables) each.random();
  gates.random(0.3f), components.random(0.3f);
  perfusion_edited_projection_params p{};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = S;
  p.encodings = encodings.view, p.weight = weight.view, p.result = result.view;
  p.gates = gates.view, p.components = components.view, p.index = {index.get(), PERFUSION_INT32, {J, 1}};
  p.outputs = tables[0].view, p.projected_targets = tables[1].view;
  const perfusion_status status = perfusion_edited_projection(&p, nullptr);

  double worst = 0;
  for (int64_t i = 0; i < B * T * O; ++i) {
    const int64_t token = i / O, o = i % O;
    double expected = 0;
    for (int64_t x = 0; x < D; ++x) expected += encodings[token * D + x] * weight[o * D + x];
    for (int64_t j = 0; j < J; ++j) {
      const int64_t slot = index[token / T * J + j], at = token * J + j;
      if (slot >= 0) expected += gates[at] * tables[0][slot * O + o] - components[at] * tables[1][slot * O + o];
    }
    worst = std::fmax(worst, std::fabs(result[i] - expected));
  }
  return failed(status, worst, dtype == PERFUSION_FLOAT16 ? 0.02 : 0.15, "edited_projection");
}

// With d = 0 absorbed: a head is as wide as a token, and projects nothing.
template <class Element>
int layer(perfusion_dtype dtype, int64_t N, int64_t C, int64_t T, int64_t d) {
  const int64_t B = 2, H = 2, width = d ? d : C;
  Tensor<Element> x(dtype, {B, N, C}), key(dtype, {B, T, H, width}), value(dtype, {B, T, H, width}), output(dtype, {B, N, C});
  Tensor<Element> weights[2] = {{dtype, {H * d, C}}, {dtype, {C, H * d}}}, bias(dtype, {C});
  for (auto* each : {&x, &key, &value, &bias}) each->random();
  for (auto& each : weights) each.random(1 / std::sqrt(static_cast<float>(C)));
  perfusion_cross_attention_layer_params p{};
  p.B = B, p.N = N, p.C = C, p.T = T, p.H = H, p.d = d;
  p.hidden_states = p.residual = x.view, p.key = key.view, p.value = value.view, p.output = output.view, p.output_bias = bias.view;
  if (d) p.query_weight = weights[0].view, p.output_weight = weights[1].view;
  p.scale = 0.1f;
  perfusion_status status = perfusion_cross_attention_layer_workspace(&p, &p.workspace_bytes);
  std::unique_ptr<unsigned char[]> workspace(new unsigned char[p.workspace_bytes]);
  p.workspace = workspace.get();
  if (status == PERFUSION_OK) status = perfusion_cross_attention_layer(&p, nullptr);

  double worst = 0;
  std::vector<double> query(width), attended(width), scores(T), expected(C);
  for (int64_t token = 0; token < B * N; ++token) {
    for (int64_t c = 0; c < C; ++c) expected[c] = x[token * C + c] + bias[c];
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t i = 0; i < width; ++i) {
        query[i] = d ? 0 : x[token * C + i];
        for (int64_t c = 0; d && c < C; ++c) query[i] += x[token * C + c] * weights[0][(h * d + i) * C + c];
        attended[i] = 0;
      }
      const auto at = [&](int64_t t, int64_t i) { return ((token / N * T + t) * H + h) * width + i; };
      double sum = 0;
      for (int64_t t = 0; t < T; ++t) {
        double score = 0;
        for (int64_t i = 0; i < width; ++i) score += query[i] * key[at(t, i)];
        sum += scores[t] = std::exp(0.1 * score);
      }
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t i = 0; i < width; ++i) attended[i] += scores[t] / sum * value[at(t, i)];
      }
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t i = 0; d && i < d; ++i) expected[c] += attended[i] * weights[1][c * H * d + h * d + i];
        if (!d) expected[c] += attended[c];
      }
    }
    for (int64_t c = 0; c < C; ++c) worst = std::fmax(worst, std::fabs(output[token * C + c] - expected[c]));
  }
  return failed(status, worst, dtype == PERFUSION_FLOAT16 ? 0.02 : 0.15, "cross_attention_layer");
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
  for (const char* each : {"concept_gates", "edited_projection", "edited_attention", "fused_edited_attention", "cross_attention_layer"}) {
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
      host::machine().device.multiprocessors = 64;  // several
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 150, 16, 40, 9);
      host::machine().device.multiprocessors = 0;
    }
    if (concerned("fused_edited_attention")) {
      failures += attention<Half>(PERFUSION_FLOAT16, 33, 77, 40, 2, 100);
      failures += attention<BFloat16>(PERFUSION_BFLOAT16, 5, 81, 40, 1, 72);
    }
    if (concerned("cross_attention_layer")) {
      failures += layer<Half>(PERFUSION_FLOAT16, 70, 72, 77, 40);
      failures += layer<BFloat16>(PERFUSION_BFLOAT16, 5, 37, 81, 40);
      failures += layer<Half>(PERFUSION_FLOAT16, 18, 72, 13, 0);
    }
    if (concerned("edited_projection")) {
      failures += projection<Half>(PERFUSION_FLOAT16, 13, 70, 136, 9);
      failures += projection<BFloat16>(PERFUSION_BFLOAT16, 3, 8, 5, 1);
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
