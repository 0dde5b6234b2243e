// The operations as PyTorch sees them. Only PyTorch's stable C interface (2.10 and later) is used, declared here and
// found when the library is loaded, so that one build serves every later version and needs no PyTorch to be built.
// Arguments are checked in Python (ops/cpu.py); schemas are defined there too.
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"

extern "C" {
typedef uint64_t StableIValue;
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
typedef AtenTensorOpaque* AtenTensorHandle;
typedef TorchLibraryOpaque* TorchLibraryHandle;
typedef int32_t AOTITorchError;

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int8();
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle*);
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t));
AOTITorchError torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
AOTITorchError torch_get_num_threads(uint32_t*);
}

namespace tokenselect {
namespace {

constexpr int32_t kCpu = 0;  // PyTorch's number of that kind of device
constexpr int64_t kMostDims = 8;

void check(AOTITorchError error) {
  if (error) throw std::runtime_error("tokenselect: a call into PyTorch failed");
}

// One tensor argument, given back at the end of the call.
class Tensor {
 public:
  explicit Tensor(StableIValue value) : handle_((AtenTensorHandle)(uintptr_t)value) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() { aoti_torch_delete_tensor_object(handle_); }

  template <class T>
  T* data() const {
    void* pointer;
    check(aoti_torch_get_data_ptr(handle_, &pointer));
    return (T*)pointer;
  }
  int64_t size(int dim) const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(handle_, &sizes));
    return sizes[dim];
  }
  int64_t stride(int dim) const {
    int64_t* strides;
    check(aoti_torch_get_strides(handle_, &strides));
    return strides[dim];
  }
  int64_t dims() const {
    int64_t dims;
    check(aoti_torch_get_dim(handle_, &dims));
    return dims;
  }
  int64_t count() const {
    int64_t count;
    check(aoti_torch_get_numel(handle_, &count));
    return count;
  }
  bool empty() const { return count() == 0; }
  int32_t type() const {
    int32_t type;
    check(aoti_torch_get_dtype(handle_, &type));
    return type;
  }
  DType dtype() const {
    const int32_t type = this->type();
    if (type == aoti_torch_dtype_float32()) return DType::f32;
    if (type == aoti_torch_dtype_bfloat16()) return DType::bf16;
    if (type == aoti_torch_dtype_float16()) return DType::f16;
    if (type == aoti_torch_dtype_int8()) return DType::i8;
    throw std::runtime_error("tokenselect: unsupported dtype");
  }
  Rows rows() const { return {data<void>(), size(0), stride(0), stride(1), dtype()}; }

 private:
  AtenTensorHandle handle_;
};

template <class T>
T value_of(StableIValue value) {
  T out;
  std::memcpy(&out, &value, sizeof out);  // little endian, as everything that PyTorch runs on
  return out;
}

void score_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0]), keys(stack[1]), key_scales(stack[2]), pages(stack[3]), padding(stack[4]);
  const int64_t page_size = value_of<int64_t>(stack[5]);
  const Tensor sequences(stack[6]), candidates(stack[7]), context(stack[8]);
  const Tensor cos0(stack[9]), sin0(stack[10]), runs0(stack[11]);
  const int64_t run_size0 = value_of<int64_t>(stack[12]);
  const Tensor cos1(stack[13]), sin1(stack[14]), runs1(stack[15]);
  const int64_t run_size1 = value_of<int64_t>(stack[16]);
  const bool interleaved = value_of<bool>(stack[17]);
  const double scale = value_of<double>(stack[18]);
  const Tensor start_loc(stack[19]), key_center(stack[20]), votes(stack[21]);
  ScoreArgs args{};
  args.queries = queries.data<float>();
  args.num_blocks = queries.size(0), args.num_q_heads = queries.size(1), args.head_dim = queries.size(2);
  args.num_kv_heads = keys.size(1);
  args.keys = keys.rows();
  if (!key_scales.empty()) args.key_scales = {key_scales.data<void>(), key_scales.size(0), key_scales.stride(0),
                                              key_scales.stride(1), DType::f32};
  args.key_center = key_center.empty() ? nullptr : key_center.data<float>();
  args.pages = {pages.data<int64_t>(), pages.size(1), page_size, padding.data<int64_t>()};
  args.sequences = sequences.data<int64_t>();
  args.candidates = candidates.data<int64_t>();
  args.context = context.data<int64_t>();
  args.views[0] = {cos0.data<float>(), sin0.data<float>(), run_size0, runs0.data<int64_t>()};
  args.views[1] = {cos1.data<float>(), sin1.data<float>(), run_size1, runs1.data<int64_t>()};
  args.num_views = run_size1 ? 2 : 1;
  args.half = cos0.size(1);
  args.interleaved = interleaved;
  args.scale = (float)scale;
  args.start_loc = start_loc.data<int64_t>();
  args.votes = votes.data<float>();
  kernels(args.head_dim).score_tokens(args);
}

