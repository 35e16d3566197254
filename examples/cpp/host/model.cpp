#include "model.h"

#include <algorithm>
#include <fstream>

#include <nlohmann/json.hpp>

using nlohmann::json;

Manifest Manifest::read(const std::string& bundle, const std::string& target) {
  const std::string path = bundle + "/manifest.json";
  std::ifstream file(path);
  if (!file) throw Failure("there is no bundle: " + path + " is missing");
  try {
    const json root = json::parse(file);
    if (root.at("target") != target) {
      throw Failure("a bundle for " + root.at("target").get<std::string>() + ", not " + target);
    }
    Manifest manifest;
    for (const std::string name : root.at("artifact")) {
      manifest.files.push_back(bundle + "/" + name);
      if (!std::ifstream(manifest.files.back())) throw Failure(manifest.files.back() + " is missing");
    }
    manifest.context = root.at("context");
    manifest.chunk = root.at("chunk");
    manifest.vocab_size = root.at("model").at("vocab_size");
    manifest.last_only = root.at("options").value("logits", "all") == "last";
    const json& tokens = root.at("tokens");
    if (!tokens.at("bos").is_null()) manifest.bos = tokens.at("bos");
    manifest.stop = tokens.at("stop").get<std::vector<int64_t>>();
    return manifest;
  } catch (const json::exception& error) {
    throw Failure(path + ": " + error.what());
  }
}

void Model::reset() {
  length_ = 0;
  forget();
}

std::vector<float> Model::step(const std::vector<int64_t>& tokens, bool last_only) {
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
  last_only = last_only || manifest_.last_only;
  std::vector<float> logits;
  for (int64_t done = 0; done < count; done += manifest_.chunk) {
    const int64_t size = std::min(manifest_.chunk, count - done);
    if (last_only) logits.clear();
    const auto first = tokens.begin() + done;
    call({first, first + size}, length_ + done, last_only, logits);
  }
  length_ += count;
  return logits;
}
