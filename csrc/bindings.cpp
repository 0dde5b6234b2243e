// The operations as PyTorch sees them, with every argument checked once. Schemas are defined in Python (ops/cpu.py).
#include <cstring>

#include "checks.h"
#include "dispatch.h"
#include "tensor.h"

namespace tokenselect {
namespace {

constexpr int32_t kCpu = 0;  // PyTorch's number of that kind of device
constexpr int64_t kMostDims = 8;

template <class T>
T value_of(StableIValue value) {
  T out;
  std::memcpy(&out, &value, sizeof out);  // little endian, as everything that PyTorch runs on
  return out;
}

Pages pages_of(const Tensor& pages, int64_t page_size, const Tensor& padding) {
  pages.shaped({-1, -1}), padding.shaped({pages.size(0)});
  return {pages.data<int64_t>(), pages.size(1), page_size, padding.data<int64_t>()};
}

View view_of(const Tensor& cos, const Tensor& sin, int64_t run_size, const Tensor& runs, const Tensor& alike,
             const ScoreArgs& a) {
  cos.shaped({-1, a.half}), sin.shaped({cos.size(0), a.half}), runs.shaped({a.num_blocks + 1});
  const int64_t* first = alike.empty() ? nullptr : alike.shaped({a.num_blocks}).data<int64_t>();
  return {cos.data<float>(), sin.data<float>(), run_size, runs.data<int64_t>(), first};
}

// What an int8 copy of keys needs to be read: its scales, and the center that its keys are counted from.
void add_int8(const Tensor& key_scales, const Tensor& key_center, int64_t num_sequences, ScoreArgs& a) {
  if (a.keys.dtype != DType::i8) {
    if (!key_scales.empty()) refuse("key_scales", "absent unless keys are int8", "some");
    if (!key_center.empty()) refuse("key_center", "absent unless keys are int8", "some");
    return;
  }
  key_scales.shaped({a.keys.count, a.num_kv_heads});
  a.key_scales = {key_scales.strided<float>(), a.keys.count, key_scales.stride(0), key_scales.stride(1), DType::f32};
  if (!key_center.empty())
    a.key_center = key_center.shaped({num_sequences, a.num_kv_heads, a.head_dim}).data<float>();
}

void score_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0], "queries"), keys(stack[1], "keys"), key_scales(stack[2], "key_scales");
  const Tensor pages(stack[3], "pages"), padding(stack[4], "padding");
  const int64_t page_size = value_of<int64_t>(stack[5]);
  const Tensor sequences(stack[6], "sequences"), candidates(stack[7], "candidates"), context(stack[8], "context");
  const Tensor cos0(stack[9], "cos"), sin0(stack[10], "sin"), runs0(stack[11], "run_start_loc");
  const int64_t run_size0 = value_of<int64_t>(stack[12]);
  const Tensor cos1(stack[13], "cos"), sin1(stack[14], "sin"), runs1(stack[15], "run_start_loc");
  const int64_t run_size1 = value_of<int64_t>(stack[16]);
  const bool interleaved = value_of<bool>(stack[17]);
  const double scale = value_of<double>(stack[18]);
  const Tensor start_loc(stack[19], "start_loc"), key_center(stack[20], "key_center");
  const Tensor alike0(stack[21], "alike"), alike1(stack[22], "alike");
  const double horizon = value_of<double>(stack[23]), prior = value_of<double>(stack[24]);
  const Tensor votes(stack[25], "votes");
  ScoreArgs args{};
  args.queries = queries.shaped({-1, -1, -1}).data<float>();
  args.num_blocks = queries.size(0), args.num_q_heads = queries.size(1), args.head_dim = queries.size(2);
  args.keys = keys.shaped({-1, -1, args.head_dim}).rows();
  args.num_kv_heads = keys.size(1);
  args.half = cos0.shaped({-1, -1}).size(1);
  check_heads(args.num_q_heads, args.num_kv_heads, args.head_dim, args.half);
  add_int8(key_scales, key_center, pages.shaped({-1, -1}).size(0), args);
  args.pages = pages_of(pages, page_size, padding);
  args.sequences = sequences.shaped({args.num_blocks}).data<int64_t>();
  args.candidates = candidates.shaped({args.num_blocks, 2}).data<int64_t>();
  args.context = context.shaped({args.num_blocks, 2}).data<int64_t>();
  args.views[0] = view_of(cos0, sin0, run_size0, runs0, alike0, args);
  args.views[1] = view_of(cos1, sin1, run_size1, runs1, alike1, args);
  args.num_views = run_size1 ? 2 : 1;
  args.interleaved = interleaved;
  args.scale = (float)scale, args.horizon = (float)horizon, args.prior = (float)prior;
  args.start_loc = start_loc.shaped({args.num_blocks + 1}).data<int64_t>();
  args.votes = votes.shaped({-1}).data<float>();
  check_values(args, {pages.size(0), votes.size(0), {cos0.size(0), cos1.size(0)}});
  kernels(args.head_dim).score_tokens(args);
}

