// An ExecuTorch program. It stores its states itself and resets them at position 0.
#include "model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

namespace {

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;

class Program : public Model {
 public:
  explicit Program(const std::string& bundle)
      : Model(Manifest::read(bundle, "executorch")),
        module_(manifest().files.at(0), Module::LoadMode::Mmap) {
    if (module_.load_method("forward") != Error::Ok) {
      throw Failure(manifest().files.at(0) + ": this runtime can't load it; it may be damaged, of "
                    "another version, or need operators that are not linked");
    }
  }

 protected:
  void call(const std::vector<int64_t>& tokens, int64_t start, bool last_only,
            std::vector<float>& logits) override {
    std::vector<int64_t> ids = tokens;
    auto input = from_blob(ids.data(), {1, static_cast<int>(ids.size())}, ScalarType::Long);
    auto position = from_blob(&start, {1}, ScalarType::Long);
    const auto result = module_.forward({input, position});
    if (!result.ok()) throw Failure("the runtime failed in a step");
    const auto& tensor = result->at(0).toTensor();
    const float* end = tensor.const_data_ptr<float>() + tensor.numel();
    const float* begin = last_only ? end - manifest().vocab_size : end - tensor.numel();
    logits.insert(logits.end(), begin, end);
  }

 private:
  Module module_;
};

}  // namespace

std::unique_ptr<Model> open_model(const std::string& bundle) {
  return std::make_unique<Program>(bundle);
}
