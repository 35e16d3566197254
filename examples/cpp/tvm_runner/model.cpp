// A TVM library and its parameters. The app owns the states, and zeroes them to reset.
#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include <nlohmann/json.hpp>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace {

using nlohmann::json;
using tvm::ffi::AnyView;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;

constexpr size_t kAlignment = 64;
constexpr int kPooled = 2;
const DLDevice kCpu{kDLCPU, 0};

// Memory of a tensor: newly allocated zeros, or a part of the mapped file.
struct Memory {
  void* mapped = nullptr;
  void AllocData(DLTensor* tensor) {
    const size_t size = (tvm::ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = mapped ? mapped : std::memset(std::aligned_alloc(kAlignment, size), 0, size);
  }
  void FreeData(DLTensor* tensor) {
    if (!mapped) std::free(tensor->data);
  }
};

Tensor tensor(const std::vector<int64_t>& shape, DLDataType dtype, void* mapped = nullptr) {
  return Tensor::FromNDAlloc(Memory{mapped}, tvm::ffi::ShapeView(shape.data(), shape.size()), dtype,
                             kCpu);
}

DLDataType dtype_of(const std::string& name) {  // a dtype name of safetensors
  if (name == "U32") return {kDLUInt, 32, 1};
  if (name == "U8") return {kDLUInt, 8, 1};
  if (name == "F32") return {kDLFloat, 32, 1};
  if (name == "F16") return {kDLFloat, 16, 1};
  if (name == "BF16") return {kDLBfloat, 16, 1};
  throw Failure("a parameter has the unknown dtype " + name);
}

Function get(const Optional<Module>& module, const char* name) {
  return Module(module.value())->GetFunction(name, false).value();
}

class Library : public Model {
 public:
  explicit Library(const std::string& bundle) : Model(Manifest::read(bundle, "tvm")) {
    try {
      // By default TVM uses half of the cores of an x86 machine, and binds this thread to one core.
      setenv("TVM_NUM_THREADS", std::to_string(std::thread::hardware_concurrency()).c_str(), 0);
      setenv("TVM_BIND_THREADS", "0", 0);
      library_ = Module::LoadFromFile(manifest().files.at(0));
      machine_ = get(library_, "vm_load_executable")().cast<Module>();
      get(machine_, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooled);
      map(manifest().files.at(1));
      run("check", {0}, 0);
    } catch (const std::exception& error) {
      throw Failure(bundle + ": can't load it: " + error.what());
    }
  }

 protected:
  void forget() override {
    for (const Tensor& state : states_) {
      std::memset(state.data_ptr(), 0, tvm::ffi::GetDataSize(state));
    }
  }

  void call(const std::vector<int64_t>& tokens, int64_t start, bool last_only,
            std::vector<float>& logits) override {
    const char* name = tokens.size() == 1 ? "decode" : last_only ? "prefill" : "score";
    const Tensor result = run(name, tokens, start);
    const float* data = static_cast<const float*>(result.data_ptr());
    logits.insert(logits.end(), data, data + result.numel());
  }

 private:
  Tensor run(const char* name, const std::vector<int64_t>& tokens, int64_t start) {
    const DLDataType int32{kDLInt, 32, 1};
    const Tensor ids = tensor({static_cast<int64_t>(tokens.size())}, int32);
    const Tensor first = tensor({1}, int32);
    std::copy(tokens.begin(), tokens.end(), static_cast<int32_t*>(ids.data_ptr()));
    *static_cast<int32_t*>(first.data_ptr()) = static_cast<int32_t>(start);
    std::vector<AnyView> args{ids, first};
    args.insert(args.end(), states_.begin(), states_.end());
    args.insert(args.end(), parameters_.begin(), parameters_.end());
    tvm::ffi::Any result;
    get(machine_, name).CallPacked(args.data(), static_cast<int32_t>(args.size()), &result);
    return result.cast<Tensor>();
  }

  // Maps the file, in which the parameters stay; parameters that are not aligned are copied.
  void map(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat status {};
    if (file < 0 || fstat(file, &status) != 0) throw Failure(path + " can't be opened");
    char* data = static_cast<char*>(
        mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
    close(file);
    if (data == MAP_FAILED) throw Failure(path + " can't be mapped");
    uint64_t size = 0;
    std::memcpy(&size, data, sizeof(size));
    if (size + sizeof(size) > static_cast<uint64_t>(status.st_size)) throw Failure(path + " is cut");
    char* begin = data + sizeof(size) + size;
    const json header = json::parse(data + sizeof(size), begin);
    const json metadata = json::parse(header.at("__metadata__").at("lfmc").get<std::string>());
    for (const std::string name : metadata.at("parameters")) {
      const json& entry = header.at(name);
      const uint64_t first = entry.at("data_offsets").at(0), last = entry.at("data_offsets").at(1);
      if (begin + last > data + status.st_size) throw Failure(path + " is cut");
      const bool aligned = reinterpret_cast<uintptr_t>(begin + first) % kAlignment == 0;
      const Tensor parameter = tensor(entry.at("shape"), dtype_of(entry.at("dtype")),
                                aligned ? begin + first : nullptr);
      if (!aligned) std::memcpy(parameter.data_ptr(), begin + first, last - first);
      parameters_.push_back(parameter);
    }
    for (const json& state : metadata.at("states")) {
      states_.push_back(tensor(state.at("shape"), {kDLFloat, 32, 1}));
    }
  }

  Optional<Module> library_, machine_;
  std::vector<Tensor> parameters_, states_;
};

}  // namespace

std::unique_ptr<Model> open_model(const std::string& bundle) {
  return std::make_unique<Library>(bundle);
}
