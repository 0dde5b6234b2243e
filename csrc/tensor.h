// A tensor argument as PyTorch's stable C interface (2.10 and later) shows it, and its checks by name. The interface is
// declared here and found when the library is loaded, so that one build serves every later version and needs no PyTorch.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.h"

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
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
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

inline void check(AOTITorchError error) {
  if (error) throw std::runtime_error("tokenselect: a call into PyTorch failed");
}

// Python gets it as a ValueError.
[[noreturn]] inline void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " + got);
}

// One tensor argument, given back at the end of the call.
class Tensor {
 public:
  explicit Tensor(StableIValue value, const char* name = "an argument")
      : handle_((AtenTensorHandle)(uintptr_t)value), name_(name) {}
  Tensor(AtenTensorHandle made, const char* name) : handle_(made), name_(name) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // A result: it is the caller's from now on.
  StableIValue release() {
    const StableIValue value = (StableIValue)(uintptr_t)handle_;
    handle_ = nullptr;
    return value;
  }

  // Refused unless it has these sizes; -1: any.
  const Tensor& shaped(std::initializer_list<int64_t> expected) const {
    const int64_t* own = sizes();
    bool same = (int64_t)expected.size() == dims();
    for (size_t i = 0; same && i < expected.size(); i++) same = expected.begin()[i] < 0 || expected.begin()[i] == own[i];
    if (!same) refuse(name_, "of shape " + listed(expected.begin(), expected.size()), shape());
    return *this;
  }

  // Whole vectors at any distance: [rows, heads, head_dim].
  Rows rows() const {
    shaped({-1, -1, -1});
    if (stride(2) != 1 && size(2) > 1) refuse(name_, "contiguous in its last dimension", "strides " + listed(strides(), 3));
    return {data<void>(), size(0), stride(0), stride(1), dtype()};
  }

  // Elements of one type, one after the other; `void`: of any type and at any distance.
  template <class T>
  T* data() const {
    if constexpr (!__is_same(T, void)) contiguous();
    return strided<T>();
  }

  // Elements of one type, at any distance.
  template <class T>
  T* strided() const {
    if constexpr (__is_same(T, float)) of_type(aoti_torch_dtype_float32(), "float32");
    if constexpr (__is_same(T, int64_t)) of_type(aoti_torch_dtype_int64(), "int64");
    if constexpr (__is_same(T, int8_t)) of_type(aoti_torch_dtype_int8(), "int8");
    void* pointer;
    check(aoti_torch_get_data_ptr(handle_, &pointer));
    return (T*)pointer;
  }

  int64_t size(int dim) const { return sizes()[dim]; }
  int64_t stride(int dim) const { return strides()[dim]; }
  int32_t type() const {
    int32_t type;
    check(aoti_torch_get_dtype(handle_, &type));
    return type;
  }
  int64_t dims() const {
    int64_t dims;
    check(aoti_torch_get_dim(handle_, &dims));
    return dims;
  }
  std::string shape() const { return listed(sizes(), dims()); }
  bool empty() const { return count() == 0; }
  int64_t count() const {
    int64_t count;
    check(aoti_torch_get_numel(handle_, &count));
    return count;
  }
  DType dtype() const {
    const int32_t type = this->type();
    if (type == aoti_torch_dtype_float32()) return DType::f32;
    if (type == aoti_torch_dtype_bfloat16()) return DType::bf16;
    if (type == aoti_torch_dtype_float16()) return DType::f16;
    if (type == aoti_torch_dtype_int8()) return DType::i8;
    refuse(name_, "float32, bfloat16, float16 or int8", type_name());
  }
  DType float_dtype() const {
    if (dtype() == DType::i8) refuse(name_, "float32, bfloat16 or float16", type_name());
    return dtype();
  }
  void same_dtype(const Tensor& other) const {
    if (type() != other.type()) refuse(name_, other.type_name() + " like " + other.name_, type_name());
  }
  void contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dims() - 1; d >= 0; expected *= size(d--))
      if (stride(d) != expected && size(d) > 1 && !empty())
        refuse(name_, "contiguous", "strides " + listed(strides(), dims()));
  }

 private:
  void of_type(int32_t type, const char* expected) const {
    if (this->type() != type) refuse(name_, expected, type_name());
  }
  std::string type_name() const {
    const int32_t type = this->type();
    if (type == aoti_torch_dtype_float32()) return "float32";
    if (type == aoti_torch_dtype_bfloat16()) return "bfloat16";
    if (type == aoti_torch_dtype_float16()) return "float16";
    if (type == aoti_torch_dtype_int8()) return "int8";
    if (type == aoti_torch_dtype_int32()) return "int32";
    if (type == aoti_torch_dtype_int64()) return "int64";
    return type == aoti_torch_dtype_float64() ? "float64" : "another dtype";
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides;
    check(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }
  static std::string listed(const int64_t* values, int64_t n) {
    std::string text = "[";
    for (int64_t i = 0; i < n; i++) text += (i ? ", " : "") + (values[i] < 0 ? "*" : std::to_string(values[i]));
    return text + "]";
  }

  AtenTensorHandle handle_;
  const char* name_;
};

}  // namespace tokenselect
