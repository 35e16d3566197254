// A bundle's program as an app uses it: tokens in, logits out, the conversation kept inside.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>

// What is wrong with a bundle or a request, in words for the user.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Manifest {
  std::string program;
  int64_t context = 0;     // most tokens of a conversation
  int64_t chunk = 0;       // most tokens of a call
  int64_t vocab_size = 0;
  bool last_only = false;  // whether a call gives logits of its last token only
  int64_t bos = -1;
  std::vector<int64_t> stop;

  // Throws Failure where the folder is no ExecuTorch bundle.
  static Manifest read(const std::string& bundle);
};

class Model {
 public:
  explicit Model(const std::string& bundle);

  // The next token begins a conversation. The program itself forgets at position 0.
  void reset() { length_ = 0; }

  // Logits of every token, row after row: tokens.size() x vocab_size, or of the last token where the
  // program gives no others. Throws Failure, and leaves the conversation as it was, for no tokens, a token outside of the vocabulary, or a full context.
  std::vector<float> step(const std::vector<int64_t>& tokens);

  const Manifest& manifest() const { return manifest_; }

 private:
  Manifest manifest_;
  std::unique_ptr<executorch::extension::Module> module_;
  int64_t length_ = 0;
};
