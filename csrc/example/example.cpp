// One prompt with one concept through the C API, without torch: gates and components of its tokens, then attention to the keys
// and values that the concept edits. Lists the compiled kernels, prints both results, and returns 0 if they agree with the formulas.
#include <perfusion_kernels.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "memory.h"

static uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// A dense tensor on the device, filled by `value(i)`; freed with the process.
template <class Element, class Value>
static perfusion_tensor tensor(perfusion_dtype dtype, std::vector<int64_t> shape, Value value) {
  perfusion_tensor result = {nullptr, dtype, {}};
  int64_t count = 1;
  for (size_t i = shape.size(); i-- > 0; count *= shape[i]) result.strides[i] = count;
  std::vector<Element> elements(count);
  for (int64_t i = 0; i < count; ++i) elements[i] = value(i);
  result.data = allocate(count * sizeof(Element));
  copy_to_device(result.data, elements.data(), count * sizeof(Element));
  return result;
}

template <class Element>
static std::vector<Element> elements_of(const perfusion_tensor &tensor, int64_t count) {
  std::vector<Element> elements(count);
  copy_to_host(elements.data(), tensor.data, count * sizeof(Element));
  return elements;
}

static bool done(perfusion_status status) {
  if (status != PERFUSION_OK) std::printf("%s\n", perfusion_last_message());
  return status == PERFUSION_OK;
}

static void print_compiled_kernels() {
  const perfusion_compiled_kernel *kernels = nullptr;
  const int64_t count = perfusion_compiled_kernels(&kernels);
  std::set<std::string> architectures;
  for (int64_t i = 0; i < count; ++i) architectures.insert(kernels[i].architecture);
  std::printf("%d compiled kernels", static_cast<int>(count));
  if (count == 0) std::printf(": this library is built for the CPU");
  for (const std::string &each : architectures) std::printf("%s %s", each == *architectures.begin() ? " for" : ",", each.c_str());
  std::puts("");
}

int main() {
  print_compiled_kernels();
  constexpr int64_t B = 1, N = 5, T = 3, H = 1, d = 32, D = 4, J = 1, S = 1;
  const auto some = [](int64_t i) { return std::sin(1.0f + 0.7f * i); };
  const auto halves = [&](int64_t i) { return bfloat16(some(i)); };
  const auto zero = [](int64_t) { return 0.0f; };

  perfusion_concept_gates_params gates = {};
  gates.B = B, gates.T = T, gates.D = D, gates.J = J, gates.S = S;
  gates.encodings = tensor<float>(PERFUSION_FLOAT32, {B, T, D}, some);
  gates.targets = tensor<float>(PERFUSION_FLOAT32, {S, D}, [&](int64_t i) { return some(i + 3); });
  gates.metric_targets = tensor<float>(PERFUSION_FLOAT32, {S, D}, [&](int64_t i) { return 2 * some(i + 3); });  // C = 1 / 2
  gates.index = tensor<int32_t>(PERFUSION_INT32, {B, J}, [](int64_t) { return 0; });
  gates.bias = tensor<float>(PERFUSION_FLOAT32, {B, J}, [](int64_t) { return 0.7f; });
  gates.temperature = tensor<float>(PERFUSION_FLOAT32, {B, J}, [](int64_t) { return 0.15f; });
  gates.gates = tensor<float>(PERFUSION_FLOAT32, {B, T, J}, zero);
  gates.components = tensor<float>(PERFUSION_FLOAT32, {B, T, J}, zero);
  if (!done(perfusion_concept_gates(&gates, nullptr))) return 1;

  perfusion_edited_attention_params attention = {};
  attention.B = B, attention.N = N, attention.T = T, attention.H = H, attention.d = d, attention.J = J, attention.S = S;
  attention.query = tensor<uint16_t>(PERFUSION_BFLOAT16, {B, N, H, d}, halves);
  attention.key = tensor<uint16_t>(PERFUSION_BFLOAT16, {B, T, H, d}, halves);
  attention.value = tensor<uint16_t>(PERFUSION_BFLOAT16, {B, T, H, d}, halves);
  attention.gates = gates.gates, attention.components = gates.components, attention.index = gates.index;
  attention.value_outputs = tensor<uint16_t>(PERFUSION_BFLOAT16, {S, H * d}, [](int64_t) { return bfloat16(2.0f); });
  attention.value_targets = tensor<uint16_t>(PERFUSION_BFLOAT16, {S, H * d}, [](int64_t) { return bfloat16(-0.5f); });
  attention.output = tensor<uint16_t>(PERFUSION_BFLOAT16, {B, N, H, d}, [](int64_t) { return bfloat16(0.0f); });
  attention.scale = 0.2f;
  if (!done(perfusion_edited_attention(&attention, nullptr))) return 1;

  double worst = 0;
  const auto g = elements_of<float>(gates.gates, B * T * J), a = elements_of<float>(gates.components, B * T * J);
  for (int64_t t = 0; t < T; ++t) {  // J = 1: a = c, and any scale of metric_targets cancels
    double product = 0, energy = 0;
    for (int64_t x = 0; x < D; ++x) product += some(t * D + x) * some(x + 3), energy += some(x + 3) * some(x + 3);
    const double c = product / energy, gate = 1 / (1 + std::exp((0.7 - c) / 0.15));
    worst = std::fmax(worst, std::fmax(std::fabs(g[t] - gate), std::fabs(a[t] - c)));
    std::printf("token %d: gate %.3f, component %.3f\n", static_cast<int>(t), g[t], a[t]);
  }
  const auto output = elements_of<uint16_t>(attention.output, B * N * H * d);
  for (int64_t n = 0; n < N; ++n) {
    double weights[T], sum = 0;
    for (int64_t t = 0; t < T; ++t) {
      double score = 0;
      for (int64_t x = 0; x < d; ++x) score += widened(halves(n * d + x)) * widened(halves(t * d + x));
      sum += weights[t] = std::exp(0.2 * score);
    }
    for (int64_t x = 0; x < d; ++x) {
      double expected = 0;
      for (int64_t t = 0; t < T; ++t) expected += weights[t] / sum * (widened(halves(t * d + x)) + 2.0 * g[t] + 0.5 * a[t]);
      worst = std::fmax(worst, std::fabs(widened(output[n * d + x]) - expected));
    }
  }
  std::printf("largest error %.2g\n", worst);
  return worst < 0.03 ? 0 : 1;
}
