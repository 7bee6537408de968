// Every operator of the C API at odd sizes, in every dtype, with dense tensors and with views, for rows with and without concepts;
// each result is compared with the formula in double precision. Links the C API and nothing else of the library, so it runs on
// the CPU build, and on a GPU under compute-sanitizer's memcheck, racecheck, synccheck and initcheck.
//
//   sweep [dense] [WIDTH] [OPERATOR…]      all operators by default; dense: without views. WIDTH: columns of a head, 40 by default. The
//                                          exit status is the number of cases that failed, at most 99
//
// Each tensor has memory of its own and of exactly its size. There are three layouts: "dense"; "apart", in which only every second element
// of a row is the tensor's and rows are further apart too; and "padded", in which rows begin at multiples of 16 bytes, so that kernels
// access 16 bytes at once. The elements between those of the tensor are NaN, and must be neither read nor written. In the layout "apart"
// some indices and slots are out of range: kernels must read nothing for them, and a flag is set.
//
// On a GPU the sizes here are too small for its default plans to differ; PERFUSION_MULTIPROCESSORS (csrc/README.md) chooses others.
#include <perfusion_kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "memory.h"

namespace {

using Shape = std::vector<int64_t>;

enum Layout { dense, apart, padded };  // contiguous; gaps between all elements; rows padded to multiples of 16 bytes

std::mt19937 generator(1);
int failures = 0;

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Rounds to nearest even; subnormal float16 included, infinity and NaN not.
uint32_t encode(perfusion_dtype dtype, double x) {
  const uint32_t bits = float_bits(static_cast<float>(x));
  if (dtype == PERFUSION_FLOAT32) return bits;
  if (dtype == PERFUSION_BFLOAT16) return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const double magnitude = std::fabs(x);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent, -13) - 11);  // of the last place
  const double rounded = std::nearbyint(magnitude / unit);
  const uint32_t sign = x < 0 ? 0x8000 : 0;
  if (exponent < -13) return sign | static_cast<uint32_t>(rounded);
  return sign | static_cast<uint32_t>((exponent + 13) * 1024 + static_cast<int>(rounded));
}

double decode(perfusion_dtype dtype, uint32_t bits) {
  if (dtype == PERFUSION_FLOAT16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double value = exponent == 31 ? NAN : exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -value : value;
  }
  if (dtype == PERFUSION_BFLOAT16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

double rounding(perfusion_dtype dtype) {
  return dtype == PERFUSION_FLOAT16 ? 0x1p-10 : dtype == PERFUSION_BFLOAT16 ? 0x1p-7 : 0x1p-23;
}

// A tensor on the device and its values on the host, in the order of its shape.
class Tensor {
 public:
  Tensor(perfusion_dtype dtype, Shape shape, Layout layout, std::function<double(int64_t)> value) : dtype(dtype) {
    view.dtype = dtype;
    int64_t stride = layout == apart ? 2 : 1;
    const int64_t begin = layout == apart ? 3 : 0;
    for (size_t i = shape.size(); i-- > 0;) {
      view.strides[i] = stride;
      stride *= shape[i] + (layout == apart);
      if (layout == padded && i + 1 == shape.size()) stride = (stride + 7) / 8 * 8;
      count *= shape[i];
    }
    const int64_t elements = begin + stride;
    width = dtype == PERFUSION_FLOAT16 || dtype == PERFUSION_BFLOAT16 ? 2 : 4;
    image.assign(elements * width, 0xff);  // NaN; as an index out of any range
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, offset = begin;
      for (size_t k = shape.size(); k-- > 0; rest /= shape[k]) offset += rest % shape[k] * view.strides[k];
      places.push_back(offset);
      const uint32_t bits = dtype == PERFUSION_INT32 ? static_cast<uint32_t>(static_cast<int32_t>(value(i))) : encode(dtype, value(i));
      std::memcpy(&image[offset * width], &bits, width);
    }
    memory = allocate(std::max<size_t>(image.size(), 1));
    copy_to_device(memory, image.data(), image.size());
    view.data = static_cast<unsigned char *>(memory) + begin * width;
  }
  ~Tensor() { free_device(memory); }
  Tensor(const Tensor &) = delete;

  double operator[](int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, &image[places[i] * width], width);
    return dtype == PERFUSION_INT32 ? static_cast<double>(static_cast<int32_t>(bits)) : decode(dtype, bits);
  }

  // Whether the gaps are unchanged; from then on operator[] returns what was written.
  bool read_back() {
    std::vector<unsigned char> now(image.size());
    copy_to_host(now.data(), memory, now.size());
    image.swap(now);
    for (int64_t place : places) std::memcpy(&now[place * width], &image[place * width], width);
    return now == image;
  }

  perfusion_tensor view{};
  int64_t count = 1;
  const perfusion_dtype dtype;

 private:
  size_t width;
  std::vector<int64_t> places;  // in elements of the image
  std::vector<unsigned char> image;
  void *memory;
};

