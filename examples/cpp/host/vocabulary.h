// From token ids to text, for tokenizers of bytes (`tokenizer.json` with a ByteLevel decoder).
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

class Vocabulary {
 public:
  // Throws Failure where the bundle has no such tokenizer.
  explicit Vocabulary(const std::string& bundle);

  // The bytes of a token: a part of a character, perhaps. Nothing for special tokens.
  std::string text(int64_t token) const;

 private:
  std::unordered_map<int64_t, std::string> texts_;
};
