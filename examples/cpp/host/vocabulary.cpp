#include "vocabulary.h"

#include <fstream>

#include <nlohmann/json.hpp>

#include "model.h"

using nlohmann::json;

namespace {

// Byte-level vocabularies write a byte that is not printable in Latin-1 as a character from 256 on.
std::unordered_map<char32_t, char> byte_alphabet() {
  std::unordered_map<char32_t, char> found;
  char32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    found[printable ? static_cast<char32_t>(byte) : next++] = static_cast<char>(byte);
  }
  return found;
}

std::u32string characters(const std::string& utf8) {
  std::u32string found;
  for (const unsigned char byte : utf8) {
    if ((byte & 0xC0) == 0x80) {
      found.back() = (found.back() << 6) | (byte & 0x3F);
    } else {
      found.push_back(byte < 0x80 ? byte : byte < 0xE0 ? byte & 0x1F : byte < 0xF0 ? byte & 0x0F : byte & 0x07);
    }
  }
  return found;
}

}  // namespace

Vocabulary::Vocabulary(const std::string& bundle) {
  const std::string path = bundle + "/tokenizer.json";
  std::ifstream file(path);
  if (!file) throw Failure(path + " is missing");
  const auto bytes = byte_alphabet();
  try {
    const json all = json::parse(file);
    if (all.at("decoder").at("type") != "ByteLevel") throw Failure(path + ": not a tokenizer of bytes");
    for (const auto& [token, id] : all.at("model").at("vocab").items()) {
      std::string text;
      for (const char32_t character : characters(token)) {
        const auto byte = bytes.find(character);
        if (byte != bytes.end()) text.push_back(byte->second);
      }
      texts_[id] = text;
    }
    for (const auto& added : all.at("added_tokens")) {
      texts_[added.at("id")] = added.at("special") ? "" : added.at("content").get<std::string>();
    }
  } catch (const json::exception& error) {
    throw Failure(path + ": " + error.what());
  }
}

std::string Vocabulary::text(int64_t token) const {
  const auto found = texts_.find(token);
  return found == texts_.end() ? "" : found->second;
}