double normal(int64_t) { return std::normal_distribution<double>()(generator); }
double nothing(int64_t) { return 0; }

struct Workspace {
  explicit Workspace(int64_t bytes) : data(allocate(std::max<int64_t>(bytes, 1))) {
    const std::vector<unsigned char> poison(bytes, 0xff);
    copy_to_device(data, poison.data(), poison.size());
  }
  ~Workspace() { free_device(data); }
  void *data;
};

// A sum in double, and the sum of the terms' magnitudes, which bounds the rounding error.
struct Sum {
  double value = 0, terms = 0;
  void add(double x) { value += x, terms += std::fabs(x); }
  void add(double factor, const Sum &other) { value += factor * other.value, terms += std::fabs(factor) * other.terms; }
};

// One case: compares, and prints the first error.
class Case {
 public:
  Case(std::string name, perfusion_status status) : name(std::move(name)) {
    if (status != PERFUSION_OK) complain(perfusion_last_message());
  }
  ~Case() { failures += failed; }
  void results(std::initializer_list<Tensor *> written) {
    for (Tensor *each : written) {
      if (!each->read_back()) complain("memory beside a result was written");
    }
  }
  // After `results`, which waits for the device: whether a kernel found a slot, or an index, out of range.
  void check_flags(bool slot, bool index) {
    int32_t errors[PERFUSION_DEVICE_ERRORS] = {};
    if (perfusion_device_errors(errors) != PERFUSION_OK) complain(perfusion_last_message());
    if ((errors[PERFUSION_SLOT_OUT_OF_RANGE] != 0) != slot) complain("the flag of slots out of range is wrong");
    if ((errors[PERFUSION_INDEX_OUT_OF_RANGE] != 0) != index) complain("the flag of an index out of range is wrong");
  }
  void compare(const Tensor &found, int64_t i, double expected, double terms, double roundings = 4) {
    const double error = std::fabs(found[i] - expected), bound = roundings * rounding(found.dtype) * (terms + std::fabs(expected)) + 1e-7;
    if (error <= bound) return;  // which NaN is not
    complain("element " + std::to_string(i) + " has error " + std::to_string(error) + ", bound " + std::to_string(bound));
  }

 private:
  void complain(const std::string &what) {
    if (!failed) std::printf("%s: %s\n", name.c_str(), what.c_str());
    failed = true;
  }
  std::string name;
  bool failed = false;
};

std::string label(const char *name, perfusion_dtype dtype, std::initializer_list<std::pair<const char *, int64_t>> sizes) {
  const char *const dtypes[] = {"float16", "bfloat16", "float32"};
  std::string text = std::string(name) + ", " + dtypes[dtype];
  for (auto [letter, size] : sizes) text += std::string(", ") + letter + " = " + std::to_string(size);
  return text;
}