void topk_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor votes(stack[0], "votes"), start_loc(stack[1], "start_loc");
  const int64_t k = value_of<int64_t>(stack[2]);
  const Tensor indices(stack[3], "indices");
  TopkArgs args{};
  args.votes = votes.shaped({-1}).data<float>();
  args.num_blocks = indices.shaped({-1, k}).size(0), args.k = k;
  args.start_loc = start_loc.shaped({args.num_blocks + 1}).data<int64_t>();
  args.indices = indices.data<int64_t>();
  check_values(args, votes.size(0));
  kernels(0).topk_tokens(args);
}

void sparse_attention(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0], "queries"), keys(stack[1], "keys"), values(stack[2], "values");
  const Tensor query_start_loc(stack[3], "query_start_loc"), slots(stack[4], "slots");
  const Tensor slot_start_loc(stack[5], "slot_start_loc"), cos(stack[6], "cos"), sin(stack[7], "sin");
  const double scale = value_of<double>(stack[8]);
  const bool interleaved = value_of<bool>(stack[9]);
  const double softcap = value_of<double>(stack[10]);
  const Tensor sink_logits(stack[11], "sink_logits"), out(stack[12], "out");
  AttentionArgs args{};
  queries.shaped({-1, -1, -1}).contiguous();
  args.num_q_heads = queries.size(1), args.head_dim = queries.size(2);
  out.shaped({queries.size(0), args.num_q_heads, args.head_dim}).contiguous();
  args.queries = queries.data<void>(), args.out = out.data<void>();
  args.dtype = queries.float_dtype();
  keys.same_dtype(queries), values.same_dtype(queries), out.same_dtype(queries);
  args.keys = keys.shaped({-1, -1, args.head_dim}).rows();
  args.num_kv_heads = keys.size(1);
  args.values = values.shaped({-1, args.num_kv_heads, args.head_dim}).rows();
  args.num_blocks = query_start_loc.shaped({-1}).size(0) - 1;
  args.query_start_loc = query_start_loc.data<int64_t>();
  args.slots = slots.shaped({-1}).data<int64_t>();
  args.slot_start_loc = slot_start_loc.shaped({args.num_blocks + 1}).data<int64_t>();
  args.half = cos.shaped({-1, -1}).size(1);
  args.cos = cos.data<float>(), args.sin = sin.shaped({cos.size(0), args.half}).data<float>();
  check_heads(args.num_q_heads, args.num_kv_heads, args.head_dim, args.half);
  args.interleaved = interleaved;
  args.scale = (float)scale, args.softcap = (float)softcap;
  args.sink_logits = sink_logits.empty() ? nullptr : sink_logits.shaped({args.num_q_heads}).data<float>();
  check_values(args, {queries.size(0), slots.size(0), cos.size(0)});
  kernels(args.head_dim).sparse_attention(args);
  const int64_t done = args.num_blocks > 0 ? args.query_start_loc[args.num_blocks] : 0;
  const int64_t bytes = args.num_q_heads * args.head_dim * bytes_of(args.dtype);
  if (const int64_t padding = queries.size(0) - done) std::memset((char*)args.out + done * bytes, 0, padding * bytes);
}

