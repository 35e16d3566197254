// A bundle's model for an app: tokens in, logits out. The model stores the conversation.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// An error of a bundle or a request, with a message for the user.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Manifest {
  std::vector<std::string> files;  // paths of the artifact's files
  int64_t context = 0;             // maximum tokens per conversation
  int64_t chunk = 0;               // maximum tokens per call
  int64_t vocab_size = 0;
  bool last_only = false;  // whether a call only returns logits of its last token
  int64_t bos = -1;
  std::vector<int64_t> stop;

  // Throws Failure if the folder is no bundle for the target.
  static Manifest read(const std::string& bundle, const std::string& target);
};

// The interface of all runtimes; each runner implements it once.
class Model {
 public:
  virtual ~Model() = default;

  // Starts a new conversation with the next token.
  void reset();

  // Appends tokens and returns their logits, tokens.size() x vocab_size, row by row. Returns only
  // the row of the last token if `last_only` is true or the program returns no other logits.
  // Throws Failure, without a change to the conversation, for no tokens, a token outside of the
  // vocabulary, or a full context.
  std::vector<float> step(const std::vector<int64_t>& tokens, bool last_only = false);

  const Manifest& manifest() const { return manifest_; }

 protected:
  explicit Model(Manifest manifest) : manifest_(std::move(manifest)) {}

  // Resets the states to their values at the start of a conversation.
  virtual void forget() {}

  // Appends to `logits` those of at most `chunk` tokens, the first of which is at position `start`.
  virtual void call(const std::vector<int64_t>& tokens, int64_t start, bool last_only,
                    std::vector<float>& logits) = 0;

 private:
  Manifest manifest_;
  int64_t length_ = 0;
};

// Opens a bundle with the runtime of this runner. Throws Failure.
std::unique_ptr<Model> open_model(const std::string& bundle);