// Concepts of B rows: row 0 has none, the others use all of J places, except that in odd rows the first is absent or out of range.
struct Edit {
  Edit(int64_t B, int64_t T, int64_t J, int64_t O, perfusion_dtype dtype, Layout layout)
      : T(T), J(J), O(O), S(J + 2), out_of_range(layout == apart && J % 2),
        gates(PERFUSION_FLOAT32, {B, T, J}, layout, normal), components(PERFUSION_FLOAT32, {B, T, J}, layout, normal),
        index(PERFUSION_INT32, {B, J}, layout, [=](int64_t i) -> double {
          if (i >= J && i / J % 2 && i % J == 0) return !out_of_range ? -1 : J % 4 == 1 ? J + 2 : -2;
          return i < J ? -1 : 1 + (i + i / J) % J;
        }),
        outputs(dtype, {J + 2, O}, layout, normal), targets(dtype, {J + 2, O}, layout, normal) {}

  int64_t slot(int64_t b, int64_t j) const {
    const auto found = static_cast<int64_t>(index[b * J + j]);
    return found < S ? found : -1;
  }
  // Σ_j (g_j outputs_j - a_j targets_j) of one token and column
  void add_to(Sum &sum, int64_t b, int64_t t, int64_t o, const Tensor &outputs, const Tensor &targets) const {
    for (int64_t j = 0; j < J; ++j) {
      const int64_t s = slot(b, j), i = (b * T + t) * J + j;
      if (s >= 0) sum.add(gates[i] * outputs[s * O + o]), sum.add(-components[i] * targets[s * O + o]);
    }
  }

  int64_t T, J, O, S;
  bool out_of_range;  // whether an index is
  Tensor gates, components, index, outputs, targets;
};

// words: gates by word, for concepts of up to two words; some places are -1 or beyond the text.
void concept_gates(perfusion_dtype dtype, int64_t T, int64_t D, int64_t J, Layout layout, bool words = false) {
  const int64_t B = 3, S = J + 2, P = 2;
  Edit edit(B, T, J, 1, PERFUSION_FLOAT32, layout);  // for its index
  Tensor encodings(dtype, {B, T, D}, layout, normal), targets(PERFUSION_FLOAT32, {S, D}, layout, normal);
  Tensor bias(PERFUSION_FLOAT32, {B, J}, layout, [](int64_t i) { return 0.1 * (i % 7); });
  Tensor temperature(PERFUSION_FLOAT32, {B, J}, layout, [](int64_t i) { return 0.5 + 0.1 * (i % 3); });
  Tensor gates(PERFUSION_FLOAT32, {B, T, J}, layout, nothing), components(PERFUSION_FLOAT32, {B, T, J}, layout, nothing);
  Tensor places(PERFUSION_INT32, {B, J, P}, layout, [T](int64_t i) { return i % 5 == 4 ? -1 : i * 3 % (T + 1); });
  Tensor floor(PERFUSION_FLOAT32, {B, J}, layout, [](int64_t i) { return 0.25 * (i % 4); });
  perfusion_concept_gates_params p = {};
  p.B = B, p.T = T, p.D = D, p.J = J, p.S = S;
  if (words) p.places = places.view, p.P = P, p.floor = floor.view;
  p.encodings = encodings.view, p.targets = targets.view, p.metric_targets = targets.view;  // C = 1
  p.index = edit.index.view, p.bias = bias.view, p.temperature = temperature.view;
  p.gates = gates.view, p.components = components.view;
  perfusion_status status = perfusion_concept_gates_workspace(&p, &p.workspace_bytes);
  Workspace workspace(p.workspace_bytes);
  p.workspace = workspace.data;
  if (status == PERFUSION_OK) status = perfusion_concept_gates(&p, nullptr);

  Case one(label("concept_gates", dtype, {{"T", T}, {"D", D}, {"J", J}, {"layout", layout}, {"words", words}}), status);
  one.results({&gates, &components});
  one.check_flags(false, edit.out_of_range);
  const auto is_word = [&](int64_t b, int64_t j, int64_t t) {
    bool found = false;
    for (int64_t i = 0; i < P && words && edit.slot(b, j) >= 0; ++i) found = found || places[(b * J + j) * P + i] == t;
    return found;
  };
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> energy(J), gram(J * J);
    for (int64_t i = 0; i < J * J; ++i) {
      const int64_t j = edit.slot(b, i / J), k = edit.slot(b, i % J);
      for (int64_t x = 0; x < D && j >= 0 && k >= 0; ++x) gram[i] += targets[j * D + x] * targets[k * D + x];
    }
    for (int64_t j = 0; j < J; ++j) energy[j] = gram[j * J + j];
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t j = 0; j < J; ++j) {
        const int64_t i = (b * T + t) * J + j, s = edit.slot(b, j);
        if (s < 0) {
          one.compare(gates, i, 0, 0), one.compare(components, i, 0, 0);
          continue;
        }
        Sum product, rest;  // e - Σ_k a_k i*_k is orthogonal to every i*_j
        for (int64_t x = 0; x < D; ++x) product.add(encodings[(b * T + t) * D + x] * targets[s * D + x] / energy[j]);
        rest = product;
        for (int64_t k = 0; k < J; ++k) rest.add(-components[(b * T + t) * J + k] * gram[j * J + k] / energy[j]);
        const double steepness = 1 / (0.5 + 0.1 * ((b * J + j) % 3));
        double gate = 1 / (1 + std::exp((0.1 * ((b * J + j) % 7) - product.value) * steepness));
        bool of_another = false;
        for (int64_t k = 0; k < J; ++k) of_another = of_another || (k != j && is_word(b, k, t));
        if (is_word(b, j, t)) gate = std::max(gate, floor[b * J + j]);
        else if (of_another) gate = 0;
        one.compare(gates, i, gate, steepness * product.terms, 16);
        one.compare(components, i, components[i] + rest.value, rest.terms, 64);
      }
    }
  }
}