// Like `rows`, with `last` numbers in the last dimension.
AtenTensorHandle new_rows(const Tensor& rows, int64_t last) {
  const int64_t dims = rows.dims();
  int64_t sizes[kMostDims], strides[kMostDims], stride = 1;
  if (dims < 1 || dims > kMostDims) refuse("rows", "of 1 to 8 dimensions", std::to_string(dims));
  for (int64_t i = dims - 1; i >= 0; i--) {
    sizes[i] = i == dims - 1 ? last : rows.size(i);
    strides[i] = stride, stride *= sizes[i];
  }
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(dims, sizes, strides, rows.type(), kCpu, 0, &made));
  return made;
}

// Rows that a weight of whole vectors of 16 can be applied to; returns how many.
int64_t count_rows(const Tensor& rows, const Tensor& weight, int64_t size) {
  if (size < 16 || size % 16) refuse("weight", "of rows whose size is a multiple of 16", std::to_string(size));
  rows.float_dtype(), weight.same_dtype(rows);
  rows.contiguous(), weight.contiguous();
  if (rows.dims() < 1 || rows.size(rows.dims() - 1) != size) refuse("rows", "as long as the weight's", rows.shape());
  return rows.count() / size;
}

// One layer of `rows`; its result is the caller's.
Tensor make_part(LinearArgs& args, const Tensor& rows, const Tensor& weight, const Tensor& bias) {
  LinearPart& part = args.parts[args.num_parts++];
  args.in_features = weight.shaped({-1, -1}).size(1), part.out_features = weight.size(0);
  args.rows = count_rows(rows, weight, args.in_features);
  if (!bias.empty()) {
    bias.shaped({part.out_features}).same_dtype(rows), bias.contiguous();
    part.bias = bias.data<void>();
  }
  Tensor out(new_rows(rows, part.out_features), "out");
  args.input = rows.data<void>(), part.weight = weight.data<void>(), part.out = out.data<void>();
  args.dtype = rows.dtype();
  return Tensor((AtenTensorHandle)(uintptr_t)out.release(), "out");
}

void linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0], "rows"), weight(stack[1], "weight"), bias(stack[2], "bias");
  LinearArgs args{};
  Tensor out = make_part(args, rows, weight, bias);
  kernels(args.in_features).linear(args);
  stack[0] = out.release();
}

void linear2(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0], "rows"), weight0(stack[1], "weight0"), bias0(stack[2], "bias0");
  const Tensor weight1(stack[3], "weight1"), bias1(stack[4], "bias1");
  LinearArgs args{};
  Tensor out0 = make_part(args, rows, weight0, bias0), out1 = make_part(args, rows, weight1, bias1);
  kernels(args.in_features).linear(args);
  stack[0] = out0.release(), stack[1] = out1.release();
}

void linear3(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0], "rows"), weight0(stack[1], "weight0"), bias0(stack[2], "bias0");
  const Tensor weight1(stack[3], "weight1"), bias1(stack[4], "bias1");
  const Tensor weight2(stack[5], "weight2"), bias2(stack[6], "bias2");
  LinearArgs args{};
  Tensor out0 = make_part(args, rows, weight0, bias0), out1 = make_part(args, rows, weight1, bias1);
  Tensor out2 = make_part(args, rows, weight2, bias2);
  kernels(args.in_features).linear(args);
  stack[0] = out0.release(), stack[1] = out1.release(), stack[2] = out2.release();
}

