// Loads a bundle with transformers.js and generates text, in a browser or in Node.

/**
 * Load a bundle. `folder` is its path on this server (in Node: on this disk), and `device` is
 * "webgpu", "wasm" or, in Node, "cpu".
 */
export async function loadBundle(transformers, folder, device, onProgress) {
  const { env, pipeline } = transformers;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.useBrowserCache = false; // a bundle that was exported again has the same URL
  return pipeline("text-generation", folder.replace(/\/$/, ""), {
    device,
    progress_callback: onProgress,
  });
}

/**
 * Request WebGPU devices without subgroups where a subgroup has fewer than 8 lanes, as on some phones
 * and with SwiftShader: ONNX Runtime's flash attention, for 32 tokens and more, is wrong there.
 */
export function avoidSmallSubgroups() {
  const requestDevice = GPUAdapter.prototype.requestDevice;
  GPUAdapter.prototype.requestDevice = function (descriptor = {}) {
    const features = [...(descriptor.requiredFeatures ?? [])].filter(
      (feature) => this.info.subgroupMinSize >= 8 || !feature.startsWith("subgroup"),
    );
    return requestDevice.call(this, { ...descriptor, requiredFeatures: features });
  };
}

/** Generate the reply to `messages` (`{role, content}` objects); `onText` gets it in pieces. */
export async function reply(transformers, generator, messages, options) {
  const { maxTokens, onText, stopping } = options;
  const output = await generator(messages, {
    max_new_tokens: maxTokens,
    do_sample: false,
    stopping_criteria: stopping,
    streamer: new transformers.TextStreamer(generator.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: onText,
    }),
  });
  return output[0].generated_text.at(-1).content;
}

/** Return how many tokens the messages take, with the start of the reply. */
export function countTokens(generator, messages) {
  return generator.tokenizer.apply_chat_template(messages, {
    add_generation_prompt: true,
    return_tensor: false,
    return_dict: false,
  }).length;
}

/** Continue the prompts of golden.json greedily; return those with other tokens than at export. */
export async function failedPrompts(transformers, generator, golden) {
  const failed = [];
  for (const { text, prompt, tokens } of golden) {
    const shape = [1, prompt.length];
    const output = await generator.model.generate({
      inputs: new transformers.Tensor("int64", BigInt64Array.from(prompt, BigInt), shape),
      attention_mask: transformers.ones(shape),
      max_new_tokens: tokens.length,
      do_sample: false,
      eos_token_id: null, // golden prompts continue after stop tokens
    });
    const got = Array.from(output.data, Number).slice(prompt.length);
    if (got.length !== tokens.length || got.some((token, i) => token !== tokens[i])) {
      failed.push({ text, expected: tokens, got });
    }
  }
  return failed;
}