// The derivatives to compute.
struct Derivatives {
  bool encodings, gates, components, outputs, targets;
};

void edited_projection_backward(const perfusion_edited_projection_params &p, const Tensor &weight, const Edit &edit, Layout layout,
                                const Derivatives &wanted) {
  const int64_t B = p.B, T = p.T, D = p.D, O = p.O, J = p.J;
  const perfusion_dtype dtype = p.encodings.dtype, tables = p.outputs.dtype;
  Tensor gradient(dtype, {B, T, O}, layout, normal), by_encodings(dtype, {B, T, D}, layout, nothing);
  Tensor by_outputs(tables, {edit.S, O}, layout, nothing), by_targets(tables, {edit.S, O}, layout, nothing);
  Tensor by_gates(PERFUSION_FLOAT32, {B, T, J}, layout, nothing), by_components(PERFUSION_FLOAT32, {B, T, J}, layout, nothing);
  perfusion_edited_projection_backward_params q = {};
  q.B = B, q.T = T, q.D = D, q.O = O, q.J = J, q.S = edit.S;
  q.gradient = gradient.view, q.weight = p.weight, q.gates = p.gates, q.components = p.components, q.index = p.index;
  q.outputs = p.outputs, q.projected_targets = p.projected_targets;
  if (wanted.encodings) q.encodings_gradient = by_encodings.view;
  if (wanted.gates) q.gates_gradient = by_gates.view;
  if (wanted.components) q.components_gradient = by_components.view;
  if (wanted.outputs) q.outputs_gradient = by_outputs.view;
  if (wanted.targets) q.projected_targets_gradient = by_targets.view;
  perfusion_status status = perfusion_edited_projection_backward_workspace(&q, &q.workspace_bytes);
  Workspace workspace(q.workspace_bytes);
  q.workspace = workspace.data;
  if (status == PERFUSION_OK) status = perfusion_edited_projection_backward(&q, nullptr);

  const bool edited = wanted.gates || wanted.components || wanted.outputs || wanted.targets;
  Case one(label("edited_projection_backward", dtype,
                 {{"T", T}, {"D", D}, {"O", O}, {"J", J}, {"tables", tables}, {"layout", layout}, {"by encodings", wanted.encodings},
                  {"by gates", wanted.gates}, {"by components", wanted.components}, {"by outputs", wanted.outputs},
                  {"by targets", wanted.targets}}), status);
  one.results({&by_encodings, &by_gates, &by_components, &by_outputs, &by_targets});
  one.check_flags(false, edit.out_of_range && edited);
  for (int64_t i = 0; i < B * T * D && wanted.encodings; ++i) {
    Sum sum;
    for (int64_t o = 0; o < O; ++o) sum.add(gradient[i / D * O + o] * weight[o * D + i % D]);
    one.compare(by_encodings, i, sum.value, sum.terms, 1);
  }
  const double roundings = tables == PERFUSION_FLOAT32 ? 16 : 1;  // of a sum in float32, or of its result
  std::vector<Sum> of_outputs(edit.S * O), of_targets(edit.S * O);
  for (int64_t i = 0; i < B * T * J; ++i) {
    const int64_t m = i / J, slot = edit.slot(m / T, i % J);
    Sum of_gate, of_component;
    for (int64_t o = 0; o < O && slot >= 0; ++o) {
      const double dy = gradient[m * O + o];
      of_gate.add(dy * edit.outputs[slot * O + o]), of_component.add(-dy * edit.targets[slot * O + o]);
      of_outputs[slot * O + o].add(edit.gates[i] * dy), of_targets[slot * O + o].add(-edit.components[i] * dy);
    }
    if (wanted.gates) one.compare(by_gates, i, of_gate.value, of_gate.terms, 16);
    if (wanted.components) one.compare(by_components, i, of_component.value, of_component.terms, 16);
  }
  for (int64_t i = 0; i < edit.S * O; ++i) {
    if (wanted.outputs) one.compare(by_outputs, i, of_outputs[i].value, of_outputs[i].terms, roundings);
    if (wanted.targets) one.compare(by_targets, i, of_targets[i].value, of_targets[i].terms, roundings);
  }
}

