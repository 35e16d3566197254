// A bundle's model as an app uses it: tokens in, logits out, the conversation kept inside.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// What is wrong with a bundle or a request, in words for the user.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Manifest {
  std::vector<std::string> files;  // of the artifact, with their paths
  int64_t context = 0;             // most tokens of a conversation
  int64_t chunk = 0;               // most tokens of a call
  int64_t vocab_size = 0;
  bool last_only = false;  // whether a call gives logits of its last token only
  int64_t bos = -1;
  std::vector<int64_t> stop;

  // Throws Failure where the folder is no bundle for the target.
  static Manifest read(const std::string& bundle, const std::string& target);
};

// What runtimes have in common; each runner has one kind.
class Model {
 public:
  virtual ~Model() = default;

  // The next token begins a conversation.
  void reset();

  // Logits of every token, row after row: tokens.size() x vocab_size; of the last token where it is
  // all that is asked for, or all that the program gives. Throws Failure, and leaves the
  // conversation as it was, for no tokens, a token outside of the vocabulary, or a full context.
  std::vector<float> step(const std::vector<int64_t>& tokens, bool last_only = false);

  const Manifest& manifest() const { return manifest_; }

 protected:
  explicit Model(Manifest manifest) : manifest_(std::move(manifest)) {}

  // Bring states back to what they are at the start of a conversation.
  virtual void forget() {}

  // Append the logits of a call of at most `chunk` tokens, the first of them at position `start`.
  virtual void call(const std::vector<int64_t>& tokens, int64_t start, bool last_only,
                    std::vector<float>& logits) = 0;

 private:
  Manifest manifest_;
  int64_t length_ = 0;
};

// The model of a bundle, by the runtime that this program is for. Throws Failure.
std::unique_ptr<Model> open_model(const std::string& bundle);