void topk_tokens(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor votes(stack[0]), start_loc(stack[1]);
  const int64_t k = value_of<int64_t>(stack[2]);
  const Tensor indices(stack[3]);
  kernels(0).topk_tokens({votes.data<float>(), start_loc.data<int64_t>(), indices.size(0), k, indices.data<int64_t>()});
}

void sparse_attention(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor queries(stack[0]), keys(stack[1]), values(stack[2]), query_start_loc(stack[3]), slots(stack[4]);
  const Tensor slot_start_loc(stack[5]), cos(stack[6]), sin(stack[7]);
  const double scale = value_of<double>(stack[8]);
  const bool interleaved = value_of<bool>(stack[9]);
  const double softcap = value_of<double>(stack[10]);
  const Tensor sink_logits(stack[11]), out(stack[12]);
  AttentionArgs args{};
  args.queries = queries.data<void>();
  args.out = out.data<void>();
  args.dtype = queries.dtype();
  args.num_blocks = query_start_loc.size(0) - 1;
  args.num_q_heads = queries.size(1), args.num_kv_heads = keys.size(1), args.head_dim = queries.size(2);
  args.keys = keys.rows(), args.values = values.rows();
  args.query_start_loc = query_start_loc.data<int64_t>();
  args.slots = slots.data<int64_t>();
  args.slot_start_loc = slot_start_loc.data<int64_t>();
  args.cos = cos.data<float>(), args.sin = sin.data<float>();
  args.half = cos.size(1);
  args.interleaved = interleaved;
  args.scale = (float)scale, args.softcap = (float)softcap;
  args.sink_logits = sink_logits.empty() ? nullptr : sink_logits.data<float>();
  kernels(args.head_dim).sparse_attention(args);
}

// Like `rows`, with `last` numbers in the last dimension; the caller owns it.
AtenTensorHandle new_rows(const Tensor& rows, int64_t last) {
  const int64_t dims = rows.dims();
  int64_t sizes[kMostDims], strides[kMostDims], stride = 1;
  if (dims > kMostDims) throw std::runtime_error("tokenselect: too many dimensions");
  for (int64_t i = dims - 1; i >= 0; i--) {
    sizes[i] = i == dims - 1 ? last : rows.size(i);
    strides[i] = stride, stride *= sizes[i];
  }
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(dims, sizes, strides, rows.type(), kCpu, 0, &made));
  return made;
}

void linear(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0]), weight(stack[1]), bias(stack[2]);
  LinearArgs args{};
  args.in_features = weight.size(1), args.out_features = weight.size(0);
  const AtenTensorHandle out = new_rows(rows, args.out_features);
  check(aoti_torch_get_data_ptr(out, &args.out));
  args.input = rows.data<void>(), args.weight = weight.data<void>();
  args.bias = bias.empty() ? nullptr : bias.data<void>();
  args.dtype = rows.dtype();
  args.rows = rows.count() / args.in_features;
  kernels(args.in_features).linear(args);
  stack[0] = (StableIValue)(uintptr_t)out;
}

void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor rows(stack[0]), weight(stack[1]);
  NormArgs args{};
  args.size = weight.size(0);
  const AtenTensorHandle out = new_rows(rows, args.size);
  check(aoti_torch_get_data_ptr(out, &args.out));
  args.input = rows.data<void>(), args.weight = weight.data<void>();
  args.dtype = rows.dtype();
  args.rows = rows.count() / args.size;
  args.epsilon = (float)value_of<double>(stack[2]);
  kernels(args.size).rms_norm(args);
  stack[0] = (StableIValue)(uintptr_t)out;
}

void quantize_rows(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor keys(stack[0]), center(stack[1]), out(stack[2]), scales(stack[3]);
  kernels(keys.size(2)).quantize_rows({keys.rows(), keys.size(1), keys.size(2),
                                       center.empty() ? nullptr : center.data<float>(), out.data<int8_t>(),
                                       scales.data<float>()});
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
         aoti_torch_library_impl(library, "rms_norm", tokenselect::rms_norm) ||
         aoti_torch_library_impl(library, "quantize_rows", tokenselect::quantize_rows);
}
__attribute__((visibility("default"))) int tokenselect_use(const char* name) { return tokenselect::use_kernels(name); }
__attribute__((visibility("default"))) const char* tokenselect_runnable() { return tokenselect::runnable_kernels(); }
__attribute__((visibility("default"))) const char* tokenselect_in_use() { return tokenselect::kernels(0).name; }
}