// tables: the dtype of outputs and targets, and of their derivatives. partial: derivatives by the encodings alone, by gates and
// projected_targets alone, and by both tables alone, instead of all.
void edited_projection(perfusion_dtype dtype, int64_t T, int64_t D, int64_t O, int64_t J, Layout layout, perfusion_dtype tables,
                       bool partial) {
  const int64_t B = 3;
  Edit edit(B, T, J, O, tables, layout);
  Tensor encodings(dtype, {B, T, D}, layout, normal), weight(dtype, {O, D}, layout, normal);
  Tensor result(dtype, {B, T, O}, layout, nothing);
  perfusion_edited_projection_params p = {};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = edit.S;
  p.encodings = encodings.view, p.weight = weight.view, p.gates = edit.gates.view, p.components = edit.components.view;
  p.index = edit.index.view, p.outputs = edit.outputs.view, p.projected_targets = edit.targets.view, p.result = result.view;
  for (bool fused : {false, true}) {
    const perfusion_status status = fused ? perfusion_fused_edited_projection(&p, nullptr) : perfusion_edited_projection(&p, nullptr);
    const char *name = fused ? "fused_edited_projection" : "edited_projection";
    Case one(label(name, dtype, {{"T", T}, {"D", D}, {"O", O}, {"J", J}, {"tables", tables}, {"layout", layout}}), status);
    one.results({&result});
    one.check_flags(false, edit.out_of_range);
    for (int64_t i = 0; i < B * T * O; ++i) {
      Sum sum;
      for (int64_t x = 0; x < D; ++x) sum.add(encodings[i / O * D + x] * weight[i % O * D + x]);
      edit.add_to(sum, i / O / T, i / O % T, i % O, edit.outputs, edit.targets);
      one.compare(result, i, sum.value, sum.terms, 1);
    }
  }

  if (partial) {
    edited_projection_backward(p, weight, edit, layout, {true, false, false, false, false});
    edited_projection_backward(p, weight, edit, layout, {false, true, false, false, true});
    edited_projection_backward(p, weight, edit, layout, {false, false, false, true, true});
  } else {
    edited_projection_backward(p, weight, edit, layout, {true, true, true, true, true});
  }
}

