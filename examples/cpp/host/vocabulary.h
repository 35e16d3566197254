// Converts token ids to text, for tokenizers with a ByteLevel decoder in `tokenizer.json`.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

class Vocabulary {
 public:
  // Throws Failure if the bundle contains no such tokenizer.
  explicit Vocabulary(const std::string& bundle);

  // Returns the bytes of a token, which may be a part of a character; empty for special tokens.
  std::string text(int64_t token) const;

 private:
  std::unordered_map<int64_t, std::string> texts_;
};
