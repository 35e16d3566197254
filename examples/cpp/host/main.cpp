// Runs a bundle that `lfmc export` wrote, without Python and without torch.
//
//   RUNNER BUNDLE 1,523,88 [TOKENS]   continues these tokens, greedily, as text
//   RUNNER BUNDLE --serve             answers lines of stdin: `step 1 523 88`, `reset`
//
// The answer to `step` is a line with a count, followed by that many float32 logits. The answer to
// `reset` is `0`. The answer to a failed request is a line with `-1` and the reason.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <sstream>

#include "model.h"
#include "vocabulary.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int64_t> numbers(const std::string& text, char separator) {
  std::vector<int64_t> values;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (part.empty()) continue;
    size_t length = 0;
    int64_t number = 0;
    try {
      number = std::stoll(part, &length);
    } catch (const std::logic_error&) {
      length = 0;
    }
    if (length != part.size()) throw Failure("'" + part + "' is no token");
    values.push_back(number);
  }
  return values;
}

int64_t best(const std::vector<float>& logits, int64_t vocab_size) {
  const auto row = logits.end() - vocab_size;
  return std::max_element(row, logits.end()) - row;
}

void generate(Model& model, const Vocabulary& vocabulary, const std::vector<int64_t>& prompt,
              int64_t count) {
  const Manifest& manifest = model.manifest();
  const auto start = Clock::now();
  int64_t token = best(model.step(prompt, true), manifest.vocab_size);
  const double prefill = seconds_since(start);
  const auto first = Clock::now();
  const int64_t room = manifest.context - static_cast<int64_t>(prompt.size());
  int64_t generated = 0;
  for (; generated < std::min(count, room); ++generated) {
    if (std::count(manifest.stop.begin(), manifest.stop.end(), token)) break;
    std::cout << vocabulary.text(token) << std::flush;
    token = best(model.step({token}), manifest.vocab_size);
  }
  std::cout << "\n";
  std::cerr << prompt.size() / prefill << " tokens/s of prompt, "
            << generated / seconds_since(first) << " tokens/s after it\n";
}

void serve(Model& model) {
  for (std::string line; std::getline(std::cin, line);) {
    try {
      if (line == "reset") {
        model.reset();
        std::printf("0\n");
      } else if (line.rfind("step ", 0) == 0) {
        const std::vector<float> logits = model.step(numbers(line.substr(5), ' '));
        std::printf("%zu\n", logits.size());
        std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
      } else {
        throw Failure("no such request");
      }
    } catch (const Failure& failure) {
      std::printf("-1 %s\n", failure.what());
    }
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: RUNNER BUNDLE TOKEN,TOKEN,... [COUNT] | BUNDLE --serve\n";
    return 2;
  }
  try {
    const std::unique_ptr<Model> model = open_model(argv[1]);
    if (std::string(argv[2]) == "--serve") {
      serve(*model);
    } else {
      const int64_t count = argc > 3 ? numbers(argv[3], ',').at(0) : 64;
      generate(*model, Vocabulary(argv[1]), numbers(argv[2], ','), count);
    }
  } catch (const Failure& failure) {
    std::cerr << "error: " << failure.what() << "\n";
    return 1;
  }
  return 0;
}