// Options of an attention case.
enum : unsigned {
  with_slots = 1,
  with_regions = 2,
  keys_alone = 4,      // K is edited, V is not
  values_alone = 8,    // V is edited, K is not
  single_tables = 16,  // the tables are float32
};

// edited_attention, or with a D fused_edited_attention; J = 0 is the plain one.
void attention(perfusion_dtype dtype, int64_t N, int64_t T, int64_t d, int64_t J, int64_t D, Layout layout, unsigned given = 0) {
  const int64_t B = 3, H = 2, O = H * d, P = given & with_slots ? 4 : B;
  const bool edited_keys = !(given & values_alone), edited_values = !(given & keys_alone);
  const perfusion_dtype tables = given & single_tables ? PERFUSION_FLOAT32 : dtype;
  const double scale = 0.7 / std::sqrt(static_cast<double>(d));
  Edit of_keys(P, T, J, O, tables, layout);
  Tensor slots(PERFUSION_INT32, {B}, layout, [=](int64_t b) { return layout == apart && b == 1 ? P : (b + 3) % 4; });
  // in the first row, some tokens have only bits that no key has, and no key has 0, so every key is masked
  Tensor query_regions(PERFUSION_INT32, {B, N}, layout, [N](int64_t i) { return i < N && i % 5 == 4 ? 8 : 1 << i % 3; });
  Tensor key_regions(PERFUSION_INT32, {B, T}, layout, [T](int64_t i) { return i < T || i % 4 ? 1 << i % 3 : 0; });
  Tensor value_outputs(tables, {J + 2, O}, layout, normal), value_targets(tables, {J + 2, O}, layout, normal);
  Tensor query(dtype, {B, N, H, d}, layout, normal), key(dtype, {P, T, H, d}, layout, normal), value(dtype, {P, T, H, d}, layout, normal);
  Tensor output(dtype, {B, N, H, d}, layout, nothing);
  const auto small = [D](int64_t i) { return normal(i) / std::sqrt(D + 1.0); };
  Tensor encodings(dtype, {B, T, D}, layout, normal), key_weight(dtype, {O, D}, layout, small), value_weight(dtype, {O, D}, layout, small);
  const auto fill = [&](auto &p) {
    p.B = B, p.N = N, p.T = T, p.H = H, p.d = d, p.J = J, p.S = of_keys.S, p.scale = static_cast<float>(scale);
    p.query = query.view, p.output = output.view;
    if (J == 0) return;
    p.gates = of_keys.gates.view, p.components = of_keys.components.view, p.index = of_keys.index.view;
    if (edited_keys) p.key_outputs = of_keys.outputs.view, p.key_targets = of_keys.targets.view;
    if (edited_values) p.value_outputs = value_outputs.view, p.value_targets = value_targets.view;
  };
  perfusion_status status;
  if (D == 0) {
    perfusion_edited_attention_params p = {};
    fill(p);
    p.key = key.view, p.value = value.view;
    if (given & with_slots) p.slots = slots.view, p.P = P;
    if (given & with_regions) p.query_regions = query_regions.view, p.key_regions = key_regions.view;
    status = perfusion_edited_attention(&p, nullptr);
  } else {
    perfusion_fused_edited_attention_params p = {};
    fill(p);
    p.D = D, p.encodings = encodings.view, p.key_weight = key_weight.view, p.value_weight = value_weight.view;
    status = perfusion_fused_edited_attention(&p, nullptr);
  }
  if (status == PERFUSION_UNSUPPORTED && T > 80 && d > 40) {  // K and V of a wide head need more shared memory than some devices have
    std::printf("not tried: %s\n", perfusion_last_message());
    return;
  }

  const char *name = D ? "fused_edited_attention" : "edited_attention";
  Case one(label(name, dtype, {{"N", N}, {"T", T}, {"D", D}, {"d", d}, {"J", J}, {"layout", layout}, {"given", given}}), status);
  one.results({&output});
  one.check_flags(given & with_slots && layout == apart, of_keys.out_of_range);
  const auto side = [&](const Tensor &base, const Tensor &weight, const Tensor &outputs, const Tensor &targets, bool edited,
                        int64_t m, int64_t o) {
    const int64_t b = m / T, t = m % T;
    Sum sum;
    if (D == 0) sum.add(base[(b * T + t) * O + o]);
    for (int64_t x = 0; x < D; ++x) sum.add(encodings[(b * T + t) * D + x] * weight[o * D + x]);
    if (edited) of_keys.add_to(sum, b, t, o, outputs, targets);
    return sum;
  };
  std::vector<Sum> k(T * O), v(T * O);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = given & with_slots ? static_cast<int64_t>(slots[b]) : b;
    if (row >= P) {
      for (int64_t i = 0; i < N * O; ++i) one.compare(output, b * N * O + i, 0, 0);
      continue;
    }
    for (int64_t i = 0; i < T * O; ++i) {
      k[i] = side(key, key_weight, of_keys.outputs, of_keys.targets, edited_keys, row * T + i / O, i % O);
      v[i] = side(value, value_weight, value_outputs, value_targets, edited_values, row * T + i / O, i % O);
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = ((b * N + n) * H + h) * d;
        std::vector<Sum> score(T);
        double most = -INFINITY, sum = 0, score_error = 0;  // how much a rounding of the factors moves a score
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t x = 0; x < d; ++x) score[t].add(scale * query[at + x], k[t * O + h * d + x]);
          const int reach = static_cast<int>(key_regions[b * T + t]);
          if (given & with_regions && reach != 0 && !(reach & static_cast<int>(query_regions[b * N + n]))) score[t].value = -INFINITY;
          most = std::max(most, score[t].value), score_error = std::max(score_error, score[t].terms);
        }
        for (int64_t t = 0; t < T; ++t) sum += std::exp(score[t].value - most);
        for (int64_t x = 0; x < d; ++x) {
          Sum expected;
          for (int64_t t = 0; t < T && most > -INFINITY; ++t) expected.add(std::exp(score[t].value - most) / sum, v[t * O + h * d + x]);
          one.compare(output, at + x, expected.value, expected.terms * (1 + 0.1 * score_error), 1);
        }
      }
    }
  }
}

