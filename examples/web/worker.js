// Runs the model outside of the page's thread, so that the page stays responsive.
// Messages to the page: {kind, ...}, with one of the kinds "status", "loaded", "text", "done",
// "tested" and "error".

import { avoidSmallSubgroups, countTokens, failedPrompts, loadBundle, reply } from "./model.js";

if ("gpu" in navigator) avoidSmallSubgroups();

let transformers, generator, manifest, golden, stopping;

/** Import transformers.js from a node_modules folder (a URL that ends with "/") or a module. */
async function importTransformers(library) {
  if (!library.endsWith("/")) return import(library);
  const module = await import(`${library}@huggingface/transformers/dist/transformers.min.js`);
  // Without these paths, the library loads ONNX Runtime from a server on the internet.
  const runtime = `${library}onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify`;
  module.env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  return module;
}

async function readJson(folder, name) {
  const response = await fetch(`${folder}/${name}`);
  if (!response.ok) throw new Error(`${folder}/${name}: ${response.status}`);
  return response.json();
}

async function load({ library, bundle, device }) {
  await generator?.dispose();
  manifest = await readJson(bundle, "manifest.json");
  if (manifest.options.layout !== "transformers.js") {
    throw new Error(`${bundle} has another layout: export it with -O layout=transformers.js`);
  }
  if (device === "webgpu" && manifest.not_on_webgpu) throw new Error(manifest.not_on_webgpu);
  golden = await readJson(bundle, "golden.json");
  transformers = await importTransformers(library);
  stopping = new transformers.InterruptableStoppingCriteria();
  generator = await loadBundle(transformers, bundle, device, (progress) => {
    if (progress.status === "progress_total") {
      postMessage({ kind: "status", text: `loading: ${Math.round(progress.progress)} %` });
    }
  });
  postMessage({ kind: "loaded", name: manifest.model.name, context: manifest.context });
}

async function chat({ messages, maxTokens }) {
  stopping.reset();
  const room = manifest.context - countTokens(generator, messages);
  if (room < 1) throw new Error(`longer than the context of ${manifest.context} tokens`);
  const text = await reply(transformers, generator, messages, {
    maxTokens: Math.min(maxTokens, room),
    stopping,
    onText: (piece) => postMessage({ kind: "text", piece }),
  });
  postMessage({ kind: "done", text });
}

async function test() {
  const failed = await failedPrompts(transformers, generator, golden);
  postMessage({ kind: "tested", count: golden.length, failed });
}

const tasks = { load, chat, test, stop: () => stopping.interrupt() };

onmessage = async ({ data }) => {
  try {
    await tasks[data.task](data);
  } catch (error) {
    postMessage({ kind: "error", text: error.message ?? String(error) });
  }
};
