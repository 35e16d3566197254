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
    const json all = json::parse(file);
    if (all.at("target") != target) {
      throw Failure("a bundle for " + all.at("target").get<std::string>() + ", not " + target);
    }
    Manifest found;
    for (const std::string name : all.at("artifact")) {
      found.files.push_back(bundle + "/" + name);
      if (!std::ifstream(found.files.back())) throw Failure(found.files.back() + " is missing");
    }
    found.context = all.at("context");
    found.chunk = all.at("chunk");
    found.vocab_size = all.at("model").at("vocab_size");
    found.last_only = all.at("options").value("logits", "all") == "last";
    const json& tokens = all.at("tokens");
    if (!tokens.at("bos").is_null()) found.bos = tokens.at("bos");
    found.stop = tokens.at("stop").get<std::vector<int64_t>>();
    return found;
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