// Sizes whose products exceed 32-bit block counts, or 64 bits: they must be rejected before any product of sizes, any plan and any read.
template <class Params>
void too_large(const char *name, std::initializer_list<int64_t Params::*> sizes, Params p,
               perfusion_status (*function)(const Params *, perfusion_stream)) {
  for (int64_t size : {int64_t{1} << 30, int64_t{1} << 62}) {
    for (auto each : sizes) p.*each = size;
    const perfusion_status status = function(&p, nullptr);
    if (status == PERFUSION_INVALID_ARGUMENT || status == PERFUSION_UNSUPPORTED) continue;
    std::printf("%s: sizes of %lld are not rejected\n", name, static_cast<long long>(size)), ++failures;
  }
}

void too_large(const std::string &name) {
  if (name == "concept_gates") {
    using P = perfusion_concept_gates_params;
    too_large<P>("concept_gates", {&P::B, &P::T, &P::D, &P::J}, {}, perfusion_concept_gates);
  }
  if (name == "edited_projection") {
    using P = perfusion_edited_projection_params;
    using Q = perfusion_edited_projection_backward_params;
    for (auto function : {perfusion_edited_projection, perfusion_fused_edited_projection}) {
      too_large<P>("edited_projection", {&P::B, &P::T, &P::D, &P::O, &P::J}, {}, function);
    }
    too_large<Q>("edited_projection_backward", {&Q::B, &Q::T, &Q::D, &Q::O, &Q::J, &Q::S}, {}, perfusion_edited_projection_backward);
  }
  static int nothing;  // only the product of the sizes is too large, so that tensors must be given
  const perfusion_tensor there = {&nothing, PERFUSION_FLOAT16, {}};
  const auto heads = [&](auto p) {
    p.N = p.T = 1, p.d = 40, p.query = p.output = there;
    return p;
  };
  if (name == "edited_attention") {
    using P = perfusion_edited_attention_params;
    P p = heads(P{});
    p.key = p.value = there;
    too_large<P>("edited_attention", {&P::B, &P::H}, p, perfusion_edited_attention);
  }
  if (name == "fused_edited_attention") {
    using P = perfusion_fused_edited_attention_params;
    P p = heads(P{});
    p.D = 8, p.encodings = p.key_weight = p.value_weight = there;
    too_large<P>("fused_edited_attention", {&P::B, &P::H}, p, perfusion_fused_edited_attention);
  }
}

}  // namespace