void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0], "rows"), weight(stack[1], "weight");
  NormArgs args{};
  args.size = weight.shaped({-1}).size(0);
  args.rows = count_rows(rows, weight, args.size);
  Tensor out(new_rows(rows, args.size), "out");
  args.input = rows.data<void>(), args.weight = weight.data<void>(), args.out = out.data<void>();
  args.dtype = rows.dtype();
  args.epsilon = (float)value_of<double>(stack[2]);
  kernels(args.size).rms_norm(args);
  stack[0] = out.release();
}

void pool_queries(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0], "queries"), starts(stack[1], "starts"), counts(stack[2], "counts");
  const Tensor cos(stack[3], "cos"), sin(stack[4], "sin"), out(stack[6], "out");
  PoolArgs args{};
  queries.shaped({-1, -1, -1}).contiguous();
  args.queries = queries.data<void>(), args.dtype = queries.float_dtype();
  args.num_q_heads = queries.size(1), args.head_dim = queries.size(2);
  args.num_blocks = starts.shaped({-1}).size(0);
  args.starts = starts.data<int64_t>(), args.counts = counts.shaped({args.num_blocks}).data<int64_t>();
  args.half = cos.shaped({-1, -1}).size(1);
  args.cos = cos.data<float>(), args.sin = sin.shaped({cos.size(0), args.half}).data<float>();
  check_heads(args.num_q_heads, args.num_q_heads, args.head_dim, args.half);
  args.interleaved = value_of<bool>(stack[5]);
  args.out = out.shaped({args.num_blocks, args.num_q_heads, args.head_dim}).data<float>();
  check_values(args, queries.size(0), cos.size(0));
  kernels(args.head_dim).pool_queries(args);
}

// Keys of `count` tokens (all rows, unless the caller says which), and where their integers and scales go.
QuantizeArgs copy_of(const Tensor& keys, const Tensor& integers, const Tensor& scales) {
  QuantizeArgs args{};
  args.keys = keys.rows();
  args.count = args.keys.count, args.heads = keys.size(1), args.size = keys.size(2);
  keys.float_dtype();
  check_heads(args.heads, args.heads, args.size, 0);
  integers.shaped({-1, args.heads, args.size}).strided<int8_t>();
  scales.shaped({integers.size(0), args.heads}).strided<float>();
  args.out = integers.rows();
  args.scales = {scales.data<void>(), scales.size(0), scales.stride(0), scales.stride(1), DType::f32};
  return args;
}

void quantize_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor keys(stack[0], "rows"), center(stack[1], "center"), out(stack[2], "integers"), scales(stack[3], "scales");
  QuantizeArgs args = copy_of(keys, out, scales);
  if (!center.empty()) args.centers = center.shaped({args.heads, args.size}).data<float>();
  out.shaped({args.count, args.heads, args.size});
  kernels(args.size).quantize_rows(args);
}

void quantize_into(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor keys(stack[0], "rows"), tokens(stack[1], "tokens"), centers(stack[2], "centers");
  const Tensor owners(stack[3], "owners"), out(stack[4], "integers"), scales(stack[5], "scales"), into(stack[6], "into");
  QuantizeArgs args = copy_of(keys, out, scales);
  args.tokens = tokens.shaped({-1}).data<int64_t>(), args.count = tokens.size(0);
  args.centers = centers.shaped({-1, args.heads, args.size}).data<float>();
  args.owners = owners.shaped({args.count}).data<int64_t>();
  args.into = into.shaped({args.count}).data<int64_t>();
  check_values(args, centers.size(0));
  kernels(args.size).quantize_rows(args);
}

void fill_slots(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor chosen(stack[0], "chosen"), sequences(stack[1], "sequences"), pages(stack[2], "pages");
  const Tensor padding(stack[3], "padding"), places(stack[5], "places"), slots(stack[6], "slots");
  SlotsArgs args{};
  args.chosen = chosen.shaped({-1, -1}).data<int64_t>(), args.num_blocks = chosen.size(0), args.k = chosen.size(1);
  args.sequences = sequences.shaped({args.num_blocks}).data<int64_t>();
  args.places = places.shaped({args.num_blocks}).data<int64_t>();
  args.pages = pages_of(pages, value_of<int64_t>(stack[4]), padding);
  args.slots = slots.shaped({-1}).data<int64_t>();
  check_values(args, pages.size(0), slots.size(0));
  store_slots(args);
}

