#include "model.h"

#include <algorithm>
#include <fstream>

#include <executorch/extension/tensor/tensor.h>
#include <nlohmann/json.hpp>

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using nlohmann::json;

Manifest Manifest::read(const std::string& bundle) {
  const std::string path = bundle + "/manifest.json";
  std::ifstream file(path);
  if (!file) throw Failure("there is no bundle: " + path + " is missing");
  try {
    const json all = json::parse(file);
    if (all.at("target") != "executorch") {
      throw Failure("a bundle for " + all.at("target").get<std::string>() + ", not executorch");
    }
    Manifest found;
    found.program = bundle + "/" + all.at("artifact").at(0).get<std::string>();
    found.context = all.at("context");
    found.chunk = all.at("chunk");
    found.vocab_size = all.at("model").at("vocab_size");
    found.last_only = all.at("options").at("logits") == "last";
    const json& tokens = all.at("tokens");
    if (!tokens.at("bos").is_null()) found.bos = tokens.at("bos");
    found.stop = tokens.at("stop").get<std::vector<int64_t>>();
    return found;
  } catch (const json::exception& error) {
    throw Failure(path + ": " + error.what());
  }
}

Model::Model(const std::string& bundle) : manifest_(Manifest::read(bundle)) {
  if (!std::ifstream(manifest_.program)) throw Failure(manifest_.program + " is missing");
  module_ = std::make_unique<Module>(manifest_.program, Module::LoadMode::Mmap);
  if (module_->load_method("forward") != Error::Ok) {
    throw Failure(manifest_.program + ": this runtime can't load it; it may be damaged, of another "
                  "version, or need operators that are not linked");
  }
}

std::vector<float> Model::step(const std::vector<int64_t>& tokens) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  if (count == 0) throw Failure("a step needs at least one token");
  if (length_ + count > manifest_.context) {
    throw Failure("the conversation is longer than the exported context of " +
                  std::to_string(manifest_.context) + " tokens");
  }
  for (const int64_t token : tokens) {
    if (token < 0 || token >= manifest_.vocab_size) {
      throw Failure("token " + std::to_string(token) + " is outside of the vocabulary of " +
                    std::to_string(manifest_.vocab_size));
    }
  }
  std::vector<float> logits;
  int64_t start = length_;
  for (int64_t done = 0; done < count; done += manifest_.chunk) {
    const int64_t size = std::min(manifest_.chunk, count - done);
    std::vector<int64_t> ids(tokens.begin() + done, tokens.begin() + done + size);
    auto input = from_blob(ids.data(), {1, static_cast<int>(size)},
                           executorch::aten::ScalarType::Long);
    auto position = from_blob(&start, {1}, executorch::aten::ScalarType::Long);
    const auto found = module_->forward({input, position});
    if (!found.ok()) throw Failure("the runtime failed in a step");
    const auto& tensor = found->at(0).toTensor();
    const float* data = tensor.const_data_ptr<float>();
    if (manifest_.last_only) logits.clear();
    logits.insert(logits.end(), data, data + tensor.numel());
    start += size;
  }
  length_ = start;
  return logits;
}