int main(int count, char **names) {
  char **first = names + 1, **const last = names + count;
  const bool only_dense = first < last && std::string(*first) == "dense";
  first += only_dense;
  const int64_t d = first < last ? std::atoll(*first) : 0, width = d > 0 ? d : 40;
  first += d > 0;
  const auto wanted = [&](const std::string &name) { return first == last || std::count(first, last, name) > 0; };
  constexpr auto half = PERFUSION_FLOAT16, brain = PERFUSION_BFLOAT16, single = PERFUSION_FLOAT32;
  for (const char *name : {"concept_gates", "edited_projection", "edited_attention", "fused_edited_attention"}) {
    if (wanted(name)) too_large(name);
  }
  for (Layout layout : {dense, apart, padded}) {
    if (layout != dense && only_dense) break;
    if (wanted("concept_gates")) {
      concept_gates(half, 18, 37, 3, layout);
      concept_gates(brain, 5, 64, 8, layout);
      concept_gates(single, 5, 64, 11, layout);
      concept_gates(half, 18, 37, 3, layout, true);
      concept_gates(brain, 17, 603, 2, layout);           // more slices of columns than warps
      if (layout == dense) concept_gates(single, 1, 16, 128, layout);  // the largest J in shared memory
      if (layout == dense) concept_gates(half, 3, 40, 130, layout);  // in the workspace
    }
    if (wanted("edited_projection")) {  // with fused_edited_projection and the derivatives of both
      edited_projection(half, 17, 19, 300, 2, layout, half, false);
      edited_projection(brain, 3, 16, 24, 9, layout, single, true);
      edited_projection(brain, 41, 72, 131, 1, layout, brain, false);
    }
    if (wanted("edited_attention")) {
      attention(half, 70, 77, width, 2, 0, layout);
      attention(brain, 5, 81, width, 1, 0, layout, with_slots);
      attention(brain, 150, 16, width, 9, 0, layout, single_tables);
      attention(half, 33, 154, width, 0, 0, layout);
      attention(half, 1, 1, width, 1, 0, layout, keys_alone);
      attention(brain, 17, 231, width, 2, 0, layout, values_alone);  // more keys than fit in registers at once
      attention(half, 70, 77, width, 2, 0, layout, with_slots | with_regions);
      attention(brain, 300, 21, width, 1, 0, layout, with_slots | with_regions);
    }
    if (wanted("fused_edited_attention")) {
      attention(half, 33, 77, width, 2, 100, layout, values_alone | single_tables);
      attention(brain, 5, 81, width, 1, 72, layout);
    }
  }
  if (failures == 0) std::puts("every case is right");
  return std::min(failures, 99);
}