void range_slots(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor ranges(stack[0], "ranges"), pages(stack[1], "pages"), padding(stack[2], "padding");
  const Tensor slots(stack[4], "slots");
  RangesArgs args{};
  args.ranges = ranges.shaped({-1, 3}).data<int64_t>(), args.num_ranges = ranges.size(0);
  args.pages = pages_of(pages, value_of<int64_t>(stack[3]), padding);
  args.slots = slots.shaped({-1}).data<int64_t>();
  check_values(args, pages.size(0), slots.size(0));
  store_ranges(args);
}

void write_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor keys(stack[0], "keys"), values(stack[1], "values"), slots(stack[2], "slots");
  const Tensor key_rows(stack[3], "key_rows"), value_rows(stack[4], "value_rows");
  WriteArgs args{};
  keys.shaped({-1, -1, -1}), keys.float_dtype();
  args.num_heads = keys.size(1), args.head_dim = keys.size(2);
  values.shaped({keys.size(0), args.num_heads, args.head_dim}).same_dtype(keys);
  for (const Tensor* into : {&key_rows, &value_rows}) into->shaped({-1, args.num_heads, args.head_dim}).same_dtype(keys);
  args.from[0] = keys.rows(), args.from[1] = values.rows();
  args.to[0] = key_rows.rows(), args.to[1] = value_rows.rows();
  args.slots = slots.shaped({-1}).data<int64_t>(), args.count = slots.size(0);
  check_values(args);
  store_rows(args);
}

}  // namespace

void parallel_ranges(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= grain) {
    if (n > 0) body(0, n, context);
    return;
  }
  check(torch_parallel_for(0, n, grain, body, context));
}

int64_t num_threads() {
  uint32_t count;
  check(torch_get_num_threads(&count));
  return count;
}

}  // namespace tokenselect

extern "C" {
// Called once by ops/cpu.py after the library is loaded; 0: done.
__attribute__((visibility("default"))) int tokenselect_register() {
  TorchLibraryHandle library;
  if (aoti_torch_library_init_impl("tokenselect", "CPU", __FILE__, __LINE__, &library)) return 1;
  return aoti_torch_library_impl(library, "score_tokens", tokenselect::score_tokens) ||
         aoti_torch_library_impl(library, "topk_tokens", tokenselect::topk_tokens) ||
         aoti_torch_library_impl(library, "sparse_attention", tokenselect::sparse_attention) ||
         aoti_torch_library_impl(library, "linear", tokenselect::linear) ||
         aoti_torch_library_impl(library, "linear2", tokenselect::linear2) ||
         aoti_torch_library_impl(library, "linear3", tokenselect::linear3) ||
         aoti_torch_library_impl(library, "rms_norm", tokenselect::rms_norm) ||
         aoti_torch_library_impl(library, "quantize_rows", tokenselect::quantize_rows) ||
         aoti_torch_library_impl(library, "pool_queries", tokenselect::pool_queries) ||
         aoti_torch_library_impl(library, "write_rows", tokenselect::write_rows) ||
         aoti_torch_library_impl(library, "fill_slots", tokenselect::fill_slots) ||
         aoti_torch_library_impl(library, "range_slots", tokenselect::range_slots) ||
         aoti_torch_library_impl(library, "quantize_into", tokenselect::quantize_into);
}
__attribute__((visibility("default"))) int tokenselect_use(const char* name) { return tokenselect::use_kernels(name); }
__attribute__((visibility("default"))) const char* tokenselect_runnable() { return tokenselect::runnable_kernels(); }
__attribute__((visibility("default"))) const char* tokenselect_in_use() { return tokenselect::kernels(0).name; }
}
